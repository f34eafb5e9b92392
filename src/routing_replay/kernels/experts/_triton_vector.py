"""Experts of a few tokens in Triton: every (token, expert) pair on its own, without a plan and without tensor cores."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from routing_replay.kernels.experts.activation import ActivationType, SwigluParameters
from routing_replay.kernels.experts.activation_triton import gated, plain, rounded
from routing_replay.kernels.experts.config import ExpertsConfig, GemmTile
from routing_replay.kernels.experts.reference import ExpertWeights
from routing_replay.kernels.routing._triton import wait_for_earlier_kernel

__all__ = ["compile_cases", "launch_vector_experts"]


# With only a part of the experts here, every CTA of GEMM 1 looks at all pairs, up to so many.
_MOST_PAIRS_SEEN = 128


@triton.jit
def _is_local(expert, first_expert, NUM_EXPERTS: tl.constexpr, NUM_LOCAL: tl.constexpr):
    local = expert - first_expert
    return (expert >= 0) & (expert < NUM_EXPERTS) & (local >= 0) & (local < NUM_LOCAL)


@triton.jit
def _expert_of(
    ids_ptr, token, rank, first_expert, NUM_EXPERTS: tl.constexpr, NUM_LOCAL: tl.constexpr, TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr, DISTINCT: tl.constexpr,
):  # fmt: skip
    """The local expert of a pair, and whether it is computed here."""
    row_ptr = ids_ptr + token * TOP_K
    expert = tl.load(row_ptr + rank)
    is_here = _is_local(expert, first_expert, NUM_EXPERTS, NUM_LOCAL)
    if not DISTINCT:
        earlier = tl.arange(0, TOP_K_POW2)
        others = tl.load(row_ptr + earlier, mask=earlier < rank, other=-1)
        is_here = is_here & (tl.sum((others == expert).to(tl.int32), axis=0) == 0)
    return (expert - first_expert).to(tl.int64), is_here


@triton.jit
def _turns_of(
    ids_ptr, num_pairs, first_expert, PAIRS_POW2: tl.constexpr, NUM_EXPERTS: tl.constexpr, NUM_LOCAL: tl.constexpr,
    TOP_K: tl.constexpr, TOP_K_POW2: tl.constexpr, DISTINCT: tl.constexpr,
):  # fmt: skip
    """Among the pairs of whole rows that are computed here, the turn of each, `[PAIRS_POW2]`, -1 for others; their number."""
    pair = tl.arange(0, PAIRS_POW2)
    is_pair = pair < num_pairs
    expert = tl.load(ids_ptr + pair, mask=is_pair, other=-1)
    is_here = _is_local(expert, first_expert, NUM_EXPERTS, NUM_LOCAL)
    if not DISTINCT:
        rank = (pair % TOP_K)[:, None]
        earlier = tl.arange(0, TOP_K_POW2)[None, :]
        is_earlier = is_pair[:, None] & (earlier < rank)
        others = tl.load(ids_ptr + (pair[:, None] - rank + earlier), mask=is_earlier, other=-1)
        is_here = is_here & (tl.sum((others == expert[:, None]).to(tl.int32), axis=1) == 0)
    counted = is_here.to(tl.int32)
    return tl.where(is_here, tl.cumsum(counted, axis=0) - 1, -1), tl.sum(counted, axis=0)


@triton.jit
def _pair_at(ids_ptr, turns, turn, first_expert):
    """The pair that has a turn, and its local expert: both mean nothing where no pair has it."""
    pair = tl.sum(tl.where(turns == turn, tl.arange(0, turns.shape[0]), 0), axis=0)
    return pair, (tl.load(ids_ptr + pair) - first_expert).to(tl.int64)


@triton.jit
def _finish(sums, bias_ptr, at, mask, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """Round what a GEMM gives and add its bias, as the reference does."""
    value = rounded(sums, DTYPE).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
        value = rounded(value + rounded(bias, DTYPE).to(tl.float32), DTYPE).to(tl.float32)
    return value


@triton.jit
def _load_weights(weights_ptr, row, mask, at, IN: tl.constexpr):
    """`[rows, depth]` of weights, which nothing reads again."""
    inside = mask[:, None] & (at < IN)[None, :]
    pointers = weights_ptr + row[:, None] * IN + at[None, :]
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_same(row_ptr, mask, at, IN: tl.constexpr):
    """One row of tokens, `[rows, depth]`: the same line for every row, which costs less than to change a layout."""
    inside = mask[:, None] & (at < IN)[None, :]
    zeros = tl.zeros_like(mask.to(tl.int32))
    return tl.load(row_ptr + at[None, :] + zeros[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _vector_gemm1_kernel(
    x_ptr, weights_ptr, out_ptr, ids_ptr, bias_ptr, alpha_ptr, beta_ptr, clamp_ptr, x_stride, num_pairs, first_expert,
    IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_CLAMP: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    NUM_LOCAL: tl.constexpr, TOP_K: tl.constexpr, TOP_K_POW2: tl.constexpr, DISTINCT: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr, PARTIAL: tl.constexpr, PAIRS_POW2: tl.constexpr,
):  # fmt: skip
    """One CTA for (pair, block of output columns).

    PARTIAL: the first CTAs are those of the pairs computed here, so that these spread over all SMs; the others end at once.
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    # Pairs take turns at each block: those of one expert read its weights together, from memory once.
    if PARTIAL:
        wait_for_earlier_kernel(PDL)
        turns, num_here = _turns_of(
            ids_ptr, num_pairs, first_expert, PAIRS_POW2, NUM_EXPERTS, NUM_LOCAL, TOP_K, TOP_K_POW2, DISTINCT
        )  # fmt: skip
        is_here = tl.program_id(0) < num_here * tl.cdiv(OUT, ROWS)
        num_turns = tl.maximum(num_here, 1)
        pair, expert = _pair_at(ids_ptr, turns, tl.program_id(0) % num_turns, first_expert)
        block = tl.program_id(0) // num_turns
        token = pair // TOP_K
    else:
        pair = tl.program_id(0) % num_pairs
        block = tl.program_id(0) // num_pairs
        token = pair // TOP_K
        wait_for_earlier_kernel(PDL)
        expert, is_here = _expert_of(
            ids_ptr, token, pair % TOP_K, first_expert, NUM_EXPERTS, NUM_LOCAL, TOP_K, TOP_K_POW2, DISTINCT
        )  # fmt: skip
    if is_here:
        column = block * ROWS + tl.arange(0, ROWS)
        mask = column < OUT
        row = expert * (2 * OUT if IS_GATED else OUT) + column
        sums = tl.zeros((ROWS,), tl.float32)
        ups = tl.zeros((ROWS,), tl.float32)
        for chunk in tl.static_range((IN + DEPTH - 1) // DEPTH):
            at = chunk * DEPTH + tl.arange(0, DEPTH)
            weights = _load_weights(weights_ptr, row, mask, at, IN)
            up_weights = weights
            if IS_GATED:
                up_weights = _load_weights(weights_ptr, row + OUT, mask, at, IN)
            x = _load_same(x_ptr + token.to(tl.int64) * x_stride, mask, at, IN)
            sums += tl.sum(weights.to(tl.float32) * x, axis=1)
            if IS_GATED:
                ups += tl.sum(up_weights.to(tl.float32) * x, axis=1)
        value = _finish(sums, bias_ptr, row, mask, HAS_BIAS, DTYPE)
        if IS_GATED:
            ups = _finish(ups, bias_ptr, row + OUT, mask, HAS_BIAS, DTYPE)
            value = gated(value, ups, alpha_ptr, beta_ptr, clamp_ptr, expert, ACTIVATION, HAS_ALPHA, HAS_BETA, HAS_CLAMP)  # fmt: skip
        else:
            value = plain(value, ACTIVATION)
        tl.store(out_ptr + pair.to(tl.int64) * OUT + column, rounded(value, DTYPE), mask=mask)


@triton.jit
def _weighted_row(
    h_ptr, weights_ptr, bias_ptr, topk_weights_ptr, early, token, rank, expert, column, mask, FIRST: tl.constexpr,
    CHUNKS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What a pair adds to its token; its first blocks of weights are `early` from FIRST on, as far as these go."""
    row_ptr = h_ptr + (token * TOP_K + rank).to(tl.int64) * IN
    sums = tl.zeros((ROWS, DEPTH), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        at = chunk * DEPTH + tl.arange(0, DEPTH)
        if FIRST + chunk < AHEAD:
            weights = early[FIRST + chunk]
        else:
            weights = _load_weights(weights_ptr, expert * OUT + column, mask, at, IN)
        sums += weights.to(tl.float32) * _load_same(row_ptr, mask, at, IN)
    value = _finish(tl.sum(sums, axis=1), bias_ptr, expert * OUT + column, mask, HAS_BIAS, DTYPE)
    return value * tl.load(topk_weights_ptr + token * TOP_K + rank)


@triton.jit
def _vector_gemm2_kernel(
    h_ptr, weights_ptr, out_ptr, ids_ptr, topk_weights_ptr, bias_ptr, out_stride, num_tokens, first_expert,
    IN: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_EXPERTS: tl.constexpr, NUM_LOCAL: tl.constexpr,
    TOP_K: tl.constexpr, TOP_K_POW2: tl.constexpr, DISTINCT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """One CTA for (token, block of output columns): all its experts, summed rank by rank.

    With PDL the ids are ready before the kernel ahead begins: AHEAD blocks of weights are on their way while it runs.
    PARTIAL: only the ranks that are computed here are gone through, so that those blocks are of weights that are used.
    """
    CHUNKS: tl.constexpr = (IN + DEPTH - 1) // DEPTH
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0) % num_tokens
    block = tl.program_id(0) // num_tokens
    column = block * ROWS + tl.arange(0, ROWS)
    is_column = column < OUT
    row_ids_ptr = ids_ptr + token * TOP_K
    if PARTIAL:
        turns, num_here = _turns_of(
            row_ids_ptr, TOP_K, first_expert, TOP_K_POW2, NUM_EXPERTS, NUM_LOCAL, TOP_K, TOP_K_POW2, DISTINCT
        )  # fmt: skip
    early = ()
    for index in tl.static_range(AHEAD):
        if PARTIAL:
            _, expert = _pair_at(row_ids_ptr, turns, index // CHUNKS, first_expert)
            is_here = index // CHUNKS < num_here
        else:
            expert, is_here = _expert_of(
                ids_ptr, token, index // CHUNKS, first_expert, NUM_EXPERTS, NUM_LOCAL, TOP_K, TOP_K_POW2, DISTINCT
            )  # fmt: skip
        at = (index % CHUNKS) * DEPTH + tl.arange(0, DEPTH)
        weights = _load_weights(weights_ptr, expert * OUT + column, is_column & is_here, at, IN)
        early = early + (weights,)  # noqa: RUF005 -- Triton adds tuples, and does not unpack them
    wait_for_earlier_kernel(PDL)
    total = tl.zeros((ROWS,), tl.float32)
    for rank in tl.static_range(TOP_K):
        if PARTIAL:
            # Added outside of the branch: inside, product and sum would be rounded once, and give other bits.
            added = tl.zeros((ROWS,), tl.float32)
            if rank < num_here:
                present, local = _pair_at(row_ids_ptr, turns, rank, first_expert)
                added = _weighted_row(
                    h_ptr, weights_ptr, bias_ptr, topk_weights_ptr, early, token, present, local, column, is_column,
                    rank * CHUNKS, CHUNKS, IN, OUT, HAS_BIAS, DTYPE, TOP_K, ROWS, DEPTH, AHEAD,
                )  # fmt: skip
            total += added
        else:
            expert, is_here = _expert_of(
                ids_ptr, token, rank, first_expert, NUM_EXPERTS, NUM_LOCAL, TOP_K, TOP_K_POW2, DISTINCT
            )  # fmt: skip
            added = _weighted_row(
                h_ptr, weights_ptr, bias_ptr, topk_weights_ptr, early, token, rank, expert, column,
                is_column & is_here, rank * CHUNKS, CHUNKS, IN, OUT, HAS_BIAS, DTYPE, TOP_K, ROWS, DEPTH, AHEAD,
            )  # fmt: skip
            # A pair that is not computed here adds 0, whatever its weight.
            total += tl.where(is_here, added, 0.0)
    tl.store(
        out_ptr + token.to(tl.int64) * out_stride + column, rounded(total, DTYPE), mask=is_column
    )


def _shared(
    num_experts: int, num_local: int, top_k: int, *, are_distinct: bool, overlap: bool
) -> dict[str, Any]:
    return {
        "NUM_EXPERTS": num_experts,
        "NUM_LOCAL": num_local,
        "TOP_K": top_k,
        "TOP_K_POW2": triton.next_power_of_2(top_k),
        "DISTINCT": are_distinct,
        "PDL": overlap,
    }


def _constexprs1(
    width: int, columns: int, tile: GemmTile, activation: ActivationType, given: frozenset[str], num_pairs: int,
    *, is_partial: bool,
) -> dict[str, Any]:  # fmt: skip
    """`given` names the optional tensors that there are."""
    takes_parameters = activation is ActivationType.Swiglu
    sees_all = is_partial and num_pairs <= _MOST_PAIRS_SEEN
    return {
        "IN": width,
        "OUT": columns,
        "ACTIVATION": int(activation),
        "IS_GATED": activation.is_gated,
        "HAS_BIAS": "bias" in given,
        "HAS_ALPHA": takes_parameters and "alpha" in given,
        "HAS_BETA": takes_parameters and "beta" in given,
        "HAS_CLAMP": takes_parameters and "limit" in given,
        "ROWS": tile.rows // 2 if activation.is_gated else tile.rows,
        "DEPTH": tile.depth,
        "PARTIAL": sees_all,
        "PAIRS_POW2": triton.next_power_of_2(num_pairs) if sees_all else 1,
    }


def _constexprs2(
    width: int, columns: int, tile: GemmTile, top_k: int, *, has_bias: bool, is_partial: bool
) -> dict[str, Any]:
    return {
        "IN": width,
        "OUT": columns,
        "HAS_BIAS": has_bias,
        "ROWS": tile.rows,
        "DEPTH": tile.depth,
        "AHEAD": min(tile.stages, top_k * triton.cdiv(width, tile.depth)),
        "PARTIAL": is_partial,
    }


def launch_vector_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    activated: Tensor,
    output: Tensor,
    *,
    config: ExpertsConfig,
    activation: ActivationType,
    parameters: SwigluParameters,
    num_experts: int,
    local_expert_offset: int,
    are_distinct: bool,
    overlap: bool = False,
) -> None:
    """Run the experts of a few tokens and sum them, in two launches.

    Every pair reads the weights of its expert by itself, so that the work grows with T * K and not with the experts
    touched: for up to a few tokens, where these are nearly the same. With a part of the experts here, pairs of other ranks
    take neither the first CTAs nor the loads ahead.

    Args:
        hidden_states: `[T, H]`; rows of consecutive elements.
        topk_ids: int32 `[T, K]`, contiguous: global experts, shared ones included; others than those here are left out.
        topk_weights: float32 `[T, K]`, contiguous.
        weights: Weights of the local experts, contiguous.
        activated: `[T * K, I]` in the dtype of `hidden_states`, contiguous: scratch; overwritten.
        output: `[T, H]`; rows of consecutive elements; overwritten.
        config: `rows`, `depth` and `warps` of both GEMMs; `stages` of GEMM 2 counts the blocks of weights that it loads
            before it waits for GEMM 1, and of GEMM 1 nothing.
        activation: Between the GEMMs.
        parameters: Of Swiglu, per expert.
        num_experts: Experts on all ranks, shared ones included.
        local_expert_offset: First expert on this rank.
        are_distinct: The caller knows that no id repeats in a row.
        overlap: Launch each as a programmatic dependent of the kernel ahead (sm_90 on). The one ahead of GEMM 1 must wait for
            its own predecessors before it lets GEMM 1 start.

    Runtime: two launches, none for no tokens; no sync; allocates nothing; CUDA-graph safe; bitwise deterministic, and a
        row's bits do not depend on the rows beside it; no gradients.
    """
    num_tokens, top_k = topk_ids.shape
    if num_tokens == 0:
        return
    num_local, hidden_size, intermediate_size = weights.gemm2_weights.shape
    optional = {
        "bias": weights.gemm1_bias,
        "alpha": parameters.alpha,
        "beta": parameters.beta,
        "limit": parameters.limit,
    }
    given = frozenset(name for name, tensor in optional.items() if tensor is not None)
    shared = _shared(num_experts, num_local, top_k, are_distinct=are_distinct, overlap=overlap)
    num_pairs = num_tokens * top_k
    is_partial = num_local < num_experts
    first = _constexprs1(
        hidden_size, intermediate_size, config.gemm1, activation, given, num_pairs, is_partial=is_partial
    )  # fmt: skip
    _vector_gemm1_kernel[(num_pairs * triton.cdiv(intermediate_size, first["ROWS"]),)](
        hidden_states,
        weights.gemm1_weights,
        activated,
        topk_ids,
        *optional.values(),
        hidden_states.stride(0),
        num_pairs,
        local_expert_offset,
        num_warps=config.gemm1.warps,
        **first,
        **shared,
        launch_pdl=overlap,
    )
    has_bias = weights.gemm2_bias is not None
    second = _constexprs2(
        intermediate_size, hidden_size, config.gemm2, top_k, has_bias=has_bias, is_partial=is_partial
    )  # fmt: skip
    _vector_gemm2_kernel[(num_tokens * triton.cdiv(hidden_size, second["ROWS"]),)](
        activated,
        weights.gemm2_weights,
        output,
        topk_ids,
        topk_weights,
        weights.gemm2_bias,
        output.stride(0),
        num_tokens,
        local_expert_offset,
        num_warps=config.gemm2.warps,
        **second,
        **shared,
        launch_pdl=overlap,
    )


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        Both GEMMs of five layers: plain, with everything, with ids that may repeat, and with a part of the experts.
    """
    pointers = {"x": "bf16", "weights": "bf16", "out": "bf16", "h": "bf16", "ids": "i32", "topk_weights": "fp32",
                "bias": "fp32", "alpha": "fp32", "beta": "fp32", "clamp": "fp32"}  # fmt: skip
    signature = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(
        ("x_stride", "out_stride", "num_pairs", "num_tokens", "first_expert"), "i32"
    )
    narrow = GemmTile(rows=8, depth=1024, stages=1, warps=4)
    wide = GemmTile(rows=4, depth=256, stages=12, warps=4)
    none: frozenset[str] = frozenset()
    everything = frozenset(("bias", "alpha", "beta", "limit"))
    num_experts = 128
    layers = {
        "qwen3": (2048, 768, num_experts, 8, ActivationType.Swiglu, none),
        "gpt_oss": (2880, 2880, num_experts, 4, ActivationType.Swiglu, everything),
        "nemotron": (2688, 1856, num_experts, 6, ActivationType.Relu2, none),
        "qwen3_part": (2048, 768, 16, 8, ActivationType.Swiglu, none),
        "gpt_oss_part": (2880, 2880, 64, 4, ActivationType.Swiglu, everything),
    }
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for name, (hidden, intermediate, local, top_k, activation, given) in layers.items():
        are_distinct = name.startswith("qwen3")
        shared = _shared(num_experts, local, top_k, are_distinct=are_distinct, overlap=False)
        part, has_bias = local < num_experts, bool(given)
        first = _constexprs1(hidden, intermediate, narrow, activation, given, 8 * top_k, is_partial=part)  # fmt: skip
        second = _constexprs2(intermediate, hidden, wide, top_k, has_bias=has_bias, is_partial=part)
        cases.append((f"{name}_1", _vector_gemm1_kernel, signature, {**first, **shared}))
        cases.append((f"{name}_2", _vector_gemm2_kernel, signature, {**second, **shared}))
    return cases
