"""`gather_rows`: the public op around the gather of a step's routing rows."""

import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels.gather.reference import StepRing, gather_rows_reference, in_slot
from routing_replay.kernels.registration import registered

__all__ = ["gather_rows", "gather_step"]


@registered("routing_replay::gather_rows", mutates_args=("cache", "rows_out", "flags_out"))
def _gather_op(
    cache: Tensor,
    row_idx: Tensor,
    rows_out: Tensor,
    flags_out: Tensor,
    num_reset: int,
    num_experts: int,
) -> None:
    if cache.device.type == "cuda":
        from routing_replay.kernels.gather._triton import launch_gather_rows

        launch_gather_rows(cache, row_idx, rows_out, flags_out, num_reset, num_experts)
    else:
        gather_rows_reference(cache, row_idx, rows_out, flags_out, num_reset, num_experts)


@_gather_op.register_fake
def _(*_: object) -> None:
    return None


_MAX_INT16 = torch.iinfo(torch.int16).max


def _check(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: str,
    ok: bool,
    device: torch.device,
) -> None:
    if tensor.dtype not in dtypes:
        accepted = " or ".join(str(dtype) for dtype in dtypes)
        raise ConfigError(f"{name} is {tensor.dtype}; accepted is {accepted}")
    if not ok:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; accepted is {shape}")
    if not tensor.is_contiguous():
        raise ConfigError(f"{name} has strides {tensor.stride()}; pass a contiguous tensor")
    if tensor.device != device:
        raise ConfigError(f"{name} is on {tensor.device}, expected {device}, where the cache is")


def gather_rows(
    cache: Tensor,
    row_idx: Tensor,
    *,
    rows_out: Tensor,
    flags_out: Tensor,
    num_reset: int,
    num_experts: int,
) -> None:
    """Copy a step's rows out of the device cache, check them, and reset the bucket: one pass, no host sync.

    Args:
        cache: int16 `[L, N, K]`, contiguous; rows `[0, num_reset)` of every layer are -1 afterwards.
        row_idx: int64 `[n]`, cache rows to take, each in `[0, num_reset)` (device data, not checked here).
        rows_out: uint8 (where `num_experts <= 255`) or int16, `[>= n, L, K]`, contiguous. In uint8 a bad id is 255.
        flags_out: uint8 `[>= n]`, contiguous: `RowFault` bits of each row, 0 for a good one.
        num_reset: Rows of the step's bucket, padding rows included, `n <= num_reset <= N`.
        num_experts: E.

    Raises:
        ConfigError: A dtype, shape, stride, device or count is not accepted.

    Runtime: no host sync; allocates nothing on a GPU (the CPU reference O(n*L*K)); CUDA-graph safe; bitwise
        deterministic; no gradients.
    """
    if not 0 < num_experts <= _MAX_INT16:
        raise ConfigError(
            f"num_experts={num_experts} is outside [1, {_MAX_INT16}]; the cache holds int16 ids"
        )
    device = cache.device
    out_dtypes = (torch.uint8, torch.int16) if num_experts <= 255 else (torch.int16,)
    _check("cache", cache, (torch.int16,), "[L, N, K]", cache.ndim == 3, device)
    _check("row_idx", row_idx, (torch.int64,), "[n]", row_idx.ndim == 1, device)
    num_rows = row_idx.shape[0]
    num_layers, capacity, top_k = cache.shape
    fits = rows_out.ndim == 3 and rows_out.shape[0] >= num_rows
    fits = fits and tuple(rows_out.shape[1:]) == (num_layers, top_k)
    expected = f"[>= {num_rows}, {num_layers}, {top_k}]"
    _check("rows_out", rows_out, out_dtypes, expected, fits, device)
    fits = flags_out.ndim == 1 and flags_out.shape[0] >= num_rows
    _check("flags_out", flags_out, (torch.uint8,), f"[>= {num_rows}]", fits, device)
    if not num_rows <= num_reset <= capacity:
        raise ConfigError(
            f"num_reset={num_reset} is outside [{num_rows} rows to gather, {capacity} rows of the cache]"
        )
    if num_reset:
        _gather_op(cache, row_idx, rows_out, flags_out, num_reset, num_experts)


def gather_step(
    cache: Tensor,
    *,
    num_rows: int,
    num_reset: int,
    rows_out: Tensor,
    flags_out: Tensor,
    num_experts: int,
    ring: StepRing | None = None,
) -> None:
    """Do what `gather_rows` does for rows `[0, num_rows)`, at the least cost for the host.

    It is called once a step, from code that no compiler traces: it is no registered op, and checks nothing. The caller
    has checked what `gather_rows` would refuse.

    Args:
        cache: int16 `[L, N, K]`, contiguous; rows `[0, num_reset)` of every layer are -1 afterwards.
        num_rows: n.
        num_reset: Rows of the step's bucket, padding rows included, `n <= num_reset <= N`.
        rows_out: uint8 (where `num_experts <= 255`) or int16, `[>= n, L, K]`, contiguous; rows from n on stay as they are.
        flags_out: uint8 `[>= n]`, contiguous; flags from n on stay as they are.
        num_experts: E.
        ring: Where the step's number names the slot to write to; `rows_out` and `flags_out` are then in slot 0.

    Runtime: one launch on the current stream; no host sync on a GPU; allocates nothing on a GPU (the CPU reference O(n*L*K));
        CUDA-graph safe; bitwise deterministic; no gradients.
    """
    if num_reset == 0:
        return
    if cache.device.type == "cuda":
        from routing_replay.kernels.gather._triton import launch_gather_step

        launch_gather_step(cache, num_rows, rows_out, flags_out, num_reset, num_experts, ring=ring)
    else:
        if ring is not None:
            rows_out, flags_out = in_slot(rows_out, ring), in_slot(flags_out, ring)
            in_slot(ring.stamp_out, ring).copy_(ring.step)
        gather_rows_reference(cache, slice(num_rows), rows_out, flags_out, num_reset, num_experts)
