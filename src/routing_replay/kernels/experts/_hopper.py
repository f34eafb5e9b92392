"""Grouped GEMMs for Hopper in Gluon: weights by TMA as the left operand of wgmma, tokens as its columns."""

# pyright: basic, reportAssignmentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from routing_replay.kernels.experts.activation import ActivationType, SwigluParameters
from routing_replay.kernels.experts.config import GemmTile
from routing_replay.kernels.experts.order_triton import tile_and_block
from routing_replay.kernels.permutation import PermutationPlan, PermutationShape

__all__ = ["compile_cases", "launch_gemm"]

# Gluon is experimental: what Triton 3.6 calls by the second name has the first one later.
_load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

# Rows of gate and of up alternate by eight: wgmma gives a thread rows r and r + 8, so both factors of a value meet in it.
_PAIR = gl.constexpr(8)
_ALL = gl.constexpr(tl.PropagateNan.ALL)
_GEGLU = gl.constexpr(int(ActivationType.Geglu))
_RELU2 = gl.constexpr(int(ActivationType.Relu2))
_SILU = gl.constexpr(int(ActivationType.Silu))


@gluon.jit
def _sigmoid(x):
    return gl.fdiv(1.0, 1.0 + gl.exp2(x * -1.4426950408889634))


@gluon.jit
def _load_weights(
    w_desc, bars, w_smem, step, slot, expert, block, pred, GATED: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr,
    BYTES: gl.constexpr,
):  # fmt: skip
    """Start one step's weights; `BYTES` counts what the barrier waits for beside cp.async."""
    bar = bars.index(slot)
    mbarrier.expect(bar, BYTES, pred=pred)
    if GATED:
        coord = [expert, block * (ROWS // 16), 0, 0, step * DEPTH]
    else:
        coord = [expert, block * ROWS, step * DEPTH]
    _load_box(w_desc, coord, bar, w_smem.index(slot), pred=pred)


@gluon.jit
def _load_tokens(
    x, bars, x_smem, step, slot, x_rows, first_row, GATHER: gl.constexpr, USED: gl.constexpr, BOX: gl.constexpr,
    DEPTH: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start one step's tokens: gathered rows by cp.async of all threads, rows that follow each other by TMA."""
    bar = bars.index(slot)
    if GATHER:
        column = step * DEPTH + gl.arange(0, DEPTH, layout=gl.SliceLayout(0, LAYOUT))
        pointers = x + x_rows[:, None] + column[None, :]
        target = x_smem.index(slot).slice(0, USED, 0)
        if WIDTH % DEPTH == 0:
            _load_rows(target, pointers)
        else:
            # Columns past the end meet weights of zero, which a NaN would survive.
            mask = gl.max_constancy((column < WIDTH)[None, :], [1, 8])
            _load_rows(target, pointers, mask=mask)
        async_copy.mbarrier_arrive(bar, increment_count=False)
    else:
        for part in gl.static_range(USED // BOX):
            target = x_smem.index(slot).slice(part * BOX, BOX, 0)
            _load_box(x, [first_row + part * BOX, step * DEPTH], bar, target)


@gluon.jit
def _gated(acc, optional, expert, block, ACTIVATION: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr,
           COLUMNS: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """Rows of gate and up by eights, float32 `[ROWS, TILE]`, to activated `[ROWS / 2, TILE]`."""
    bias_ptr, alpha_ptr, beta_ptr, clamp_ptr = optional
    gate, up = acc.reshape([ROWS // 16, 2, _PAIR, TILE]).permute([0, 2, 3, 1]).split()
    # The reference rounds what a GEMM gives before anything else sees it.
    gate = gate.reshape([ROWS // 2, TILE]).to(DTYPE).to(gl.float32)
    up = up.reshape([ROWS // 2, TILE]).to(DTYPE).to(gl.float32)
    if bias_ptr is not None:
        row = block * (ROWS // 2) + gl.arange(
            0, ROWS // 2, layout=gl.SliceLayout(1, gate.type.layout)
        )
        at = bias_ptr + expert.to(gl.int64) * (2 * COLUMNS) + row
        gate_bias = gl.load(at, mask=row < COLUMNS, other=0.0).to(DTYPE).to(gl.float32)
        up_bias = gl.load(at + COLUMNS, mask=row < COLUMNS, other=0.0).to(DTYPE).to(gl.float32)
        gate = (gate + gate_bias[:, None]).to(DTYPE).to(gl.float32)
        up = (up + up_bias[:, None]).to(DTYPE).to(gl.float32)
    if ACTIVATION == _GEGLU:
        value = 0.5 * gate * (1.0 + gl.erf(gate * 0.7071067811865476)) * up
    else:
        if clamp_ptr is not None:
            limit = gl.load(clamp_ptr + expert).to(gl.float32)
            # As in torch, NaN stays NaN.
            gate = gl.minimum(gate, limit, propagate_nan=_ALL)
            up = gl.maximum(gl.minimum(up, limit, propagate_nan=_ALL), -limit, propagate_nan=_ALL)
        if beta_ptr is not None:
            up = up + gl.load(beta_ptr + expert).to(gl.float32)
        slope = gate
        if alpha_ptr is not None:
            slope = gate * gl.load(alpha_ptr + expert).to(gl.float32)
        value = gate * _sigmoid(slope) * up
    return value


@gluon.jit
def _plain(acc, bias_ptr, expert, block, ACTIVATION: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
           DTYPE: gl.constexpr):  # fmt: skip
    """Bias and an activation without a gate, or neither, on float32 `[ROWS, TILE]`."""
    value = acc.to(DTYPE).to(gl.float32)
    if bias_ptr is not None:
        row = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, value.type.layout))
        bias = gl.load(
            bias_ptr + expert.to(gl.int64) * COLUMNS + row, mask=row < COLUMNS, other=0.0
        )
        value = (value + bias.to(DTYPE).to(gl.float32)[:, None]).to(DTYPE).to(gl.float32)
    if ACTIVATION == _RELU2:
        value = gl.maximum(value, 0.0, propagate_nan=_ALL)
        value = value * value
    if ACTIVATION == _SILU:
        value = value * _sigmoid(value)
    return value


@gluon.jit
def _store(
    value, out_ptr, first_row, block, limit, ROWS: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Store `[ROWS, TILE]` transposed: row t of the tile, columns from `block * ROWS` on."""
    lanes: gl.constexpr = min(ROWS // 8, 16)
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, gl.num_warps()], [0, 1])  # fmt: skip
    rounded = gl.convert_layout(value.to(DTYPE), layout)
    column = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    row = first_row + gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
    at = out_ptr + row.to(gl.int64)[None, :] * COLUMNS + column[:, None]
    gl.store(at, rounded, mask=(column < COLUMNS)[:, None] & (row < limit)[None, :])


@gluon.jit
def _multiply(
    shared,
    ACTIVATION: gl.constexpr, GATED: gl.constexpr, GATHER: gl.constexpr, COLUMNS: gl.constexpr, WIDTH: gl.constexpr,
    ROWS: gl.constexpr, TILE: gl.constexpr, BOX: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr, USED: gl.constexpr,
):  # fmt: skip
    """The first `USED` rows of a tile times a block of weight rows."""
    w_desc, x, out_ptr, tokens_ptr, w_smem, x_smem, bars, tile, block, expert, limit, x_pitch, optional = shared  # fmt: skip
    DTYPE: gl.constexpr = w_desc.dtype
    STEPS: gl.constexpr = (WIDTH + DEPTH - 1) // DEPTH
    OUT_ROWS: gl.constexpr = ROWS // 2 if GATED else ROWS
    W_BYTES: gl.constexpr = ROWS * DEPTH * 2
    BYTES: gl.constexpr = W_BYTES if GATHER else W_BYTES + USED * DEPTH * 2
    X_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    for early in gl.static_range(min(STAGES - 1, STEPS)):
        _load_weights(
            w_desc, bars, w_smem, early, early, expert, block, True, GATED, ROWS, DEPTH, BYTES
        )
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    first_row = tile * TILE
    x_rows = gl.arange(0, USED, layout=gl.SliceLayout(1, X_LAYOUT))
    if GATHER:
        token = gl.load(tokens_ptr + first_row + x_rows)
        # Padding computes the first token once more; nothing reads what it gives.
        x_rows = gl.maximum(token, 0).to(gl.int64) * (x_pitch * 8)
    for early in gl.static_range(min(STAGES - 1, STEPS)):
        _load_tokens(
            x, bars, x_smem, early, early, x_rows, first_row, GATHER, USED, BOX, DEPTH, WIDTH, X_LAYOUT,
        )  # fmt: skip

    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, USED, 16])
    sums = gl.zeros([ROWS, USED], gl.float32, layout=SUMS)
    for step in range(STEPS):
        slot = step % STAGES
        mbarrier.wait(bars.index(slot), (step // STAGES) & 1)
        if GATHER:
            # cp.async wrote through the generic proxy, wgmma reads through the asynchronous one.
            fence_async_shared()
        weights = w_smem.index(slot).reshape([ROWS, DEPTH])
        tokens = x_smem.index(slot).slice(0, USED, 0).permute([1, 0])
        sums = warpgroup_mma(weights, tokens, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        # The step before is done in every warp: its slot may be filled again.
        _barrier()
        ahead = step + STAGES - 1
        has_more = ahead < STEPS
        free = ahead % STAGES
        _load_weights(
            w_desc, bars, w_smem, ahead, free, expert, block, has_more, GATED, ROWS, DEPTH, BYTES
        )
        if has_more:
            _load_tokens(
                x, bars, x_smem, ahead, free, x_rows, first_row, GATHER, USED, BOX, DEPTH, WIDTH, X_LAYOUT,
            )  # fmt: skip
    sums = warpgroup_mma_wait(0, deps=(sums,))
    if GATED:
        value = _gated(sums, optional, expert, block, ACTIVATION, ROWS, USED, COLUMNS, DTYPE)
    else:
        value = _plain(sums, optional[0], expert, block, ACTIVATION, ROWS, COLUMNS, DTYPE)
    _store(value, out_ptr, first_row, block, limit, OUT_ROWS, USED, COLUMNS, DTYPE)


@gluon.jit
def _gemm_kernel(
    w_desc, x, out_ptr, tokens_ptr, batch_ptr, limit_ptr, num_ctas_ptr, bias_ptr, alpha_ptr, beta_ptr, clamp_ptr,
    x_pitch,
    ACTIVATION: gl.constexpr, GATED: gl.constexpr, GATHER: gl.constexpr, BLOCKS: gl.constexpr, COLUMNS: gl.constexpr,
    WIDTH: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, BOX: gl.constexpr, DEPTH: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One CTA for (tile of tokens, block of weight rows), in the order of `tile_and_block`.

    BOX: rows of tokens of one TMA copy; a tile of two whose second is all padding is multiplied without it. EARLY: the plan
    was ready before the kernel ahead began, so weights may be loaded while it still runs.
    """
    DTYPE: gl.constexpr = w_desc.dtype
    X_SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)  # fmt: skip
    tile = gl.program_id(0) // BLOCKS
    block = gl.program_id(0) % BLOCKS
    ring: gl.constexpr = [STAGES] + w_desc.block_shape  # noqa: RUF005 -- Gluon does not unpack
    w_smem = gl.allocate_shared_memory(DTYPE, ring, w_desc.layout)
    x_smem = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, DEPTH], X_SHARED)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(STAGES):
        mbarrier.init(bars.index(index), count=1 + gl.num_warps() * 32 if GATHER else 1)
    fence_async_shared()
    if not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    num_tiles = gl.load(num_ctas_ptr)
    if tile >= num_tiles:
        # The end of this kernel stands for the end of those ahead, also where it has nothing to do.
        gdc_wait()
        return
    if GROUP > 1:
        tile, block = tile_and_block(gl.program_id(0), num_tiles, BLOCKS, GROUP)
    expert = gl.load(batch_ptr + tile)
    limit = gl.load(limit_ptr + tile)
    optional = (bias_ptr, alpha_ptr, beta_ptr, clamp_ptr)
    shared = (w_desc, x, out_ptr, tokens_ptr, w_smem, x_smem, bars, tile, block, expert, limit, x_pitch, optional)  # fmt: skip
    if BOX == TILE:
        _multiply(
            shared, ACTIVATION, GATED, GATHER, COLUMNS, WIDTH, ROWS, TILE, BOX, DEPTH, STAGES, EARLY, TILE,
        )  # fmt: skip
    else:  # noqa: PLR5501 -- one branch is chosen at compile time, the other on the device
        if limit - tile * TILE > BOX:
            _multiply(
                shared, ACTIVATION, GATED, GATHER, COLUMNS, WIDTH, ROWS, TILE, BOX, DEPTH, STAGES, EARLY, TILE,
            )  # fmt: skip
        else:
            _multiply(
                shared, ACTIVATION, GATED, GATHER, COLUMNS, WIDTH, ROWS, TILE, BOX, DEPTH, STAGES, EARLY, BOX,
            )  # fmt: skip


_SWIZZLED_BYTES = 128
_SPLIT_TOKENS = 32
_GROUP = 8
_GROUPED_TILES = 4
_CACHED_BYTES = (
    24 << 20
)  # of one expert's weights, which half of an H100's L2 cache holds from tile to tile


def _weight_view(
    num_experts: int, num_rows: int, width: int, tile: GemmTile, *, is_gated: bool
) -> tuple[list[int], list[int], list[int]]:
    """Shape, strides and block of `[E_local, rows, in]`; gated rows alternate eight of gate with eight of up."""
    if not is_gated:
        return [num_experts, num_rows, width], [num_rows * width, width, 1], [1, tile.rows, tile.depth]  # fmt: skip
    half = num_rows // 2
    return (
        [num_experts, half // _PAIR.value, 2, _PAIR.value, width],
        [num_rows * width, _PAIR.value * width, half * width, width, 1],
        [1, tile.rows // (2 * _PAIR.value), 2, _PAIR.value, tile.depth],
    )


def _swizzled(rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=_SWIZZLED_BYTES, element_bitwidth=16, rank=rank)


def _box(tile_tokens: int) -> int:
    """Rows of tokens that are left out together where all are padding."""
    return tile_tokens // 2 if tile_tokens >= _SPLIT_TOKENS else tile_tokens


def _group(plan_shape: PermutationShape, expert_bytes: int) -> int:
    """Tiles that share a block of weights: some where an expert has many, or several and weights that no cache holds."""
    tiles = plan_shape.num_expanded / plan_shape.num_experts / plan_shape.tile_tokens
    least = 1 if expert_bytes > _CACHED_BYTES else _GROUPED_TILES
    return _GROUP if tiles >= least else 1


def _constexprs(
    width: int,
    columns: int,
    tile_tokens: int,
    tile: GemmTile,
    *,
    gather: bool,
    activation: ActivationType | None,
    early: bool,
    group: int = 1,
) -> dict[str, Any]:
    is_gated = activation is not None and activation.is_gated
    per_block = tile.rows // 2 if is_gated else tile.rows
    return {
        "ACTIVATION": -1 if activation is None else int(activation),
        "GATED": is_gated,
        "GATHER": gather,
        "BLOCKS": -(-columns // per_block),
        "COLUMNS": columns,
        "WIDTH": width,
        "ROWS": tile.rows,
        "TILE": tile_tokens,
        "BOX": _box(tile_tokens),
        "DEPTH": tile.depth,
        "STAGES": tile.stages,
        "EARLY": early,
        "GROUP": group,
    }


def launch_gemm(
    x: Tensor,
    weights: Tensor,
    out: Tensor,
    plan: PermutationPlan,
    *,
    tile: GemmTile,
    gather: bool,
    activation: ActivationType | None,
    parameters: SwigluParameters,
    bias: Tensor | None,
    overlap: bool = False,
) -> None:
    """Multiply the rows of each expert by its weights.

    Roundings are those of `experts_reference`. Source: the swap of factors and the early weights of small batches follow
    TensorRT-LLM's and FlashInfer's low-latency kernels; code and layout are ours.

    Args:
        x: bfloat16 `[T, in]` (`gather`) or `[max_padded_tokens, in]`, contiguous.
        weights: bfloat16 `[E_local, rows, in]`, contiguous; rows `[gate; up]` under a gated activation.
        out: bfloat16 `[max_padded_tokens, columns]`, contiguous: rows in use are overwritten, padding is not.
        plan: Which rows are whose; its tile is that of both GEMMs.
        tile: How the weights are cut.
        gather: Read rows of `x` through the plan (GEMM 1).
        activation: What follows; None for GEMM 2.
        parameters: Of Swiglu, per expert.
        bias: `[E_local, rows]`, contiguous, or None.
        overlap: Launch as a programmatic dependent of the kernel ahead, which must wait for its own predecessors before it
            lets this one start. GEMM 2 then reads the plan, and loads weights, before GEMM 1 ends.

    Runtime: one launch, none for no tokens; no sync; allocates nothing on the device; CUDA-graph safe; bitwise deterministic,
        and a row's bits do not depend on the rows beside it; no gradients. sm_90 alone.
    """
    tile_tokens = plan.shape.tile_tokens
    plan.require(tile_tokens=tile_tokens, cluster_size=1)
    if plan.shape.max_ctas == 0:
        return
    constexprs = _constexprs(
        x.shape[1], out.shape[1], tile_tokens, tile, gather=gather, activation=activation, early=overlap and not gather,
        group=_group(plan.shape, weights[0].nbytes),
    )  # fmt: skip
    is_gated = constexprs["GATED"]
    shape, strides, block = _weight_view(*weights.shape, tile, is_gated=is_gated)
    tokens = x
    if not gather:
        box = [constexprs["BOX"], tile.depth]
        tokens = TensorDescriptor(x, list(x.shape), list(x.stride()), box, _swizzled(2))
    takes_parameters = activation is ActivationType.Swiglu
    _gemm_kernel[(plan.shape.max_ctas * constexprs["BLOCKS"],)](
        TensorDescriptor(weights, shape, strides, block, _swizzled(len(shape))),
        tokens,
        out,
        plan.permuted_idx_to_token_idx,
        plan.cta_idx_xy_to_batch_idx,
        plan.cta_idx_xy_to_mn_limit,
        plan.num_non_exiting_ctas,
        bias,
        parameters.alpha if takes_parameters else None,
        parameters.beta if takes_parameters else None,
        parameters.limit if takes_parameters else None,
        # In eights, so that the compiler knows rows to start at multiples of 16 bytes.
        x.stride(0) // 8,
        num_warps=tile.warps,
        launch_pdl=overlap,
        **constexprs,
    )


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs, warps).

    Returns:
        Both GEMMs, every tile of tokens, every activation, all optional tensors, sizes that no block divides.
    """
    swiglu = ActivationType.Swiglu
    small, deep = GemmTile(rows=64, depth=64, stages=9, warps=4), GemmTile(rows=128, depth=128, stages=3, warps=4)  # fmt: skip
    large = GemmTile(rows=256, depth=64, stages=4, warps=8)
    examples: dict[str, tuple[int, int, int, GemmTile, bool, ActivationType | None, bool]] = {
        "decode_1": (2048, 768, 16, small, True, swiglu, False),
        "decode_2": (768, 2048, 16, deep, False, None, False),
        "medium_1": (2048, 768, 64, deep, True, swiglu, False),
        "prefill_1": (2048, 768, 128, large, True, swiglu, False),
        "prefill_2": (768, 2048, 128, large, False, None, False),
        "gpt_oss_1": (2880, 2880, 32, small, True, swiglu, True),
        "gpt_oss_2": (2880, 2880, 128, large, False, None, True),
        "odd": (200, 136, 16, small, True, swiglu, False),
        "geglu": (2048, 768, 16, small, True, ActivationType.Geglu, True),
        "relu2": (2688, 1856, 32, small, True, ActivationType.Relu2, True),
        "silu": (2048, 768, 32, small, True, ActivationType.Silu, False),
        "identity": (2048, 768, 32, small, True, ActivationType.Identity, False),
    }
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any], int]] = []
    for name, (width, columns, tokens, tile, gather, activation, has_all) in examples.items():
        group = _GROUP if tile is large else 1
        values = _constexprs(
            width, columns, tokens, tile, gather=gather, activation=activation, early=not gather, group=group
        )  # fmt: skip
        _, _, block = _weight_view(8, columns * (1 + values["GATED"]), width, tile, is_gated=values["GATED"])  # fmt: skip
        box = [values["BOX"], tile.depth]
        optional = {f"{name}_ptr": "*fp32" for name in ("bias", "alpha", "beta", "clamp")}
        if not has_all:
            values |= dict.fromkeys(optional)
        signature = {
            "w_desc": f"tensordesc<bf16{block},{_swizzled(len(block))!r}>",
            "x": "*bf16" if gather else f"tensordesc<bf16{box},{_swizzled(2)!r}>",
            "out_ptr": "*bf16",
            **{f"{name}_ptr": "*i32" for name in ("tokens", "batch", "limit", "num_ctas")},
            **optional,
            "x_pitch": "i32",
        }
        cases.append((name, _gemm_kernel, signature, values, tile.warps))
    return cases
