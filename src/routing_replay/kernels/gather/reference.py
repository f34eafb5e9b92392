"""Gathering a step's routing rows in plain torch: copy, check, reset."""

from dataclasses import dataclass
from enum import IntFlag

import torch
from torch import Tensor

__all__ = [
    "MISSING_ID",
    "MISSING_ID_UINT8",
    "RowFault",
    "StepRing",
    "gather_rows_reference",
    "in_slot",
]

MISSING_ID = -1
"""The id of a row that nothing wrote, in int16 buffers."""

MISSING_ID_UINT8 = 255
"""The same after narrowing to uint8, which is done only where `num_experts <= 255`."""


class RowFault(IntFlag):
    """What is wrong with a gathered row; 0 is a good row."""

    MISSING = 1
    """Some layer wrote no id (the reset value -1 is still there)."""

    OUT_OF_RANGE = 2
    """Some id is neither -1 nor in `[0, num_experts)`."""

    DUPLICATE = 4
    """Some layer holds the same id twice in the row."""


@dataclass(frozen=True, slots=True)
class StepRing:
    """A ring whose slots the replays of a recorded gather take in turn, by the number of the step.

    Attributes:
        step: int64 `[1]` on the device: every replay finds the number of its step there.
        num_slots: Slots of the ring; a step's is its number modulo this.
        slot_bytes: From one slot to the next, a multiple of 8.
        stamp_out: int64 `[1]` in slot 0: where the number is left, so that nobody takes older rows for the step's.
    """

    step: Tensor
    num_slots: int
    slot_bytes: int
    stamp_out: Tensor


def in_slot(tensor: Tensor, ring: StepRing) -> Tensor:
    """Return what is to the slot of a ring's step what a tensor is to slot 0.

    Args:
        tensor: In slot 0, in the memory of the whole ring.
        ring: The ring.

    Returns:
        A view.

    Runtime: waits for the device.
    """
    slot = int(ring.step) % ring.num_slots
    offset = slot * ring.slot_bytes // tensor.element_size()
    return tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() + offset)


def gather_rows_reference(
    cache: Tensor,
    row_idx: Tensor | slice,
    rows_out: Tensor,
    flags_out: Tensor,
    num_reset: int,
    num_experts: int,
) -> None:
    """Copy rows out of the device cache, flag the bad ones, and reset the step's rows to -1.

    Args:
        cache: int16 `[L, N, K]`; rows `[0, num_reset)` of every layer are -1 afterwards.
        row_idx: int64 `[n]`, cache rows to take; or `slice(n)`, the first ones.
        rows_out: uint8 or int16 `[>= n, L, K]`; rows `[0, n)` are overwritten. In uint8 a bad id becomes 255.
        flags_out: uint8 `[>= n]`; rows `[0, n)` are overwritten with `RowFault` bits.
        num_reset: Rows of the step's bucket, padding rows included.
        num_experts: E.

    Runtime: no host sync; allocates O(n*L*K^2); CUDA-graph safe; bitwise deterministic; no gradients.
    """
    rows = cache[:, row_idx].transpose(0, 1)  # [n, L, K]
    num_rows = rows.shape[0]
    ascending = rows.sort(dim=-1).values
    if num_rows and cache.device.type == "cpu" and _are_good(ascending, num_experts):
        rows_out[:num_rows] = rows
        flags_out[:num_rows] = 0
        cache[:, :num_reset] = MISSING_ID
        return
    is_missing = rows == MISSING_ID
    is_foreign = ~is_missing & ((rows < 0) | (rows >= num_experts))
    is_repeated = (ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] != MISSING_ID)
    flags = is_missing.flatten(1).any(1) * int(RowFault.MISSING)
    flags = flags + is_foreign.flatten(1).any(1) * int(RowFault.OUT_OF_RANGE)
    flags = flags + is_repeated.flatten(1).any(1) * int(RowFault.DUPLICATE)
    if rows_out.dtype is torch.uint8:
        rows = rows.masked_fill(is_missing | is_foreign, MISSING_ID_UINT8)
    rows_out[:num_rows] = rows.to(rows_out.dtype)
    flags_out[:num_rows] = flags.to(torch.uint8)
    cache[:, :num_reset] = MISSING_ID


def _are_good(ascending: Tensor, num_experts: int) -> bool:
    """Whether sorted rows are all in range and distinct: on a CPU cheaper to ask first than to flag row by row."""
    if ascending[..., 0].min() < 0 or ascending[..., -1].max() >= num_experts:
        return False
    return bool((ascending[..., 1:] > ascending[..., :-1]).all())
