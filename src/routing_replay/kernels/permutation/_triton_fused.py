"""Routing and the plan of few tokens as one Triton kernel: programs that route a token each, then place its pairs."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from routing_replay.kernels.permutation._triton import launch_plan, new_plan
from routing_replay.kernels.permutation.plan import PermutationPlan, PermutationShape
from routing_replay.kernels.permutation.workspace import (
    HEADER_WORDS,
    MASK_WORDS,
    MAX_FUSED_TOKENS,
    table_words,
    workspace_bins,
)
from routing_replay.kernels.routing import RoutingMethod, RoutingMethodType
from routing_replay.kernels.routing._triton import (
    ONE_WARP_EXPERTS,
    launch_route,
    pick_experts,
    route_constexprs,
    store_row,
    wait_for_earlier_kernel,
    with_shared,
)

__all__ = ["compile_cases", "launch_route_and_plan"]

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_HEADER = tl.constexpr(HEADER_WORDS)
_WORDS = tl.constexpr(MASK_WORDS)
_WARP = 32
_CLEARED = tl.constexpr(128)
_CTA_BLOCK = tl.constexpr(4)


@triton.jit
def _bits_in(words):
    if _IS_INTERPRETED:
        count = words - ((words >> 1) & 0x55555555)
        count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
        return (((count + (count >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
    return libdevice.popc(words)


@triton.jit
def _finish_pairs(
    expanded_ptr, tokens_ptr, batch_ptr, limit_ptr, num_ctas_ptr, total_ptr, token, pair, is_pair, is_here, local,
    first_tile, count, rank, total_tiles, PAIRS_POW2: tl.constexpr, TILE: tl.constexpr, TILE_POW2: tl.constexpr,
    CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Store the rows of a token's pairs; the first pair of an expert also has its padding and its CTAs."""
    row = first_tile * TILE + rank
    tl.store(expanded_ptr + pair, tl.where(is_here, row, -1), mask=is_pair)
    tl.store(tokens_ptr + row, tl.zeros_like(row) + token, mask=is_here)
    tiles = tl.where(is_here & (rank == 0), (count + TILE - 1) // TILE, 0)
    most_ctas = tl.max(tiles, axis=0) * CLUSTERS
    # As few rows as there are pairs: a warp's width was there for its reductions.
    few = tl.arange(0, PAIRS_POW2)
    tiles = tl.gather(tiles, few, 0)[:, None]
    first_tile = tl.gather(first_tile, few, 0)[:, None]
    end = first_tile * TILE + tl.gather(count, few, 0)[:, None]
    local = tl.gather(local, few, 0)[:, None]
    padding = end + tl.arange(0, TILE_POW2)[None, :]
    is_padding = padding < (first_tile + tiles) * TILE
    tl.store(tokens_ptr + padding, tl.full(padding.shape, -1, tl.int32), mask=is_padding)
    done = tl.full((), 0, tl.int32)
    while done < most_ctas:
        step = (done + tl.arange(0, _CTA_BLOCK))[None, :]
        cta = first_tile * CLUSTERS + step
        is_cta = step < tiles * CLUSTERS
        limit = tl.minimum((cta + 1) * (TILE // CLUSTERS), end)
        tl.store(batch_ptr + cta, tl.broadcast_to(local, cta.shape), mask=is_cta)
        tl.store(limit_ptr + cta, limit, mask=is_cta)
        done += _CTA_BLOCK
    if token == 0:
        tl.store(num_ctas_ptr, total_tiles * CLUSTERS)
        tl.store(total_ptr, total_tiles * TILE)


@triton.jit
def _alone(local, is_here, NUM_COLUMNS: tl.constexpr):
    """Places of the pairs of the only token: every expert has one row, its tile after those of the smaller ids."""
    column = tl.arange(0, local.shape[0])
    here = tl.where(is_here, local, 0x7FFFFFFF)
    first_tile = tl.zeros_like(local)
    for other in tl.static_range(NUM_COLUMNS):
        first_tile += (tl.sum(tl.where(column == other, here, 0), axis=0) < local).to(tl.int32)
    total_tiles = tl.sum(is_here.to(tl.int32), axis=0)
    return first_tile, tl.full(local.shape, 1, tl.int32), tl.zeros_like(local), total_tiles


@triton.jit
def _mark(table_ptr, local, is_here, is_pair, token, BINS: tl.constexpr, CAN_MISS: tl.constexpr):
    """Tell the others of a token's pairs: its bit in each of its experts' masks, and one more in their counts."""
    one = tl.full(local.shape, 1, tl.int32)
    tl.atomic_or(table_ptr + local * _WORDS + token // 32, one << (token % 32), mask=is_here, sem="relaxed")  # fmt: skip
    tl.atomic_add(table_ptr + BINS * _WORDS + local, one, mask=is_here, sem="relaxed")
    if CAN_MISS:
        missing = tl.sum((is_pair & ~is_here).to(tl.int32), axis=0)
        tl.atomic_add(table_ptr + BINS * (_WORDS + 1), missing, mask=missing > 0, sem="relaxed")


@triton.jit
def _look_up(
    table_ptr, local, is_here, token, num_pairs, BINS: tl.constexpr, TILE: tl.constexpr, CAN_MISS: tl.constexpr
):  # fmt: skip
    """Places of a token's pairs: first tile and count of the expert, the rank inside it, the tiles of all experts.

    The table itself tells when all tokens are in it, so that no memory need be ordered: counts add up to all pairs, and an
    expert has as many bits as its count. What decides is loaded once, not by every thread for itself, and reduced over the
    warp: its threads agree when to go on.
    """
    tl.static_assert(local.shape[0] >= 32)
    bins = tl.arange(0, BINS)
    safe = tl.where(is_here, local, 0)
    bit = tl.full(local.shape, 1, tl.int32) << (token % 32)
    first_tile = tl.zeros_like(local)
    count = tl.zeros_like(local)
    rank = tl.zeros_like(local)
    total_tiles = tl.full((), 0, tl.int32)
    is_pending = tl.full((), 1, tl.int32)
    while is_pending != 0:
        counts = tl.load(table_ptr + BINS * _WORDS + bins, volatile=True)
        seen = tl.zeros_like(local)
        rank = tl.zeros_like(local)
        for word in tl.static_range(_WORDS):
            mask = tl.load(table_ptr + safe * _WORDS + word, mask=is_here, other=0, volatile=True)
            bits = _bits_in(mask)
            seen += bits
            below = tl.where(word < token // 32, bits, 0)
            rank += tl.where(word == token // 32, _bits_in(mask & (bit - 1)), below)
        num_seen = tl.sum(counts, axis=0)
        if CAN_MISS:
            lane = tl.arange(0, 32)
            missing = tl.load(
                table_ptr + BINS * (_WORDS + 1) + lane, mask=lane == 0, other=0, volatile=True
            )
            num_seen += tl.sum(missing, axis=0)
        tiles = (counts + TILE - 1) // TILE
        tile_ends = tl.cumsum(tiles, axis=0)
        total_tiles = tl.sum(tiles, axis=0)
        # Both numbers of an expert at once: a count has at most 9 bits.
        found = tl.gather((tile_ends - tiles) * 65536 + counts, safe, 0)
        first_tile = found // 65536
        count = found % 65536
        is_partial = (is_here & (seen != count)) | (num_seen != num_pairs)
        is_pending = tl.max(is_partial.to(tl.int32), axis=0)
    return first_tile, count, rank, total_tiles


@triton.jit
def _clear(table_ptr, token, num_tokens, TABLE: tl.constexpr):
    """Clear this program's share of a table."""
    first = token * _CLEARED
    while first < TABLE:
        word = first + tl.arange(0, _CLEARED)
        tl.store(table_ptr + word, tl.zeros((_CLEARED,), tl.int32), mask=word < TABLE)
        first += num_tokens * _CLEARED


@triton.jit(do_not_specialize=["num_tokens", "offset"])
def _route_and_plan_kernel(
    logits_ptr, bias_ptr, replay_in_ptr, weights_ptr, ids_ptr, replay_out_ptr,
    expanded_ptr, tokens_ptr, batch_ptr, limit_ptr, num_ctas_ptr, total_ptr, workspace_ptr,
    num_tokens, logits_stride, scale, offset,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr, COLUMNS_POW2: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr, GROUP_SIZE_POW2: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SCORE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_REPLAY_IN: tl.constexpr, HAS_REPLAY_OUT: tl.constexpr,
    PAIRS_POW2: tl.constexpr, NUM_LOCAL: tl.constexpr, BINS: tl.constexpr, TABLE: tl.constexpr, TILE: tl.constexpr,
    TILE_POW2: tl.constexpr, CLUSTERS: tl.constexpr, ONE_TOKEN: tl.constexpr, STAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for each token: picks its experts, marks them in a table, weighs them, and takes its rows from the table.

    The table of a call: per local expert a bit for every token, and a count; and how many pairs are not computed here.
    Calls use two in turn, and each clears the other's. STAGE: 0 all; 1 up to the table and 2 from it, where programs cannot
    wait for each other.
    """
    NUM_COLUMNS: tl.constexpr = TOP_K + NUM_SHARED
    CAN_MISS: tl.constexpr = HAS_REPLAY_IN or NUM_LOCAL < NUM_EXPERTS + NUM_SHARED
    token = tl.program_id(0)
    column = tl.arange(0, COLUMNS_POW2)
    is_pair = column < NUM_COLUMNS
    wait_for_earlier_kernel(PDL)
    turn = 0
    table_ptr = ids_ptr
    if not ONE_TOKEN:
        turn = tl.load(workspace_ptr, volatile=True)
        table_ptr = workspace_ptr + _HEADER + turn * TABLE
    picked, usable, top, total = pick_experts(
        logits_ptr, bias_ptr, replay_in_ptr, token.to(tl.int64), logits_stride, NUM_EXPERTS, TOP_K, COLUMNS_POW2, GROUPS,
        GROUPS_POW2, GROUP_SIZE_POW2, TOP_GROUPS, SCORE, BIAS, HAS_REPLAY_IN, NUM_SHARED,
    )  # fmt: skip
    expert = with_shared(picked, NUM_EXPERTS, TOP_K)
    local = expert - offset
    is_here = is_pair & (local >= 0) & (local < NUM_LOCAL)
    if HAS_REPLAY_IN:
        is_here = is_here & (usable | (column >= TOP_K))
    if not ONE_TOKEN and STAGE != 2:
        # Before the weights: the others' programs see the marks while this one computes.
        _mark(table_ptr, local, is_here, is_pair, token, BINS, CAN_MISS)
    store_row(
        logits_ptr, bias_ptr, weights_ptr, ids_ptr, replay_out_ptr, token.to(tl.int64), logits_stride, scale, picked, usable,
        top, total, NUM_EXPERTS, TOP_K, NUM_SHARED, COLUMNS_POW2, SCORE, WEIGHT, BIAS, NORMALIZE, HAS_REPLAY_OUT,
    )  # fmt: skip
    if ONE_TOKEN:
        first_tile, count, rank, total_tiles = _alone(local, is_here, NUM_COLUMNS)
    if not ONE_TOKEN and STAGE != 1:
        first_tile, count, rank, total_tiles = _look_up(
            table_ptr, local, is_here, token, num_tokens * NUM_COLUMNS, BINS, TILE, CAN_MISS
        )  # fmt: skip
        # All have marked, so all have read whose turn it is, and nobody reads the next call's table.
        if token == num_tokens - 1:
            tl.store(workspace_ptr, 1 - turn)
        _clear(workspace_ptr + _HEADER + (1 - turn) * TABLE, token, num_tokens, TABLE)
    if STAGE != 1:
        _finish_pairs(
            expanded_ptr, tokens_ptr, batch_ptr, limit_ptr, num_ctas_ptr, total_ptr, token, token * NUM_COLUMNS + column,
            is_pair, is_here, local, first_tile, count, rank, total_tiles, PAIRS_POW2, TILE, TILE_POW2, CLUSTERS,
        )  # fmt: skip


def _constexprs(
    method: RoutingMethod,
    shape: PermutationShape,
    *,
    has_bias: bool,
    has_in: bool,
    has_out: bool,
    launch_pdl: bool,
) -> dict[str, Any]:
    bins = workspace_bins(shape.num_local_experts)
    routing = route_constexprs(method, has_bias=has_bias, has_in=has_in, has_out=has_out)
    return {
        **routing,
        "COLUMNS_POW2": max(_WARP, routing["COLUMNS_POW2"]),
        "PAIRS_POW2": triton.next_power_of_2(method.num_columns),
        "NUM_LOCAL": shape.num_local_experts,
        "BINS": bins,
        "TABLE": table_words(bins),
        "TILE": shape.tile_tokens,
        "TILE_POW2": triton.next_power_of_2(shape.tile_tokens),
        "CLUSTERS": shape.cluster_size,
        "ONE_TOKEN": shape.num_tokens == 1,
        "PDL": launch_pdl,
    }


def launch_route_and_plan(
    router_logits: Tensor,
    method: RoutingMethod,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shape: PermutationShape,
    *,
    routing_bias: Tensor | None,
    routing_replay_in: Tensor | None,
    routing_replay_out: Tensor | None,
    workspace: Tensor | None,
    launch_pdl: bool = False,
) -> PermutationPlan:
    """Fill weights, ids and replay rows and make the plan: one launch up to 256 tokens with a workspace, else as two ops.

    Args:
        router_logits: `[T, E]` float32, bfloat16 or float16, rows of consecutive elements.
        method: How logits become ids and weights.
        topk_weights: `[T, K + S]`, any float dtype, contiguous; overwritten.
        topk_ids: int32 `[T, K + S]`, contiguous; overwritten.
        shape: Sizes of the plan, with T, K + S, and E + S.
        routing_bias: `[E]`, or None.
        routing_replay_in: int16 `[>= T, K]` ids to force, or None.
        routing_replay_out: int16 `[>= T, K]`, or None; rows `[0, T)` are overwritten.
        workspace: Of `route_and_plan_workspace`, or None.
        launch_pdl: As in `launch_route`.

    Returns:
        The plan.

    Runtime: one launch, or those of `launch_route` and `launch_plan` for more than 256 tokens, more than 512 experts, or
        without a workspace; no sync; allocates the plan; CUDA-graph safe; bitwise deterministic; no gradients. Programs wait
        for each other: the GPU must hold all of them, at most 256 of one warp, at a time. Two streams must not share a
        workspace.
    """
    tensors = (
        router_logits,
        routing_bias,
        routing_replay_in,
        topk_weights,
        topk_ids,
        routing_replay_out,
    )
    num_tokens = shape.num_tokens
    is_one_warp = max(method.num_experts, shape.num_local_experts) <= ONE_WARP_EXPERTS
    is_one = num_tokens == 1 or (workspace is not None and num_tokens <= MAX_FUSED_TOKENS)
    if num_tokens == 0 or not is_one or not is_one_warp:
        launch_route(
            router_logits,
            method,
            topk_weights,
            topk_ids,
            routing_bias=routing_bias,
            routing_replay_in=routing_replay_in,
            routing_replay_out=routing_replay_out,
            launch_pdl=launch_pdl,
        )
        return launch_plan(
            topk_ids, shape, are_distinct=routing_replay_in is None, launch_pdl=launch_pdl
        )
    plan = new_plan(topk_ids, shape)
    constexprs = _constexprs(
        method,
        shape,
        has_bias=routing_bias is not None,
        has_in=routing_replay_in is not None,
        has_out=routing_replay_out is not None,
        launch_pdl=launch_pdl,
    )
    # Interpreted programs run one after another: none may wait for a later one.
    stages = (1, 2) if triton.knobs.runtime.interpret and num_tokens > 1 else (0,)
    for stage in stages:
        _route_and_plan_kernel[(num_tokens,)](
            *tensors,
            *plan.buffers,
            workspace,
            num_tokens,
            router_logits.stride(0),
            method.routed_scaling_factor,
            shape.local_expert_offset,
            **constexprs,
            STAGE=stage,
            num_warps=1,
            launch_pdl=launch_pdl,
        )
    return plan


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        Softmax and grouped routing, forced ids, fused shared experts, expert parallelism, and one token.
    """
    plan = ("expanded", "tokens", "batch", "limit", "num_ctas", "total", "workspace")
    signature = {
        "logits_ptr": "*fp32",
        "bias_ptr": "*fp32",
        "replay_in_ptr": "*i16",
        "weights_ptr": "*fp32",
        "ids_ptr": "*i32",
        "replay_out_ptr": "*i16",
        **{f"{name}_ptr": "*i32" for name in plan},
        "num_tokens": "i32",
        "logits_stride": "i32",
        "scale": "fp32",
        "offset": "i32",
    }
    softmax = RoutingMethod(type=RoutingMethodType.RenormalizeNaive, num_experts=128, top_k=8)
    grouped = RoutingMethod(
        type=RoutingMethodType.DeepSeekV3, num_experts=256, top_k=8, n_group=8, topk_group=4
    )
    shared = RoutingMethod(
        type=RoutingMethodType.DeepSeekV3, num_experts=160, top_k=6, num_fused_shared_experts=2
    )
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for name, method, tokens, local, has_in in (
        ("softmax", softmax, 256, 128, False),
        ("softmax_forced", softmax, 256, 128, True),
        ("grouped_rank", grouped, 64, 32, False),
        ("shared", shared, 17, 162, True),
        ("one_token", softmax, 1, 128, False),
    ):
        shape = PermutationShape(
            num_tokens=tokens,
            top_k=method.num_columns,
            num_experts=method.num_experts + method.num_fused_shared_experts,
            local_expert_offset=0,
            num_local_experts=local,
            tile_tokens=16,
        )
        values = _constexprs(
            method, shape, has_bias=method.takes_bias, has_in=has_in, has_out=True, launch_pdl=False
        )
        cases.append((name, _route_and_plan_kernel, signature, {**values, "STAGE": 0}))
    return cases
