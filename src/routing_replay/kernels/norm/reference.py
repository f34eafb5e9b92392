"""Root-mean-square norm in plain torch, with the roundings of Hugging Face's decoders."""

import torch
from torch import Tensor

__all__ = ["add_rms_norm_reference", "rms_norm_reference"]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last axis in float32, round to the dtype of `x`, then scale in that dtype.

    Args:
        x: `[..., size]`.
        weight: `[size]`.
        eps: Added to the mean square.

    Returns:
        `[..., size]`.

    Runtime: no host sync; allocates a few times `x`; CUDA-graph safe; bitwise deterministic; differentiable.
    """
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream, rounded to its dtype, and normalise the sum.

    Args:
        x: `[T, H]`.
        residual: `[T, H]`, or None for none yet.
        weight: `[H]`.
        eps: Added to the mean square.

    Returns:
        The normed rows and the sum (`x` itself without a residual), `[T, H]` each.

    Runtime: no host sync; allocates a few times `x`; CUDA-graph safe; bitwise deterministic; differentiable.
    """
    total = x if residual is None else residual + x
    return rms_norm_reference(total, weight, eps), total
