"""Rows of one request that belong to another: what stale slots and shared buffers leave behind."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from routing_replay.trace._dtype import IntArray
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.importers._bind import TokenIds
from routing_replay.trace.importers._content import SURPRISE_BITS
from routing_replay.trace.importers._finding import Finding

__all__ = ["find_shared_rows"]

_KEY_BITS = 64
_MIN_FOREIGN = 6


def find_shared_rows(
    requests: Mapping[str, tuple[RoutingTrace, TokenIds]],
) -> tuple[Finding, ...]:
    """Look for rows that two requests share although their tokens differ.

    Equal rows of equal prefixes are right: a prefix cache hands them out. Rows are suspicious where the same experts, in
    every layer, stand beside other tokens, over a run that chance does not explain.

    Args:
        requests: Name to trace and token ids, of one model.

    Returns:
        One finding for each request that holds rows of an earlier one; `values` are its first row, the other's first
        row, and how many follow.

    Runtime: allocates 24 bytes a row.
    """
    names = list(requests)
    keys = [_run_keys(trace) for trace, _ in requests.values()]
    if not names or not sum(map(len, keys)):
        return ()
    owner = np.repeat(np.arange(len(names)), [len(item) for item in keys])
    row = np.concatenate([np.arange(len(item)) for item in keys])
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(key[order][1:] == key[order][:-1])
    pairs = {
        (int(owner[late]), int(owner[early]), int(row[late]) - int(row[early])): None
        for early, late in zip(order[same], order[same + 1], strict=True)
        if owner[early] != owner[late]
    }
    findings: dict[str, Finding] = {}
    for late, early, shift in pairs:
        found = _longest_foreign_run(requests, names[late], names[early], shift)
        if found is not None:
            findings.setdefault(names[late], found)
    return tuple(findings.values())


def _bits_per_row(trace: RoutingTrace) -> float:
    return trace.num_moe_layers * math.log2(math.comb(trace.num_experts, trace.top_k))


def _run_keys(trace: RoutingTrace) -> npt.NDArray[np.uint64]:
    """A 64-bit key for each run of rows long enough that chance hardly repeats it; of a large model, for each row."""
    keys = _row_keys(trace.ids)
    length = math.ceil(_KEY_BITS / max(_bits_per_row(trace), 1.0))
    num_runs = max(0, len(keys) - length + 1)
    runs = np.zeros(num_runs, np.uint64)
    for offset, factor in enumerate(_odd_factors(length)):
        runs += keys[offset : offset + num_runs] * factor
    return runs


def _odd_factors(count: int) -> npt.NDArray[np.uint64]:
    """Factors drawn once for all: sums of products tell rows apart as a random hash does."""
    drawn = np.random.default_rng(0).integers(1 << 63, size=count, dtype=np.uint64)
    return 2 * drawn + np.uint64(1)


def _row_keys(ids: IntArray) -> npt.NDArray[np.uint64]:
    """A 64-bit key for each row; equal rows have equal keys."""
    rows = np.ascontiguousarray(ids).reshape(len(ids), ids.shape[1] * ids.shape[2]).view(np.uint8)
    padded = np.zeros((len(rows), -(-rows.shape[1] // 8) * 8), np.uint8)
    padded[:, : rows.shape[1]] = rows
    words = padded.view(np.uint64)
    return (words * _odd_factors(words.shape[1])).sum(axis=1, dtype=np.uint64)


def _longest_foreign_run(
    requests: Mapping[str, tuple[RoutingTrace, TokenIds]], late: str, early: str, shift: int
) -> Finding | None:
    """Compare two requests row by row at one shift; None where chance or a shared prefix explains what is equal."""
    (trace, tokens), (other, other_tokens) = requests[late], requests[early]
    first = max(0, shift)
    count = min(trace.num_rows, other.num_rows + shift) - first
    if count <= 0 or trace.ids.shape[1:] != other.ids.shape[1:]:
        return None
    mine = slice(first, first + count)
    theirs = slice(first - shift, first - shift + count)
    equal = (trace.ids[mine] == other.ids[theirs]).all(axis=(1, 2))
    equal &= trace.valid[mine] & other.valid[theirs]
    my_tokens = np.asarray(tokens)[trace.start + first : trace.start + first + count]
    offset = other.start + first - shift
    differs = my_tokens != np.asarray(other_tokens)[offset : offset + count]
    # Tokens of one kind (digits, say) may well meet the same experts here and there; a long run of other tokens does not.
    needed = max(_MIN_FOREIGN, math.ceil(2 * SURPRISE_BITS / max(_bits_per_row(trace), 1e-9)))
    at, length = _run_with_most(equal, differs)
    if int(differs[at : at + length].sum()) < needed:
        return None
    foreign = np.zeros_like(equal)
    foreign[at : at + length] = differs[at : at + length]
    at = int(np.argmax(foreign))
    return Finding(
        code="rows_of_another_request",
        message=f"request {late!r} holds {int(foreign.sum())} rows of request {early!r} beside other tokens, the first at "
        f"token index {trace.start + first + at}",
        row=trace.start + first + at,
        values=(trace.start + first + at, offset + at, int(foreign.sum())),
        cause="a slot of the engine's cache was handed on without its rows (KV offload, disaggregated prefill, a buffer that "
        "is not cleared)",
        upstream=("vllm#39568", "sglang#26975", "llm-d-router#1473"),
    )


def _run_with_most(equal: npt.NDArray[np.bool_], differs: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """The run of equal rows that holds the most other tokens: where it starts, and how long it is."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], equal, [False])).astype(np.int8)))
    if not edges.size:
        return 0, 0
    counted = np.concatenate(([0], np.cumsum(differs)))
    starts, ends = edges[::2], edges[1::2]
    best = int(np.argmax(counted[ends] - counted[starts]))
    return int(starts[best]), int(ends[best] - starts[best])
