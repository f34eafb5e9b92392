"""Routing as NeMo-RL takes it: signed ids, a row of -1 where its own router shall choose."""

import base64
import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from routing_replay.errors import ConfigError
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.export._format import OnMissing
from routing_replay.trace.export._rows import (
    cast_ids,
    checked_num_tokens,
    placed_rows,
    rows_between,
)
from routing_replay.trace.export._samples import check_one_length_each, check_one_model

__all__ = ["to_nemo_rl", "to_nemo_rl_batch", "to_nemo_rl_envelope"]

_SignedArray = npt.NDArray[np.int8 | np.int16 | np.int32]


def to_nemo_rl(
    trace: RoutingTrace, *, num_tokens: int, on_missing: OnMissing = "error"
) -> _SignedArray:
    """Make `routed_experts` of one message or sample of NeMo-RL.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of the sequence, S.
        on_missing: "error" refuses missing rows. "native" writes them as rows of -1, for which NeMo-RL's own router
            chooses; it counts them.

    Returns:
        `[S, L, K]` of the MoE layers, int8 up to 128 experts, int16 up to 32768, else int32. The row of the last
        token, which has none, holds arange(K).

    Raises:
        ConfigError: `num_tokens` is below 1, or the policy is another.
        TraceMismatchError: A row is missing under "error", or the trace is longer than the sequence.
    """
    if on_missing not in ("error", "native"):
        raise ConfigError(
            f"on_missing={on_missing!r} is not offered by NeMo-RL; accepted are error, native"
        )
    tokens = checked_num_tokens(trace, num_tokens)
    if on_missing == "error":
        rows_between(trace, first=0, stop=tokens - 1, target="an export with on_missing='error'")
    ids, captured = placed_rows(trace, num_rows=tokens)
    captured[-1] = True  # captured or filler: its logits are never used
    rows = cast_ids(trace, ids, _signed_dtype(trace.num_experts), target="NeMo-RL")
    rows[~captured] = -1
    return rows


def to_nemo_rl_envelope(
    trace: RoutingTrace, *, num_tokens: int, on_missing: OnMissing = "error"
) -> str:
    """Make the text that NeMo-RL's servers put into `choice.message.routed_experts`.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of the sequence.
        on_missing: As in `to_nemo_rl`.

    Returns:
        `nrlre1:<dtype>:<S>x<L>x<K>:<base64>` of what `to_nemo_rl` returns, little-endian.

    Raises:
        ConfigError: As in `to_nemo_rl`.
        TraceMismatchError: As in `to_nemo_rl`.
    """
    rows = to_nemo_rl(trace, num_tokens=num_tokens, on_missing=on_missing)
    shape = "x".join(map(str, rows.shape))
    data = base64.b64encode(rows.astype(rows.dtype.newbyteorder("<")).tobytes()).decode("ascii")
    return f"nrlre1:{rows.dtype.name}:{shape}:{data}"


def to_nemo_rl_batch(
    traces: Sequence[RoutingTrace],
    *,
    num_tokens: Sequence[int],
    seq_len: int,
    on_missing: OnMissing = "error",
) -> _SignedArray:
    """Make `routed_experts` of a right-padded batch of NeMo-RL.

    Args:
        traces: Rows of each sequence, of one model.
        num_tokens: Tokens of each sequence.
        seq_len: Padded length, S.
        on_missing: As in `to_nemo_rl`.

    Returns:
        `[B, S, L, K]` in the dtype of `to_nemo_rl`; padding holds arange(K).

    Raises:
        ConfigError: A number is out of range, or there is not one length for each trace.
        TraceMismatchError: As in `to_nemo_rl`, or the traces are of different models.
    """
    check_one_model(traces)
    check_one_length_each(traces, num_tokens=num_tokens)
    width = operator.index(seq_len)
    longest = max(num_tokens)
    if longest > width:
        raise ConfigError(
            f"seq_len={width} but a sequence has {longest} tokens; pass the padded length of the batch"
        )
    model = traces[0]
    batch: _SignedArray = np.empty(
        (len(traces), width, model.num_moe_layers, model.top_k), _signed_dtype(model.num_experts)
    )
    batch[:] = np.arange(model.top_k, dtype=batch.dtype)
    for row, (trace, tokens) in enumerate(zip(traces, num_tokens, strict=True)):
        batch[row, :tokens] = to_nemo_rl(trace, num_tokens=tokens, on_missing=on_missing)
    return batch


def _signed_dtype(num_experts: int) -> np.dtype[np.int8 | np.int16 | np.int32]:
    """The narrowest signed dtype that holds every id and -1."""
    for kind in (np.int8, np.int16):
        if num_experts - 1 <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.int32)
