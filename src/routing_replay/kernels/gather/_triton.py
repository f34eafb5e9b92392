"""The gather of a step's routing rows as one Triton kernel."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["compile_cases", "launch_gather_rows"]

_BLOCK_ROWS = 32


@triton.jit
def _gather_rows_kernel(
    cache_ptr,
    row_idx_ptr,
    rows_ptr,
    flags_ptr,
    num_rows,
    num_reset,
    capacity,
    num_experts,
    NUM_LAYERS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    NARROW: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """PHASE 0 gathers and flags `BLOCK_ROWS` rows of all layers; PHASE 1 resets as many rows of the bucket."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, TOP_K_POW2)
    # A cast, not a method: Triton turns a capacity of 1 into a Python integer.
    layer_stride = tl.cast(capacity, tl.int64) * TOP_K
    if PHASE == 1:
        for _ in range(NUM_LAYERS):
            reset = row[:, None] * TOP_K + column[None, :]
            in_bucket = (row[:, None] < num_reset) & (column[None, :] < TOP_K)
            tl.store(
                cache_ptr + reset, tl.full((BLOCK_ROWS, TOP_K_POW2), -1, tl.int16), mask=in_bucket
            )
            cache_ptr += layer_stride
    else:
        is_row = row < num_rows
        is_id = is_row[:, None] & (column[None, :] < TOP_K)
        source = tl.load(row_idx_ptr + row, mask=is_row, other=0)
        flags = tl.zeros((BLOCK_ROWS,), tl.int32)
        for layer in range(NUM_LAYERS):
            base = source * TOP_K
            ids = tl.load(cache_ptr + base[:, None] + column[None, :], mask=is_id, other=0).to(
                tl.int32
            )
            is_missing = is_id & (ids == -1)
            is_foreign = is_id & (ids != -1) & ((ids < 0) | (ids >= num_experts))
            flags |= tl.max(is_missing.to(tl.int32), axis=1)
            flags |= tl.max(is_foreign.to(tl.int32), axis=1) * 2
            for earlier in tl.static_range(TOP_K - 1):
                other = tl.load(cache_ptr + base + earlier, mask=is_row, other=0).to(tl.int32)
                is_same = (
                    is_id & (column[None, :] > earlier) & (ids == other[:, None]) & (ids != -1)
                )
                flags |= tl.max(is_same.to(tl.int32), axis=1) * 4
            target = (row.to(tl.int64)[:, None] * NUM_LAYERS + layer) * TOP_K + column[None, :]
            if NARROW:
                narrow = tl.where(is_missing | is_foreign, 255, ids).to(tl.uint8)
                tl.store(rows_ptr + target, narrow, mask=is_id)
            else:
                tl.store(rows_ptr + target, ids.to(tl.int16), mask=is_id)
            cache_ptr += layer_stride
        tl.store(flags_ptr + row, flags.to(tl.uint8), mask=is_row)


def launch_gather_rows(
    cache: Tensor,
    row_idx: Tensor,
    rows_out: Tensor,
    flags_out: Tensor,
    num_reset: int,
    num_experts: int,
) -> None:
    """Launch the gather, then the reset; arguments are those of `gather_rows`, already checked.

    Args:
        cache: int16 `[L, N, K]`.
        row_idx: int64 `[n]`.
        rows_out: uint8 or int16 `[>= n, L, K]`.
        flags_out: uint8 `[>= n]`.
        num_reset: Rows of the bucket.
        num_experts: E.

    Runtime: two launches on the current stream (rows may be gathered in any order, so that no row is reset before
        it is read); no host sync; no allocation; CUDA-graph safe; bitwise deterministic; no gradients.
    """
    num_layers, capacity, top_k = cache.shape
    num_rows = row_idx.shape[0]
    for phase, count in ((0, num_rows), (1, num_reset)):
        if count == 0:
            continue
        _gather_rows_kernel[(triton.cdiv(count, _BLOCK_ROWS),)](
            cache,
            row_idx,
            rows_out,
            flags_out,
            num_rows,
            num_reset,
            capacity,
            num_experts,
            NUM_LAYERS=num_layers,
            TOP_K=top_k,
            TOP_K_POW2=triton.next_power_of_2(top_k),
            NARROW=rows_out.element_size() == 1,
            PHASE=phase,
            BLOCK_ROWS=_BLOCK_ROWS,
        )


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        One case for each phase and output dtype, and one with a cache of a single row.
    """
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for name, phase, rows_type in (
        ("gather_u8", 0, "*u8"),
        ("gather_i16", 0, "*i16"),
        ("reset", 1, "*i16"),
    ):
        signature = {
            "cache_ptr": "*i16",
            "row_idx_ptr": "*i64",
            "rows_ptr": rows_type,
            "flags_ptr": "*u8",
            "num_rows": "i32",
            "num_reset": "i32",
            "capacity": "i32",
            "num_experts": "i32",
        }
        constexprs: dict[str, Any] = {
            "NUM_LAYERS": 48,
            "TOP_K": 8,
            "TOP_K_POW2": 8,
            "NARROW": rows_type == "*u8",
            "PHASE": phase,
            "BLOCK_ROWS": _BLOCK_ROWS,
        }
        cases.append((name, _gather_rows_kernel, signature, constexprs))
        if name == "gather_u8":
            # A cache of one row, which Triton specialises.
            one_row = {key: kind for key, kind in signature.items() if key != "capacity"}
            cases.append(
                (f"{name}_one_row", _gather_rows_kernel, one_row, {**constexprs, "capacity": 1})
            )
    return cases
