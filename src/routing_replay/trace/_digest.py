"""The chained token digest, which ties every row of a trace to the tokens up to and including it."""

import zlib
from collections.abc import Sequence

import numpy as np

from routing_replay.errors import TraceFormatError, TraceMismatchError
from routing_replay.trace._dtype import DigestArray, IntArray

MAX_UINT32 = (1 << 32) - 1


def token_digests(token_ids: Sequence[int] | IntArray, *, previous: int = 0) -> DigestArray:
    """Compute the digest of every token of a sequence.

    `h_t = crc32(token_t, h_{t-1})` with `h_{-1} = 0`: the running CRC-32 (zlib, ISO-HDLC) over the
    token ids, each as four bytes, little-endian. One changed token changes its own digest and every
    later one, and the chain can be continued from any digest through `previous`.

    This is a guard against mistakes, not against an attacker, and it hides nothing: a token can be
    computed back from its own and the previous digest.

    Args:
        token_ids: Integers in [0, 2**32), `[n]`, any integer dtype.
        previous: Digest of the token before `token_ids[0]`; 0 at the start of a sequence.

    Returns:
        Digests, uint32 `[n]`, writable and owned by the caller.

    Raises:
        TraceFormatError: A token id or `previous` is not an integer in [0, 2**32), or `token_ids`
            is not one-dimensional.
    """
    if not 0 <= previous <= MAX_UINT32:
        raise TraceFormatError(f"previous = {previous} is not a digest; digests are in [0, 2**32)")
    encoded = memoryview(_as_tokens(token_ids).tobytes())
    digests: list[int] = []
    digest = previous
    for offset in range(0, len(encoded), 4):
        digest = zlib.crc32(encoded[offset : offset + 4], digest)
        digests.append(digest)
    return np.array(digests, dtype=np.uint32)


def sequence_digests(token_ids: Sequence[int] | IntArray, *, start: int, stop: int) -> DigestArray:
    """Compute the digests of the tokens [start, stop) of a sequence given from its token 0.

    Args:
        token_ids: The whole sequence from token 0, at least `stop` integers in [0, 2**32).
        start: First token index.
        stop: One past the last token index.

    Returns:
        Digests, uint32 `[stop - start]`.

    Raises:
        TraceFormatError: A token id is not an integer in [0, 2**32).
        TraceMismatchError: The sequence has fewer than `stop` tokens.
    """
    if len(token_ids) < stop:
        raise TraceMismatchError(
            f"token_ids has {len(token_ids)} tokens but the trace has rows up to token index"
            f" {stop - 1}; pass the full sequence from token 0 (at least {stop} tokens)"
        )
    return token_digests(token_ids[:stop])[start:]


def check_digests(
    digests: DigestArray, token_ids: Sequence[int] | IntArray, *, start: int, name: str
) -> None:
    """Check that stored digests are those of a sequence.

    Args:
        digests: Stored digests, uint32 `[rows]`.
        token_ids: The whole sequence from token 0, at least `start + rows` tokens.
        start: Token index of `digests[0]`.
        name: What the digests belong to, for the message.

    Raises:
        TraceFormatError: A token id is not an integer in [0, 2**32).
        TraceMismatchError: The sequence is too short or holds other tokens.
    """
    expected = sequence_digests(token_ids, start=start, stop=start + len(digests))
    differs = np.flatnonzero(digests != expected)
    if differs.size == 0:
        return
    row = int(differs[0])
    # A difference before the first row shows in the first row already, the chain being one.
    where = "at or before" if row == 0 and start > 0 else "at"
    raise TraceMismatchError(
        f"{name} belongs to other tokens: the first difference is {where} token index {start + row}"
        f" (token_digest {int(digests[row]):#010x} is stored, token_ids[{start + row}] ="
        f" {int(token_ids[start + row])} gives {int(expected[row]):#010x}); pass the full sequence"
        f" from token 0 that was routed"
    )


def _as_tokens(token_ids: Sequence[int] | IntArray) -> DigestArray:
    """Narrow token ids to little-endian uint32 after a range check."""
    try:
        tokens = np.asarray(token_ids)
    except ValueError as err:
        raise TraceFormatError("token_ids is ragged; pass one flat sequence of integers") from err
    if tokens.ndim != 1:
        raise TraceFormatError(
            f"token_ids has shape {tokens.shape}; pass one sequence of integers, shape [n]"
        )
    if tokens.size == 0:
        return np.zeros(0, dtype="<u4")
    if tokens.dtype.kind not in "iu":
        raise TraceFormatError(f"token_ids has dtype {tokens.dtype}; pass integers in [0, 2**32)")
    outside = (tokens < 0) | (tokens > MAX_UINT32)
    if outside.any():
        first = int(np.argmax(outside))
        raise TraceFormatError(
            f"token_ids[{first}] = {int(tokens[first])} is outside [0, 2**32); pass the tokens that"
            f" were routed, without padding or label masks"
        )
    return tokens.astype("<u4")
