"""Grouped GEMMs over a permutation plan in portable Triton (sm_80 on), the activation fused into the first."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels.experts._triton_combine import launch_combine
from routing_replay.kernels.experts.activation import ActivationType, SwigluParameters
from routing_replay.kernels.experts.activation_triton import add_bias, gated, plain, rounded
from routing_replay.kernels.experts.config import GemmTile
from routing_replay.kernels.experts.order_triton import tile_and_block
from routing_replay.kernels.permutation import PermutationPlan

__all__ = ["compile_cases", "launch_combine", "launch_gemm"]

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Tiles of so few tokens are the right factor of a product: wgmma and mma take 16 columns without waste, but 64 rows.
_MAX_SWAPPED_TOKENS = 64
# Tiles of tokens that share a block of weights while it is in the L2 cache.
_GROUP = 8
_LEAST_SIDE = 16
_MAX_GRID = torch.iinfo(torch.int32).max


@triton.jit
def _dot(a, b, accumulator):
    """A product with float32 sums; float32 factors keep all their bits."""
    if _IS_INTERPRETED:  # it multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _load_tile(rows_ptr, is_row, at, IN: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_DEPTH: tl.constexpr, AS_COLUMNS: tl.constexpr):  # fmt: skip
    """One step of rows, `[rows, depth]` or, as columns, `[depth, rows]`; zeros outside."""
    pointers = tl.expand_dims(rows_ptr, 0 if AS_COLUMNS else 1) + tl.expand_dims(at, 1 if AS_COLUMNS else 0)  # fmt: skip
    rows = tl.expand_dims(is_row, 0 if AS_COLUMNS else 1)
    depth = tl.expand_dims(at < IN, 1 if AS_COLUMNS else 0)
    if EVEN_ROWS and EVEN_DEPTH:
        return tl.load(pointers)
    if EVEN_DEPTH:
        return tl.load(pointers, mask=tl.broadcast_to(rows, pointers.shape), other=0.0)
    if EVEN_ROWS:
        return tl.load(pointers, mask=tl.broadcast_to(depth, pointers.shape), other=0.0)
    return tl.load(pointers, mask=rows & depth, other=0.0)


@triton.jit
def _gate_and_up(sums, ROWS: tl.constexpr, TILE: tl.constexpr, SWAP: tl.constexpr):
    """Take rows that alternate by eight apart."""
    if SWAP:
        pairs = tl.permute(tl.reshape(sums, (ROWS // 8, 2, 8, TILE)), (0, 2, 3, 1))
    else:
        pairs = tl.permute(tl.reshape(sums, (TILE, ROWS // 8, 2, 8)), (0, 1, 3, 2))
    gate, up = tl.split(pairs)
    shape: tl.constexpr = (ROWS, TILE) if SWAP else (TILE, ROWS)  # pyright: ignore[reportAssignmentType]
    return tl.reshape(gate, shape), tl.reshape(up, shape)


@triton.jit
def _gemm_kernel(
    x_ptr, weights_ptr, out_ptr, bias_ptr, alpha_ptr, beta_ptr, clamp_ptr, scales_ptr, tokens_ptr, batch_ptr, limit_ptr,
    num_ctas_ptr, x_stride, expert_stride, row_stride, out_stride,
    IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_CLAMP: tl.constexpr,
    HAS_SCALES: tl.constexpr, TILE: tl.constexpr, TILE_POW2: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, GROUP: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """One CTA for (tile of tokens, block of `ROWS` output columns).

    OUT columns come out: with IS_GATED the weights have twice as many rows, gates before ups, and ROWS of each meet here.
    """
    BLOCKS: tl.constexpr = (OUT + ROWS - 1) // ROWS
    STEPS: tl.constexpr = (IN + DEPTH - 1) // DEPTH
    EVEN_ROWS: tl.constexpr = OUT % ROWS == 0
    EVEN_DEPTH: tl.constexpr = IN % DEPTH == 0
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    pid = tl.program_id(0)
    num_tiles = tl.load(num_ctas_ptr)
    if pid >= num_tiles * BLOCKS:
        return
    tile, block = tile_and_block(pid, num_tiles, BLOCKS, GROUP)
    expert = tl.load(batch_ptr + tile).to(tl.int64)
    row = tile * TILE + tl.arange(0, TILE_POW2)
    # Padding is neither read nor written: what is in its memory may be anything.
    is_row = row < tl.load(limit_ptr + tile)
    source = row
    if GATHER:
        source = tl.load(tokens_ptr + row, mask=is_row, other=0)
    x_rows = x_ptr + source.to(tl.int64) * x_stride
    scales = tl.full((TILE_POW2,), 1.0, tl.float32)
    if HAS_SCALES:
        scales = tl.load(scales_ptr + source, mask=is_row, other=0.0)
    # Rows of gate and up alternate by eight: a thread of an mma holds both factors of a value.
    ALL_ROWS: tl.constexpr = 2 * ROWS if IS_GATED else ROWS
    index = tl.arange(0, ALL_ROWS)
    w_row = block * ROWS + (index // 16 * 8 + index % 8 if IS_GATED else index)
    is_w_row = w_row < OUT
    if IS_GATED:
        w_row += (index // 8 % 2) * OUT
    w_rows = weights_ptr + expert * expert_stride + w_row.to(tl.int64) * row_stride

    sums = tl.zeros((ALL_ROWS, TILE_POW2) if SWAP else (TILE_POW2, ALL_ROWS), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        at = step * DEPTH + tl.arange(0, DEPTH)
        x = _load_tile(x_rows, is_row, at, IN, False, EVEN_DEPTH, SWAP)
        if HAS_SCALES:
            x = rounded(x.to(tl.float32) * tl.expand_dims(scales, 0 if SWAP else 1), x_ptr.dtype.element_ty)  # fmt: skip
        x = x.to(weights_ptr.dtype.element_ty)
        weights = _load_tile(w_rows, is_w_row, at, IN, EVEN_ROWS, EVEN_DEPTH, not SWAP)
        sums = _dot(weights, x, sums) if SWAP else _dot(x, weights, sums)

    column = block * ROWS + tl.arange(0, ROWS)
    is_column = column < OUT
    if IS_GATED:
        gate, up = _gate_and_up(sums, ROWS, TILE_POW2, SWAP)
        gate = add_bias(gate, bias_ptr, expert * (2 * OUT), column, is_column, HAS_BIAS, DTYPE, SWAP)  # fmt: skip
        up = add_bias(up, bias_ptr, expert * (2 * OUT) + OUT, column, is_column, HAS_BIAS, DTYPE, SWAP)  # fmt: skip
        value = gated(gate, up, alpha_ptr, beta_ptr, clamp_ptr, expert, ACTIVATION, HAS_ALPHA, HAS_BETA, HAS_CLAMP)  # fmt: skip
    else:
        value = add_bias(sums, bias_ptr, expert * OUT, column, is_column, HAS_BIAS, DTYPE, SWAP)
        value = plain(value, ACTIVATION)
    out_rows = out_ptr + row.to(tl.int64) * out_stride
    if SWAP:
        tl.store(out_rows[None, :] + column[:, None], rounded(value, DTYPE), mask=is_row[None, :] & is_column[:, None])  # fmt: skip
    else:
        tl.store(out_rows[:, None] + column[None, :], rounded(value, DTYPE), mask=is_row[:, None] & is_column[None, :])  # fmt: skip


def _rows_of_output(tile: GemmTile, *, is_gated: bool) -> int:
    """Output columns of a CTA, after checking that Triton can cut that way."""
    rows = tile.rows // 2 if is_gated else tile.rows
    for name, side, asked in (("rows", rows, tile.rows), ("depth", tile.depth, tile.depth)):
        if side < _LEAST_SIDE or side & (side - 1):
            least = _LEAST_SIDE * 2 if is_gated and name == "rows" else _LEAST_SIDE
            raise ConfigError(
                f"{name}={asked} of a GEMM tile; accepted by the portable engine are powers of two from {least} on"
            )
    if tile.warps not in (1, 2, 4, 8, 16):
        raise ConfigError(f"warps={tile.warps} of a GEMM tile; accepted are 1, 2, 4, 8 and 16")
    return rows


def _constexprs(
    width: int,
    columns: int,
    tile_tokens: int,
    tile: GemmTile,
    *,
    gather: bool,
    activation: ActivationType | None,
    given: frozenset[str],
) -> dict[str, Any]:
    """`given` names the optional tensors that there are."""
    is_gated = activation is not None and activation.is_gated
    takes_parameters = activation is ActivationType.Swiglu
    tile_pow2 = max(_LEAST_SIDE, triton.next_power_of_2(tile_tokens))
    return {
        "IN": width,
        "OUT": columns,
        "ACTIVATION": -1 if activation is None else int(activation),
        "IS_GATED": is_gated,
        "GATHER": gather,
        "HAS_BIAS": "bias" in given,
        "HAS_ALPHA": takes_parameters and "alpha" in given,
        "HAS_BETA": takes_parameters and "beta" in given,
        "HAS_CLAMP": takes_parameters and "limit" in given,
        "HAS_SCALES": "row_scales" in given,
        "TILE": tile_tokens,
        "TILE_POW2": tile_pow2,
        "ROWS": _rows_of_output(tile, is_gated=is_gated),
        "DEPTH": tile.depth,
        "STAGES": tile.stages,
        "GROUP": _GROUP,
        "SWAP": tile_pow2 <= _MAX_SWAPPED_TOKENS,
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
    row_scales: Tensor | None,
) -> None:
    """Multiply the rows of each expert by its weights, and activate.

    Sums are float32. Each is rounded to the dtype of `out` before the bias, after it, and after the activation, as in
    `experts_reference`.

    Args:
        x: `[T, in]` with `gather`, else `[max_padded_tokens, in]`; rows of consecutive elements.
        weights: `[E_local, rows, in]`, dtype of `x` or float32; rows of consecutive elements. `rows` is twice the columns
            of `out`, gates before ups, where the activation is gated.
        out: `[max_padded_tokens, columns]`, dtype of `x`; rows of the plan's padding are not written.
        plan: Which row goes where; one CTA to a cluster.
        tile: How the GEMM is cut; its sides are powers of two.
        gather: Read row `permuted_idx_to_token_idx[r]` of `x` instead of row r.
        activation: What comes after; None for a plain GEMM.
        parameters: Per-expert parameters of Swiglu, contiguous.
        bias: `[E_local, rows]`, contiguous, or None.
        row_scales: float32 `[T]`, contiguous: factors on the rows of `x`, rounded to its dtype before the GEMM. Or None.

    Raises:
        ConfigError: The plan has clusters, the tile is no power of two, or the grid is too large.

    Runtime: one launch, none for no tokens; no sync; allocates nothing; CUDA-graph safe; bitwise deterministic, and a row's
        bits do not depend on the rows beside it; no gradients.
    """
    plan.require(tile_tokens=plan.shape.tile_tokens, cluster_size=1)
    optional = {
        "bias": bias,
        "alpha": parameters.alpha,
        "beta": parameters.beta,
        "limit": parameters.limit,
        "row_scales": row_scales,
    }
    columns = out.shape[1]
    constexprs = _constexprs(
        x.shape[1],
        columns,
        plan.shape.tile_tokens,
        tile,
        gather=gather,
        activation=activation,
        given=frozenset(name for name, tensor in optional.items() if tensor is not None),
    )
    num_programs = plan.shape.max_ctas * triton.cdiv(columns, constexprs["ROWS"])
    if num_programs > _MAX_GRID:
        raise ConfigError(
            f"{num_programs} CTAs in one launch; accepted are {_MAX_GRID}: split the tokens, or choose larger tiles"
        )
    if num_programs == 0:
        return
    _gemm_kernel[(num_programs,)](
        x,
        weights,
        out,
        *optional.values(),
        plan.permuted_idx_to_token_idx,
        plan.cta_idx_xy_to_batch_idx,
        plan.cta_idx_xy_to_mn_limit,
        plan.num_non_exiting_ctas,
        x.stride(0),
        weights.stride(0),
        weights.stride(1),
        out.stride(0),
        num_warps=tile.warps,
        **constexprs,
    )


def _signature(dtype: str, weights_dtype: str | None = None) -> dict[str, str]:
    floats = ("bias", "alpha", "beta", "clamp", "scales")
    integers = ("tokens", "batch", "limit", "num_ctas")
    return {
        "x_ptr": f"*{dtype}",
        "weights_ptr": f"*{weights_dtype or dtype}",
        "out_ptr": f"*{dtype}",
        **{f"{name}_ptr": "*fp32" for name in floats},
        **{f"{name}_ptr": "*i32" for name in integers},
        "x_stride": "i32",
        "expert_stride": "i64",
        "row_stride": "i32",
        "out_stride": "i32",
    }


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        Both GEMMs, small and large tiles, every activation, all optional tensors, sizes that no block divides, float32.
    """
    swiglu, everything = ActivationType.Swiglu, frozenset(("bias", "alpha", "beta", "limit"))
    small = GemmTile(rows=64, depth=64, stages=3, warps=4)
    large = GemmTile(rows=128, depth=32, stages=3, warps=8)
    none: frozenset[str] = frozenset()
    examples: dict[str, tuple[str, int, int, int, GemmTile, bool, ActivationType | None, frozenset[str]]] = {
        "decode_1": ("bf16", 2048, 768, 16, small, True, swiglu, none),
        "decode_2": ("bf16", 768, 2048, 16, small, False, None, none),
        "prefill_1": ("bf16", 2048, 768, 128, large, True, swiglu, none),
        "prefill_2": ("bf16", 768, 2048, 128, large, False, None, none),
        "tile_of_12": ("bf16", 2048, 768, 12, small, True, swiglu, none),
        "gpt_oss": ("bf16", 2880, 2880, 64, small, True, swiglu, everything),
        "biased_2": ("bf16", 2880, 2880, 128, large, False, None, everything),
        "odd": ("bf16", 40, 24, 16, small, True, swiglu, none),
        "odd_large": ("bf16", 40, 24, 128, large, True, ActivationType.Geglu, frozenset(("bias",))),
        "llama4": ("bf16", 5120, 8192, 64, small, True, swiglu, frozenset(("row_scales",))),
        "llama4_large": ("bf16", 5120, 8192, 128, large, True, swiglu, frozenset(("row_scales",))),
        "geglu": ("bf16", 2048, 768, 16, small, True, ActivationType.Geglu, none),
        "relu2": ("bf16", 2048, 768, 32, small, True, ActivationType.Relu2, none),
        "silu": ("bf16", 2048, 768, 32, small, True, ActivationType.Silu, none),
        "identity": ("bf16", 2048, 768, 32, small, True, ActivationType.Identity, none),
        "float32": ("fp32", 512, 256, 16, GemmTile(rows=64, depth=32, stages=2, warps=4), True, swiglu, none),
        "float32_large": ("fp32", 512, 256, 128, GemmTile(rows=64, depth=32, stages=2, warps=8), True, swiglu, none),
    }  # fmt: skip
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for name, (dtype, width, columns, tokens, tile, gather, activation, given) in examples.items():
        values = _constexprs(width, columns, tokens, tile, gather=gather, activation=activation, given=given)  # fmt: skip
        absent = {"bias_ptr": "bias", "alpha_ptr": "alpha", "beta_ptr": "beta", "clamp_ptr": "limit", "scales_ptr": "row_scales"}  # fmt: skip
        values |= {argument: None for argument, key in absent.items() if key not in given}
        cases.append((name, _gemm_kernel, _signature(dtype), values))
    wide = _constexprs(512, 256, 16, GemmTile(rows=64, depth=32, stages=2, warps=4), gather=True, activation=swiglu, given=none)  # fmt: skip
    cases.append(("wide_weights", _gemm_kernel, _signature("bf16", "fp32"), wide))
    return cases
