"""The weighted sum of each token's expert outputs as one Triton kernel without atomics."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from routing_replay.kernels.experts.activation_triton import rounded
from routing_replay.kernels.routing._triton import wait_for_earlier_kernel

__all__ = ["compile_cases", "launch_combine"]

_MAX_BLOCK = 1024
# Programs that keep a large GPU busy: fewer columns to a program while there are not as many.
_WANTED_PROGRAMS = 264
_LEAST_BLOCK = 128
_ELEMENTS_OF_A_THREAD = 8


@triton.jit
def _combine_kernel(
    rows_ptr, weights_ptr, expanded_ptr, out_ptr, rows_stride, out_stride,
    COLUMNS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for each token and block of columns; rank 0 is added first."""
    wait_for_earlier_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < COLUMNS
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(TOP_K):
        row = tl.load(expanded_ptr + token * TOP_K + rank)
        weight = tl.load(weights_ptr + token * TOP_K + rank)
        # A pair that is not computed here adds 0, whatever its weight.
        weight = tl.where(row >= 0, weight, 0.0)
        at = rows_ptr + row.to(tl.int64) * rows_stride + column
        total += tl.load(at, mask=is_column & (row >= 0), other=0.0).to(tl.float32) * weight
    tl.store(out_ptr + token * out_stride + column, rounded(total, out_ptr.dtype.element_ty), mask=is_column)  # fmt: skip


def _block(num_tokens: int, columns: int) -> int:
    """Columns of a program; the choice changes no bit of the sum."""
    block = min(_MAX_BLOCK, triton.next_power_of_2(columns))
    while block > _LEAST_BLOCK and num_tokens * triton.cdiv(columns, block) < _WANTED_PROGRAMS:
        block //= 2
    return int(max(block, _LEAST_BLOCK))


def launch_combine(
    gemm2_output: Tensor,
    topk_weights: Tensor,
    expanded_idx_to_permuted_idx: Tensor,
    output: Tensor,
    *,
    overlap: bool = False,
) -> None:
    """Sum the weighted expert outputs of each token in float32, rank 0 first, and round once.

    Args:
        gemm2_output: `[max_padded_tokens, H]`; rows of consecutive elements. Rows that no pair names are not read.
        topk_weights: float32 `[T, K]`, contiguous.
        expanded_idx_to_permuted_idx: int32 `[T * K]`; -1 for pairs that are not computed here, which add nothing.
        output: `[T, H]`; rows of consecutive elements; overwritten, with exact zeros for a token without any pair.
        overlap: Launch as a programmatic dependent of the kernel ahead (sm_90 on).

    Runtime: one launch, none for no tokens; no sync; allocates nothing; CUDA-graph safe; bitwise deterministic, no atomics;
        no gradients.
    """
    num_tokens, top_k = topk_weights.shape
    columns = output.shape[1]
    if num_tokens == 0:
        return
    block = _block(num_tokens, columns)
    _combine_kernel[(num_tokens, triton.cdiv(columns, block))](
        gemm2_output,
        topk_weights,
        expanded_idx_to_permuted_idx,
        output,
        gemm2_output.stride(0),
        output.stride(0),
        COLUMNS=columns,
        TOP_K=top_k,
        BLOCK=block,
        PDL=overlap,
        num_warps=max(1, block // (32 * _ELEMENTS_OF_A_THREAD)),
        launch_pdl=overlap,
    )


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        Few and many tokens, a width that no block divides, and float32.
    """
    signature = {
        "rows_ptr": "*bf16",
        "weights_ptr": "*fp32",
        "expanded_ptr": "*i32",
        "out_ptr": "*bf16",
        "rows_stride": "i32",
        "out_stride": "i32",
    }
    wide = {**signature, "rows_ptr": "*fp32", "out_ptr": "*fp32"}
    sizes = {"decode": (1, 2048, 8), "prefill": (4096, 2048, 8), "odd": (64, 2880, 4), "one": (64, 5120, 1)}  # fmt: skip
    cases = [
        (name, _combine_kernel, signature, {"COLUMNS": columns, "TOP_K": top_k, "BLOCK": _block(tokens, columns), "PDL": False})
        for name, (tokens, columns, top_k) in sizes.items()
    ]  # fmt: skip
    return [*cases, ("float32", _combine_kernel, wide, cases[0][3])]
