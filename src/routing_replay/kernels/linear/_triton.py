"""One to a few rows times a weight in Triton, on request after a residual addition and an RMSNorm: a stream of weights."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from routing_replay.kernels.l1_cache import prefer_l1_cache
from routing_replay.kernels.linear.few_rows import FewRowsTile, choose_few_rows_tile
from routing_replay.kernels.overlap_triton import let_next_start, wait_for_earlier_memory

__all__ = ["compile_cases", "launch_few_rows"]


@triton.jit
def _normed(total, norm_weight, eps, inverse_size):
    """One row, with the roundings of `add_rms_norm`."""
    total32 = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total32 * total32, axis=0) * inverse_size + eps)
    rounded = (total32 * scale).to(total.dtype)
    return (norm_weight.to(tl.float32) * rounded.to(tl.float32)).to(total.dtype)


@triton.jit
def _few_rows_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    normed_ptr,
    total_ptr,
    eps,
    inverse_size,
    NUM_ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADDS: tl.constexpr,
    NORMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """`COLUMNS` columns of the result over the whole depth, for all rows.

    The weights are on their way to registers before the kernel waits for the rows: they do not depend on what is ahead.
    """
    let_next_start(PDL)
    block = tl.program_id(0)
    at = tl.arange(0, DEPTH)
    is_in = at < IN
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < OUT
    weights = tl.load(
        weight_ptr + column.to(tl.int64)[:, None] * IN + at[None, :],
        mask=is_column[:, None] & is_in[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    if NORMS:
        norm_weight = tl.load(norm_weight_ptr + at, mask=is_in, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    wait_for_earlier_memory(PDL)
    # All rows are asked for before the first is used.
    rows = ()
    for row in tl.static_range(NUM_ROWS):
        x = tl.load(x_ptr + row * IN + at, mask=is_in, other=0.0)
        if ADDS:
            residual = tl.load(residual_ptr + row * IN + at, mask=is_in, other=0.0)
            x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        rows = rows + (x,)  # noqa: RUF005 -- Triton adds tuples, and does not unpack them
    is_written = is_in & (block == 0)
    for row in tl.static_range(NUM_ROWS):
        x = rows[row]
        if ADDS:
            tl.store(total_ptr + row * IN + at, x, mask=is_written)
        if NORMS:
            x = _normed(x, norm_weight, eps, inverse_size)
            tl.store(normed_ptr + row * IN + at, x, mask=is_written)
        sums = tl.sum(weights.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        if HAS_BIAS:
            sums += bias
        tl.store(out_ptr + row * OUT + column, sums.to(out_ptr.dtype.element_ty), mask=is_column)


def _constexprs(
    num_rows: int, width: int, columns: int, tile: FewRowsTile, *, adds: bool, norms: bool, has_bias: bool
) -> dict[str, Any]:  # fmt: skip
    return {
        "NUM_ROWS": num_rows,
        "IN": width,
        "OUT": columns,
        "DEPTH": triton.next_power_of_2(width),
        "COLUMNS": tile.columns,
        "ADDS": adds,
        "NORMS": norms,
        "HAS_BIAS": has_bias,
    }


def launch_few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    tile: FewRowsTile,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    normed: Tensor | None = None,
    total: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """Launch the kernel; arguments are already checked, and contiguous.

    Args:
        x: `[T, in]`, T from 1 on.
        weight: `[out, in]`, dtype of `x`.
        bias: `[out]`, or None.
        out: `[T, out]`, any float dtype; overwritten.
        tile: The work of a CTA.
        residual: `[T, in]` to add first, or None.
        norm_weight: `[in]` of an RMSNorm ahead of the product, or None.
        eps: Of that norm.
        normed: `[T, in]`, overwritten with the normed rows; None without a norm.
        total: `[T, in]`, overwritten with the sum; None without a residual.
        overlap: Launch as a programmatic dependent of the kernel ahead (sm_90 on), and let the next one start at once.

    Runtime: one launch on the current stream; no host sync; no allocation; CUDA-graph safe; bitwise deterministic, and a
        row's bits do not depend on the rows beside it; no gradients.
    """
    num_rows, width = x.shape
    num_columns = weight.shape[0]
    kernel = _few_rows_kernel[(triton.cdiv(num_columns, tile.columns),)](
        x,
        residual,
        norm_weight,
        weight,
        bias,
        out,
        normed,
        total,
        eps,
        1 / width,
        **_constexprs(
            num_rows,
            width,
            num_columns,
            tile,
            adds=residual is not None,
            norms=norm_weight is not None,
            has_bias=bias is not None,
        ),
        PDL=overlap,
        num_warps=tile.warps,
        launch_pdl=overlap,
    )
    prefer_l1_cache(kernel)


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        The GEMMs of Qwen3-30B-A3B, with a norm ahead of them or without, one with a bias, and sizes that are no powers of two.
    """
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for name, num_rows, width, columns, out, adds, norms, has_bias in (
        ("qkv", 1, 2048, 5120, "bf16", True, True, False),
        ("first_qkv", 1, 2048, 5120, "bf16", False, True, False),
        ("o_proj", 1, 4096, 2048, "bf16", False, False, False),
        ("router", 4, 2048, 128, "bf16", True, True, False),
        ("lm_head", 2, 2048, 151_936, "fp32", False, False, False),
        ("gpt_oss_qkv", 1, 2880, 5120, "bf16", True, True, True),
    ):
        tile = choose_few_rows_tile(num_rows, columns, width)
        assert tile is not None
        tensors = ("x_ptr", "residual_ptr", "norm_weight_ptr", "weight_ptr", "bias_ptr", "normed_ptr", "total_ptr")  # fmt: skip
        signature = {**dict.fromkeys(tensors, "*bf16"), "out_ptr": f"*{out}", "eps": "fp32", "inverse_size": "fp32"}  # fmt: skip
        constexprs = _constexprs(
            num_rows, width, columns, tile, adds=adds, norms=norms, has_bias=has_bias
        )
        cases.append((name, _few_rows_kernel, signature, {**constexprs, "PDL": False}))
    return cases
