"""The gather of a step's routing rows as one Triton kernel."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from routing_replay.kernels.gather.reference import StepRing

__all__ = ["compile_cases", "launch_gather_rows", "launch_gather_step"]

_FEW_ROWS = 256
"""Up to so many rows a program takes one row: the latency counts there, not the traffic."""

_ROWS_OF_MANY = 4


# The sizes of a step and the place of its flags change all the time: none may ask for a compilation of its own.
@triton.jit(
    do_not_specialize=["num_rows", "num_reset"],
    do_not_specialize_on_alignment=["flags_ptr"],
)
def _gather_rows_kernel(
    cache_ptr,
    row_idx_ptr,
    rows_ptr,
    flags_ptr,
    num_rows,
    num_reset,
    capacity,
    num_experts,
    step_ptr,
    stamp_ptr,
    slot_bytes,
    NUM_LAYERS: tl.constexpr,
    TOP_K: tl.constexpr,
    LAYERS_POW2: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    NARROW: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    GATHERS: tl.constexpr,
    RESETS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Gather and flag `BLOCK_ROWS` rows, all layers at once, and reset as many rows of the bucket to -1."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    layer = tl.arange(0, LAYERS_POW2)
    column = tl.arange(0, TOP_K_POW2)[None, None, :]
    # Casts, not methods: Triton turns a capacity of 1 into a Python integer.
    layer_base = layer.to(tl.int64) * tl.cast(capacity, tl.int64) * TOP_K
    is_slot = (layer < NUM_LAYERS)[None, :, None] & (column < TOP_K)
    if NUM_SLOTS:
        step = tl.load(step_ptr)
        offset = step % NUM_SLOTS * slot_bytes
        tl.store(stamp_ptr + offset // 8, step, mask=tl.program_id(0) == 0)
        flags_ptr += offset
        if NARROW:
            rows_ptr += offset
        else:
            rows_ptr += offset // 2
    if GATHERS:
        is_row = row < num_rows
        source = row.to(tl.int64)
        if HAS_INDEX:
            source = tl.load(row_idx_ptr + row, mask=is_row, other=0)
        is_id = is_row[:, None, None] & is_slot
        base = (layer_base[None, :] + source[:, None] * TOP_K)[:, :, None]
        ids = tl.load(cache_ptr + base + column, mask=is_id, other=0).to(tl.int32)
        is_missing = is_id & (ids == -1)
        is_foreign = is_id & (ids != -1) & ((ids < 0) | (ids >= num_experts))
        fault = is_missing * 1 + is_foreign * 2
        for earlier in tl.static_range(TOP_K - 1):
            other = tl.sum(tl.where(column == earlier, ids, 0), axis=2, keep_dims=True)
            fault |= (is_id & (column > earlier) & (ids == other) & (ids != -1)) * 4
        # Axis by axis: Triton 3.6 reduced some small tiles wrongly after they were reshaped to one axis.
        flags = tl.reduce(tl.reduce(fault, 2, _either), 1, _either)
        target = (row.to(tl.int64)[:, None] * NUM_LAYERS + layer[None, :])[:, :, None]
        target = target * TOP_K + column
        if NARROW:
            narrow = tl.where(is_missing | is_foreign, 255, ids).to(tl.uint8)
            tl.store(rows_ptr + target, narrow, mask=is_id)
        else:
            tl.store(rows_ptr + target, ids.to(tl.int16), mask=is_id)
        tl.store(flags_ptr + row, flags.to(tl.uint8), mask=is_row)
    if GATHERS and RESETS:
        # A small tile is held twice by a program's threads: none may reset what another has yet to read.
        tl.debug_barrier()
    if RESETS:
        base = (layer_base[None, :] + row.to(tl.int64)[:, None] * TOP_K)[:, :, None]
        is_reset = (row < num_reset)[:, None, None] & is_slot
        nothing = tl.full((BLOCK_ROWS, LAYERS_POW2, TOP_K_POW2), -1, tl.int16)
        tl.store(cache_ptr + base + column, nothing, mask=is_reset)


@triton.jit
def _either(one, other):
    """The faults of two places together."""
    return one | other


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
    num_rows = row_idx.shape[0]
    sizes = (num_rows, num_reset, num_experts)
    if num_rows:
        _launch(cache, row_idx, rows_out, flags_out, sizes, (True, True, False))
    _launch(cache, row_idx, rows_out, flags_out, sizes, (False, False, True))


def launch_gather_step(
    cache: Tensor,
    num_rows: int,
    rows_out: Tensor,
    flags_out: Tensor,
    num_reset: int,
    num_experts: int,
    *,
    ring: StepRing | None = None,
) -> None:
    """Gather rows `[0, num_rows)` and reset the bucket; arguments are those of `gather_step`.

    Args:
        cache: int16 `[L, N, K]`.
        num_rows: n.
        rows_out: uint8 or int16 `[>= n, L, K]`.
        flags_out: uint8 `[>= n]`.
        num_reset: Rows of the bucket, at least n.
        num_experts: E.
        ring: In whose slot 0 the outputs are, or None.

    Runtime: one launch on the current stream (each program resets the rows that it has read); no host sync; no
        allocation; CUDA-graph safe; bitwise deterministic; no gradients.
    """
    sizes = (num_rows, num_reset, num_experts)
    _launch(cache, cache, rows_out, flags_out, sizes, (False, num_rows > 0, True), ring=ring)


def _launch(
    cache: Tensor,
    row_idx: Tensor,
    rows_out: Tensor,
    flags_out: Tensor,
    sizes: tuple[int, int, int],
    phases: tuple[bool, bool, bool],
    *,
    ring: StepRing | None = None,
) -> None:
    """Launch the kernel; `sizes` is (n, bucket, E), `phases` (has index, gathers, resets)."""
    num_layers, capacity, top_k = cache.shape
    has_index, gathers, resets = phases
    count = sizes[1] if resets else sizes[0]
    block_rows = 1 if count <= _FEW_ROWS else _ROWS_OF_MANY
    _gather_rows_kernel[(triton.cdiv(count, block_rows),)](
        cache,
        row_idx,
        rows_out,
        flags_out,
        sizes[0],
        sizes[1],
        capacity,
        sizes[2],
        cache if ring is None else ring.step,
        cache if ring is None else ring.stamp_out,
        0 if ring is None else ring.slot_bytes,
        NUM_LAYERS=num_layers,
        TOP_K=top_k,
        LAYERS_POW2=triton.next_power_of_2(num_layers),
        TOP_K_POW2=triton.next_power_of_2(top_k),
        NARROW=rows_out.element_size() == 1,
        HAS_INDEX=has_index,
        NUM_SLOTS=0 if ring is None else ring.num_slots,
        GATHERS=gathers,
        RESETS=resets,
        BLOCK_ROWS=block_rows,
    )


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        Every combination of phases that is launched, both output dtypes, with and without a ring, few and many rows, and a
        cache of one row.
    """
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for name, phases, rows_type, block_rows in (
        ("step_u8", (False, True, True), "*u8", 1),
        ("step_u8_many", (False, True, True), "*u8", _ROWS_OF_MANY),
        ("step_i16", (False, True, True), "*i16", 1),
        ("step_u8_ring", (False, True, True), "*u8", 1),
        ("step_i16_ring", (False, True, True), "*i16", _ROWS_OF_MANY),
        ("gather_u8", (True, True, False), "*u8", 1),
        ("gather_i16", (True, True, False), "*i16", _ROWS_OF_MANY),
        ("reset", (False, False, True), "*i16", 1),
    ):
        has_ring = name.endswith("_ring")
        signature = {
            "cache_ptr": "*i16",
            "row_idx_ptr": "*i64" if phases[0] else "*i16",
            "rows_ptr": rows_type,
            "flags_ptr": "*u8",
            "num_rows": "i32",
            "num_reset": "i32",
            "capacity": "i32",
            "num_experts": "i32",
            "step_ptr": "*i64" if has_ring else "*i16",
            "stamp_ptr": "*i64" if has_ring else "*i16",
            "slot_bytes": "i32",
        }
        constexprs: dict[str, Any] = {
            "NUM_LAYERS": 48,
            "TOP_K": 8,
            "LAYERS_POW2": 64,
            "TOP_K_POW2": 8,
            "NARROW": rows_type == "*u8",
            "HAS_INDEX": phases[0],
            "NUM_SLOTS": 4 if has_ring else 0,
            "GATHERS": phases[1],
            "RESETS": phases[2],
            "BLOCK_ROWS": block_rows,
        }
        cases.append((name, _gather_rows_kernel, signature, constexprs))
        if name == "step_u8":
            # A cache of one row, which Triton specialises.
            one_row = {key: kind for key, kind in signature.items() if key != "capacity"}
            cases.append(
                (f"{name}_one_row", _gather_rows_kernel, one_row, {**constexprs, "capacity": 1})
            )
    return cases
