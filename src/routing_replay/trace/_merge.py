"""Joining two pieces of the routing of one sequence."""

from dataclasses import dataclass

import numpy as np

from routing_replay.errors import TraceMismatchError
from routing_replay.trace._checks import TraceFields
from routing_replay.trace._dtype import DigestArray, IdArray, ValidArray, WeightArray
from routing_replay.trace._runs import WeightsVersion, join_runs, slice_runs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedRows:
    """The fields of a joined trace that differ from those of its first piece."""

    ids: IdArray
    valid: ValidArray
    token_digest: DigestArray
    weights_version: WeightsVersion
    weights: WeightArray | None


def merge_rows(first: TraceFields, delta: TraceFields) -> MergedRows:
    """Append `delta` to `first`, or let it replace the one row that both have.

    Args:
        first: The earlier rows.
        delta: Rows that start where `first` ends, or one token before.

    Returns:
        Rows of both. Of a common row the later one stays, unless only the earlier one is valid.

    Raises:
        TraceMismatchError: The pieces have another layout, do not meet, were routed for other
            tokens, or only one of them has weights.
    """
    _check_same_layout(first, delta)
    _check_weights(first.weights, delta.weights)
    end = first.start + len(first.ids)
    overlap = _num_common_rows(first, delta, end=end)
    keeps_earlier = bool(overlap and first.valid[-1] and not delta.valid[0])
    # Rows of `first` before, and rows of `delta` from, the seam.
    head = len(first.ids) - (overlap if not keeps_earlier else 0)
    tail = overlap if keeps_earlier else 0
    seam = first.start + head
    weights = None
    if first.weights is not None and delta.weights is not None:
        weights = np.concatenate((first.weights[:head], delta.weights[tail:]))
    return MergedRows(
        ids=np.concatenate((first.ids[:head], delta.ids[tail:])),
        valid=np.concatenate((first.valid[:head], delta.valid[tail:])),
        token_digest=np.concatenate((first.token_digest[:head], delta.token_digest[tail:])),
        weights_version=join_runs(
            slice_runs(first.weights_version, start=first.start, stop=seam),
            slice_runs(delta.weights_version, start=seam, stop=delta.start + len(delta.ids)),
        ),
        weights=weights,
    )


def _check_same_layout(first: TraceFields, delta: TraceFields) -> None:
    """Check that both pieces are of the same model and layers."""
    for name in ("num_experts", "top_k", "num_layers", "layer_ids"):
        mine, theirs = getattr(first, name), getattr(delta, name)
        if mine != theirs:
            raise TraceMismatchError(
                f"delta has {name} = {theirs} but the trace has {mine}; merge only traces of the"
                f" same model and layers"
            )


def _check_weights(first: WeightArray | None, delta: WeightArray | None) -> None:
    """Check that both pieces have weights of one dtype, or neither has any."""
    mine = None if first is None else str(first.dtype)
    theirs = None if delta is None else str(delta.dtype)
    if mine != theirs:
        raise TraceMismatchError(
            f"the trace has weights of dtype {mine} and delta of dtype {theirs}; capture both the"
            f" same way, or drop them with dataclasses.replace(trace, weights=None)"
        )


def _num_common_rows(first: TraceFields, delta: TraceFields, *, end: int) -> int:
    """Return how many rows the pieces share, 0 or 1, once they are known to fit together."""
    if delta.start == end:
        return 0
    if delta.start != end - 1 or len(first.ids) == 0 or len(delta.ids) == 0:
        raise TraceMismatchError(
            f"delta has the rows [{delta.start}, {delta.start + len(delta.ids)}) but the trace has"
            f" [{first.start}, {end}); delta must start at token index {end}, or at {end - 1} with"
            f" one common row"
        )
    mine, theirs = int(first.token_digest[-1]), int(delta.token_digest[0])
    if mine != theirs:
        raise TraceMismatchError(
            f"the common row at token index {end - 1} has token_digest {mine:#010x} in the trace"
            f" but {theirs:#010x} in delta; the pieces were routed for different tokens at or"
            f" before token index {end - 1}"
        )
    return 1
