"""Checked narrowing of captured arrays into the forms that a trace stores."""

import operator
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from routing_replay.errors import TraceFormatError
from routing_replay.trace._dtype import IdArray, IntArray, ValidArray, WeightArray, trace_id_dtype
from routing_replay.trace._runs import WeightsVersion


def as_captured(ids: IntArray) -> IntArray:
    """Check that ids are integers `[rows, L, K]`, of any integer dtype and memory order.

    Raises:
        TraceFormatError: Another dtype or number of dimensions.
    """
    captured = np.asarray(ids)
    if captured.dtype.kind not in "iu" or captured.ndim != 3:
        raise TraceFormatError(
            f"ids has dtype {captured.dtype} and shape {list(captured.shape)}; pass integers of"
            f" shape [rows, MoE layers, top_k]"
        )
    return captured


def as_valid(valid: ValidArray | Sequence[bool] | None, *, num_rows: int) -> ValidArray:
    """Return the mask of captured rows; `None` means that every row was captured.

    Raises:
        TraceFormatError: Not booleans of shape `[num_rows]`.
    """
    if valid is None:
        return np.ones(num_rows, dtype=np.bool_)
    mask = np.asarray(valid)
    if mask.shape != (num_rows,) or (mask.dtype != np.bool_ and num_rows > 0):
        raise TraceFormatError(
            f"valid has dtype {mask.dtype} and shape {list(mask.shape)}; pass bool of shape"
            f" [{num_rows}], one per row of ids"
        )
    return mask.astype(np.bool_)


def narrow_ids(captured: IntArray, valid: ValidArray, *, num_experts: int, start: int) -> IdArray:
    """Range-check the ids of valid rows and narrow them; invalid rows become arange(K).

    Raises:
        TraceFormatError: An id of a valid row is outside [0, num_experts), or `num_experts` is
            not accepted.
    """
    dtype = trace_id_dtype(num_experts)
    top_k = captured.shape[2]
    all_valid = bool(valid.all())
    # The extremes first: they need no temporary of the array's size.
    in_range = not captured.size or (captured.min() >= 0 and captured.max() < num_experts)
    outside = None if in_range else _outside(captured, valid, num_experts)
    if outside is not None and outside.any():
        first = np.unravel_index(int(np.argmax(outside)), outside.shape)
        row, slot, rank = (int(idx) for idx in first)
        raise TraceFormatError(
            f"ids[{row}, {slot}, {rank}] = {int(captured[row, slot, rank])} (token index"
            f" {start + row}) is outside [0, {num_experts}); a row that was not captured must be"
            f" marked False in valid"
        )
    if top_k > num_experts:
        raise TraceFormatError(
            f"ids has top_k = {top_k} columns but num_experts = {num_experts}; the experts of a row"
            f" are distinct"
        )
    if all_valid:
        return np.ascontiguousarray(captured, dtype=dtype)
    narrowed = captured.astype(dtype, order="C")
    narrowed[~valid] = np.arange(top_k, dtype=dtype)
    return narrowed


def _outside(captured: IntArray, valid: ValidArray, num_experts: int) -> npt.NDArray[np.bool_]:
    """Which ids of valid rows are no expert's."""
    return ((captured < 0) | (captured >= num_experts)) & valid[:, None, None]


def clear_missing_weights(weights: WeightArray | None, valid: ValidArray) -> WeightArray | None:
    """Return a C-ordered copy of the weights with 0 in rows that were not captured.

    Raises:
        TraceFormatError: Not one weight row per row of ids.
    """
    if weights is None:
        return None
    cleared = np.array(weights, order="C")
    if cleared.ndim != 3 or len(cleared) != len(valid):
        raise TraceFormatError(
            f"weights has shape {list(cleared.shape)}; pass float16 or float32 of the shape of ids,"
            f" which has {len(valid)} rows"
        )
    cleared[~valid] = 0
    return cleared


def as_runs(
    weights_version: int | Sequence[tuple[int, int]], *, start: int, num_rows: int
) -> WeightsVersion:
    """Return runs of plain integers; one version alone covers every row."""
    if isinstance(weights_version, Sequence):
        runs = tuple(tuple(operator.index(part) for part in run) for run in weights_version)
        # The constructor checks the form, in one place for every way to build a trace.
        return cast("WeightsVersion", runs)
    return ((start, operator.index(weights_version)),) if num_rows else ()


def frozen_copy(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Return a read-only copy that owns its memory and pins no larger buffer."""
    copied = np.array(array, order="C", copy=True)
    copied.flags.writeable = False
    return copied
