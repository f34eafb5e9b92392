"""The plan of the grouped GEMMs in Triton: one kernel for few pairs, a count before it for many."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from routing_replay.kernels.permutation.plan import PermutationPlan, PermutationShape
from routing_replay.kernels.routing._triton import wait_for_earlier_kernel

__all__ = ["compile_cases", "launch_plan", "new_plan"]

# Up to as many pairs one launch is enough: every program counts them all.
_ONE_LAUNCH_PAIRS = 8192
_MAX_BLOCK = 2048
_COMPARED_PAIRS = 256
_COUNTED_BLOCKS = 128
_CTA_BLOCK = 32


@triton.jit
def _local_experts(ids_ptr, pair, num_pairs, offset, NUM_EXPERTS: tl.constexpr, NUM_LOCAL: tl.constexpr,
                   TOP_K: tl.constexpr, DISTINCT: tl.constexpr):  # fmt: skip
    """The local expert of each pair, and which pairs are computed here."""
    is_pair = pair < num_pairs
    expert = tl.load(ids_ptr + pair, mask=is_pair, other=-1)
    local = expert - offset
    is_here = is_pair & (expert >= 0) & (expert < NUM_EXPERTS) & (local >= 0) & (local < NUM_LOCAL)
    if not DISTINCT:
        column = pair % TOP_K
        for back in tl.static_range(1, TOP_K):
            has_earlier = is_pair & (column >= back)
            earlier = tl.load(ids_ptr + pair - back, mask=has_earlier, other=-1)
            is_here = is_here & ~(has_earlier & (earlier == expert))
    return local, is_here


@triton.jit
def _place_pairs(
    ids_ptr, expanded_ptr, tokens_ptr, first, placed, num_pairs, offset, mine, NUM_EXPERTS: tl.constexpr,
    NUM_LOCAL: tl.constexpr, TOP_K: tl.constexpr, DISTINCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Give an expert's pairs of one block the rows from `placed` on; return the row after them."""
    pair = first + tl.arange(0, BLOCK)
    local, is_here = _local_experts(ids_ptr, pair, num_pairs, offset, NUM_EXPERTS, NUM_LOCAL, TOP_K, DISTINCT)  # fmt: skip
    is_mine = (is_here & (local == mine)).to(tl.int32)
    row = placed + tl.cumsum(is_mine, axis=0) - 1
    tl.store(expanded_ptr + pair, row, mask=is_mine != 0)
    tl.store(tokens_ptr + row.to(tl.int64), pair // TOP_K, mask=is_mine != 0)
    if mine == 0:
        missing = tl.full((BLOCK,), -1, tl.int32)
        tl.store(expanded_ptr + pair, missing, mask=(pair < num_pairs) & ~is_here)
    return placed + tl.sum(is_mine)


@triton.jit
def _finish_expert(
    tokens_ptr, batch_ptr, limit_ptr, num_ctas_ptr, total_ptr, mine, tiles, first_tile, count, TILE: tl.constexpr,
    TILE_POW2: tl.constexpr, CLUSTERS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Padding rows and CTAs of an expert; the first one also stores the totals."""
    start = first_tile * TILE
    num_tiles = (count + TILE - 1) // TILE
    padding = start + count + tl.arange(0, TILE_POW2)
    is_padding = padding < start + num_tiles * TILE
    tl.store(tokens_ptr + padding.to(tl.int64), tl.full((TILE_POW2,), -1, tl.int32), mask=is_padding)  # fmt: skip
    end_cta = (first_tile + num_tiles) * CLUSTERS
    first = first_tile * CLUSTERS
    while first < end_cta:
        cta = first + tl.arange(0, BLOCK_C)
        limit = tl.minimum((cta + 1) * (TILE // CLUSTERS), start + count)
        tl.store(batch_ptr + cta, tl.zeros((BLOCK_C,), tl.int32) + mine, mask=cta < end_cta)
        tl.store(limit_ptr + cta, limit, mask=cta < end_cta)
        first += BLOCK_C
    if mine == 0:
        total = tl.sum(tiles)
        tl.store(num_ctas_ptr, total * CLUSTERS)
        tl.store(total_ptr, total * TILE)


@triton.jit
def _plan_kernel(
    ids_ptr, expanded_ptr, tokens_ptr, batch_ptr, limit_ptr, num_ctas_ptr, total_ptr, num_pairs, offset,
    NUM_EXPERTS: tl.constexpr, NUM_LOCAL: tl.constexpr, BINS: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr,
    TILE_POW2: tl.constexpr, CLUSTERS: tl.constexpr, DISTINCT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program for each expert. Every one counts all pairs: cheaper, for few, than to wait for another's count."""
    wait_for_earlier_kernel(PDL)
    mine = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    # Loops with `while`: the interpreter takes no range whose end is an argument (numpy 2.4). And a tensor as the loop's
    # variable: one pair alone would make it a Python integer.
    first = tl.full((), 0, tl.int32)
    while first < num_pairs:
        pair = first + tl.arange(0, BLOCK)
        local, is_here = _local_experts(ids_ptr, pair, num_pairs, offset, NUM_EXPERTS, NUM_LOCAL, TOP_K, DISTINCT)  # fmt: skip
        counts += tl.histogram(tl.where(is_here, local, 0), BINS, mask=is_here)
        first += BLOCK
    tiles = (counts + TILE - 1) // TILE
    first_tile = tl.sum(tl.where(bins < mine, tiles, 0))
    count = tl.sum(tl.where(bins == mine, counts, 0))
    placed = first_tile * TILE
    first = tl.full((), 0, tl.int32)
    while first < num_pairs:
        placed = _place_pairs(ids_ptr, expanded_ptr, tokens_ptr, first, placed, num_pairs, offset, mine, NUM_EXPERTS, NUM_LOCAL, TOP_K, DISTINCT, BLOCK)  # fmt: skip
        first += BLOCK
    _finish_expert(tokens_ptr, batch_ptr, limit_ptr, num_ctas_ptr, total_ptr, mine, tiles, first_tile, count, TILE, TILE_POW2, CLUSTERS, BLOCK_C)  # fmt: skip


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, num_pairs, offset, NUM_EXPERTS: tl.constexpr, NUM_LOCAL: tl.constexpr, BINS: tl.constexpr,
    TOP_K: tl.constexpr, DISTINCT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for each block of pairs: how many go to each local expert."""
    wait_for_earlier_kernel(PDL)
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    local, is_here = _local_experts(ids_ptr, pair, num_pairs, offset, NUM_EXPERTS, NUM_LOCAL, TOP_K, DISTINCT)  # fmt: skip
    counts = tl.histogram(tl.where(is_here, local, 0), BINS, mask=is_here)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _counts_of_blocks(counts_ptr, block, num_blocks, BINS: tl.constexpr, COUNTED: tl.constexpr):
    """Pairs of each expert in all blocks, and in those before one."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    first = tl.full((), 0, tl.int32)
    while first < num_blocks:
        other = first + tl.arange(0, COUNTED)
        at = counts_ptr + other[:, None] * BINS + bins[None, :]
        found = tl.load(at, mask=(other < num_blocks)[:, None], other=0)
        counts += tl.sum(found, axis=0)
        before += tl.sum(tl.where((other < block)[:, None], found, 0), axis=0)
        first += COUNTED
    return counts, before


@triton.jit
def _place_kernel(
    ids_ptr, expanded_ptr, tokens_ptr, batch_ptr, limit_ptr, num_ctas_ptr, total_ptr, counts_ptr, num_pairs, num_blocks,
    offset, NUM_EXPERTS: tl.constexpr, NUM_LOCAL: tl.constexpr, BINS: tl.constexpr, TOP_K: tl.constexpr,
    TILE: tl.constexpr, TILE_POW2: tl.constexpr, CLUSTERS: tl.constexpr, DISTINCT: tl.constexpr, BLOCK: tl.constexpr,
    COUNTED: tl.constexpr, EXPERTS_POW2: tl.constexpr, CTAS_POW2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for each block of pairs, which also finishes its share of experts and CTAs."""
    wait_for_earlier_kernel(PDL)
    block = tl.program_id(0)
    counts, before = _counts_of_blocks(counts_ptr, block, num_blocks, BINS, COUNTED)
    tiles = (counts + TILE - 1) // TILE
    tile_ends = tl.cumsum(tiles, axis=0)
    starts = (tile_ends - tiles) * TILE
    total = tl.sum(tiles)

    place = tl.arange(0, BLOCK)
    pair = block * BLOCK + place
    local, is_here = _local_experts(ids_ptr, pair, num_pairs, offset, NUM_EXPERTS, NUM_LOCAL, TOP_K, DISTINCT)  # fmt: skip
    # The rank in the block: pairs of the same expert that come before. So few are compared faster than sorted.
    mine, other = tl.where(is_here, local, -1), tl.where(is_here, local, -2)
    is_before = (mine[:, None] == other[None, :]) & (place[None, :] < place[:, None])
    rank = tl.sum(is_before.to(tl.int32), axis=1)
    row = tl.gather(starts + before, tl.where(is_here, local, 0), 0) + rank
    tl.store(expanded_ptr + pair, tl.where(is_here, row, -1), mask=pair < num_pairs)
    tl.store(tokens_ptr + row.to(tl.int64), pair // TOP_K, mask=is_here)

    expert = block + tl.arange(0, EXPERTS_POW2) * num_blocks
    at = tl.minimum(expert, BINS - 1)
    used = tl.gather(starts + counts, at, 0)
    end = tl.gather(tile_ends * TILE, at, 0)
    padding = used[:, None] + tl.arange(0, TILE_POW2)[None, :]
    is_padding = (padding < end[:, None]) & (expert < NUM_LOCAL)[:, None]
    missing = tl.full((EXPERTS_POW2, TILE_POW2), -1, tl.int32)
    tl.store(tokens_ptr + padding.to(tl.int64), missing, mask=is_padding)

    cta = block + tl.arange(0, CTAS_POW2) * num_blocks
    is_cta = cta < total * CLUSTERS
    batch = tl.sum((tile_ends[None, :] <= (cta // CLUSTERS)[:, None]).to(tl.int32), axis=1)
    limit = tl.gather(starts + counts, tl.minimum(batch, BINS - 1), 0)
    limit = tl.minimum((cta + 1) * (TILE // CLUSTERS), limit)
    tl.store(batch_ptr + cta, batch, mask=is_cta)
    tl.store(limit_ptr + cta, limit, mask=is_cta)
    if block == 0:
        tl.store(num_ctas_ptr, total * CLUSTERS)
        tl.store(total_ptr, total * TILE)


def _constexprs(shape: PermutationShape, *, are_distinct: bool) -> dict[str, Any]:
    block = min(_MAX_BLOCK, max(128, triton.next_power_of_2(shape.num_expanded)))
    return {
        "NUM_EXPERTS": shape.num_experts,
        "NUM_LOCAL": shape.num_local_experts,
        "BINS": max(2, triton.next_power_of_2(shape.num_local_experts)),
        "TOP_K": shape.top_k,
        "TILE": shape.tile_tokens,
        "TILE_POW2": triton.next_power_of_2(shape.tile_tokens),
        "CLUSTERS": shape.cluster_size,
        "DISTINCT": are_distinct,
        "BLOCK": block,
        "BLOCK_C": _CTA_BLOCK,
    }


def _constexprs_of_two(
    shape: PermutationShape, *, are_distinct: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """For the count, and for the placement after it."""
    base = _constexprs(shape, are_distinct=are_distinct)
    del base["BLOCK_C"]
    base["BLOCK"] = _COMPARED_PAIRS
    num_blocks = triton.cdiv(shape.num_expanded, _COMPARED_PAIRS)
    share = {
        "COUNTED": min(_COUNTED_BLOCKS, triton.next_power_of_2(num_blocks)),
        "EXPERTS_POW2": triton.next_power_of_2(triton.cdiv(shape.num_local_experts, num_blocks)),
        "CTAS_POW2": triton.next_power_of_2(triton.cdiv(shape.max_ctas, num_blocks)),
    }
    not_counted = ("TILE", "TILE_POW2", "CLUSTERS")
    count = {name: value for name, value in base.items() if name not in not_counted}
    return count, {**base, **share}


def _launch_two(
    buffers: tuple[Tensor, ...], shape: PermutationShape, *, are_distinct: bool, launch_pdl: bool
) -> None:
    """Count the pairs of each block, then place them."""
    count, place = _constexprs_of_two(shape, are_distinct=are_distinct)
    topk_ids, pairs, offset = buffers[0], shape.num_expanded, shape.local_expert_offset
    num_blocks = triton.cdiv(pairs, _COMPARED_PAIRS)
    counts = topk_ids.new_empty(num_blocks, count["BINS"])
    pdl = {"PDL": launch_pdl, "launch_pdl": launch_pdl}
    _count_kernel[(num_blocks,)](topk_ids, counts, pairs, offset, num_warps=4, **count, **pdl)
    _place_kernel[(num_blocks,)](
        *buffers, counts, pairs, num_blocks, offset, num_warps=8, **place, **pdl
    )


def new_plan(topk_ids: Tensor, shape: PermutationShape) -> PermutationPlan:
    """Allocate a plan.

    Args:
        topk_ids: int32, on the device where the plan shall be.
        shape: Sizes.

    Returns:
        The plan, of undefined values.

    Runtime: six allocations; CUDA-graph safe.
    """
    make = topk_ids.new_empty
    return PermutationPlan(
        shape=shape,
        expanded_idx_to_permuted_idx=make(shape.num_expanded),
        permuted_idx_to_token_idx=make(shape.max_padded_tokens),
        cta_idx_xy_to_batch_idx=make(shape.max_ctas),
        cta_idx_xy_to_mn_limit=make(shape.max_ctas),
        num_non_exiting_ctas=make(1),
        total_num_padded_tokens=make(1),
    )


def launch_plan(
    topk_ids: Tensor,
    shape: PermutationShape,
    *,
    are_distinct: bool = False,
    launch_pdl: bool = False,
) -> PermutationPlan:
    """Make a plan, in one launch up to 8,192 (token, rank) pairs, in two above.

    Args:
        topk_ids: int32 `[T, K]`, contiguous.
        shape: Sizes.
        are_distinct: The caller knows that no id repeats in a row.
        launch_pdl: Start before the kernel ahead in the stream has ended (programmatic dependent launch, sm_90 on). The
            next kernel may then do the same; everything that this one reads or writes it touches after that kernel's end.

    Returns:
        The plan; nothing past `num_non_exiting_ctas` and `total_num_padded_tokens` is written.

    Runtime: one or two launches; no sync; allocates the plan and, for two launches, T*K*E_local/256 counts; CUDA-graph
        safe; bitwise deterministic; no gradients.
    """
    plan = new_plan(topk_ids, shape)
    buffers = (topk_ids, *plan.buffers)
    if shape.num_expanded > _ONE_LAUNCH_PAIRS:
        _launch_two(buffers, shape, are_distinct=are_distinct, launch_pdl=launch_pdl)
        return plan
    constexprs = _constexprs(shape, are_distinct=are_distinct)
    _plan_kernel[(shape.num_local_experts,)](
        *buffers,
        shape.num_expanded,
        shape.local_expert_offset,
        num_warps=1 if constexprs["BLOCK"] <= 256 else 4 if constexprs["BLOCK"] <= 1024 else 8,
        **constexprs,
        PDL=launch_pdl,
        launch_pdl=launch_pdl,
    )
    return plan


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        Small and large batches, clusters, expert parallelism, and ids that may repeat.
    """
    pointers = ("ids", "expanded", "tokens", "batch", "limit", "num_ctas", "total")
    signature = {
        **{f"{name}_ptr": "*i32" for name in pointers},
        "num_pairs": "i32",
        "offset": "i32",
    }
    base = {"num_tokens": 256, "top_k": 8, "num_experts": 128, "local_expert_offset": 0, "num_local_experts": 128,
            "tile_tokens": 16}  # fmt: skip
    shapes = {
        "decode": PermutationShape(**{**base, "num_tokens": 4}),
        "batch": PermutationShape(**base),
        "prefill": PermutationShape(**{**base, "num_tokens": 4096, "tile_tokens": 128}),
        "cluster": PermutationShape(**{**base, "tile_tokens": 192, "cluster_size": 2}),
        "rank": PermutationShape(**{**base, "num_experts": 256, "num_local_experts": 32, "local_expert_offset": 64}),
    }  # fmt: skip
    cases = [(name, _plan_kernel, signature, _constexprs(shape, are_distinct=True)) for name, shape in shapes.items()]  # fmt: skip
    count, place = _constexprs_of_two(shapes["prefill"], are_distinct=True)
    few = {
        name: kind for name, kind in signature.items() if name in ("ids_ptr", "num_pairs", "offset")
    }
    cases.append(("count", _count_kernel, {**few, "counts_ptr": "*i32"}, count))
    more = {**signature, "counts_ptr": "*i32", "num_blocks": "i32"}
    cases.append(("place", _place_kernel, more, place))
    one = {
        "num_pairs": 1,
        **_constexprs(PermutationShape(**{**base, "num_tokens": 1, "top_k": 1}), are_distinct=True),
    }
    without = {name: kind for name, kind in signature.items() if name != "num_pairs"}
    cases.append(("one_pair", _plan_kernel, without, one))  # Triton specialises an argument of 1
    cases.append(
        ("repeats", _plan_kernel, signature, _constexprs(shapes["batch"], are_distinct=False))
    )
    return [(name, kernel, types, {**case, "PDL": False}) for name, kernel, types, case in cases]
