"""Bias and activation of a tile of GEMM 1 in Triton, with the roundings of the reference."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# ruff: noqa: ANN001, ANN201, ANN202
# Triton's stubs do not describe the values inside a kernel.

import triton
import triton.language as tl

from routing_replay.kernels.experts.activation import ActivationType

__all__ = ["add_bias", "gated", "plain", "rounded"]

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_SILU = tl.constexpr(int(ActivationType.Silu))
_GEGLU = tl.constexpr(int(ActivationType.Geglu))
_RELU2 = tl.constexpr(int(ActivationType.Relu2))
_HALF_ROOT = tl.constexpr(0.7071067811865476)


@triton.jit
def _silu(x, slope):
    return x / (1.0 + tl.exp(-slope))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Round float32 to `DTYPE`, to nearest even."""
    if _IS_INTERPRETED and tl.bfloat16 == DTYPE:  # it cuts the bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def add_bias(x, bias_ptr, start, column, is_column, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """Round sums as a GEMM's output is, add the bias of the columns (the first axis with SWAP, else the last), round again."""
    x = rounded(x, DTYPE).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + start + column, mask=is_column, other=0.0).to(tl.float32)
        bias = rounded(bias, DTYPE).to(tl.float32)
        x = rounded(x + tl.expand_dims(bias, 1 if SWAP else 0), DTYPE).to(tl.float32)
    return x


@triton.jit
def gated(
    gate, up, alpha_ptr, beta_ptr, clamp_ptr, expert, ACTIVATION: tl.constexpr, HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_CLAMP: tl.constexpr,
):  # fmt: skip
    """Activate a tile of gates and multiply it by its ups, all float32."""
    if ACTIVATION == _GEGLU:
        return 0.5 * gate * (1.0 + tl.erf(gate * _HALF_ROOT)) * up
    if HAS_CLAMP:
        clamp = tl.load(clamp_ptr + expert).to(tl.float32)
        # As in torch, NaN stays NaN.
        gate = tl.minimum(gate, clamp, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, clamp, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -clamp, propagate_nan=tl.PropagateNan.ALL)
    if HAS_BETA:
        up += tl.load(beta_ptr + expert).to(tl.float32)
    slope = gate
    if HAS_ALPHA:
        slope = gate * tl.load(alpha_ptr + expert).to(tl.float32)
    return _silu(gate, slope) * up


@triton.jit
def plain(x, ACTIVATION: tl.constexpr):
    """Apply an activation without a gate, or none, to a float32 tile."""
    if ACTIVATION == _SILU:
        x = _silu(x, x)
    if ACTIVATION == _RELU2:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x * x
    return x
