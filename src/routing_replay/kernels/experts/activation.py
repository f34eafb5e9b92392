"""Activations between the two expert GEMMs, under the names and numbers of FlashInfer's `ActivationType`."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["ActivationType", "SwigluParameters", "apply_activation"]


class ActivationType(IntEnum):
    """The function between GEMM 1 and GEMM 2; gated forms take rows `[gate; up]`."""

    Silu = 2
    """`x * sigmoid(x)`; not gated."""

    Swiglu = 3
    """`silu(gate) * up`, or with parameters `g * sigmoid(alpha * g) * (u + beta)` on clamped `g` and `u`."""

    Geglu = 4
    """`gelu(gate) * up`, with the exact (erf) gelu."""

    Relu2 = 6
    """`relu(x) ** 2`; not gated."""

    Identity = 9
    """`x`; not gated."""

    @property
    def is_gated(self) -> bool:
        """Whether GEMM 1 has `2I` output rows, `[gate; up]`, instead of `I`."""
        return self in (ActivationType.Swiglu, ActivationType.Geglu)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwigluParameters:
    """Per-expert parameters of Swiglu, each float32 `[E_local]` or None for its neutral value.

    Attributes:
        alpha: Slope inside the sigmoid; neutral value 1.
        beta: Added to `up`; neutral value 0.
        limit: `gate` is clamped to `<= limit`, `up` to `[-limit, limit]`; neutral value infinity.
    """

    alpha: Tensor | None = None
    beta: Tensor | None = None
    limit: Tensor | None = None


def _swiglu(gate: Tensor, up: Tensor, parameters: SwigluParameters, expert_idx: Tensor) -> Tensor:
    if parameters.limit is not None:
        limit = parameters.limit[expert_idx].unsqueeze(1)
        gate = torch.minimum(gate, limit)
        up = torch.maximum(torch.minimum(up, limit), -limit)
    if parameters.beta is not None:
        up = up + parameters.beta[expert_idx].unsqueeze(1)
    if parameters.alpha is None:
        return torch.nn.functional.silu(gate) * up
    return gate * torch.sigmoid(parameters.alpha[expert_idx].unsqueeze(1) * gate) * up


def apply_activation(
    x: Tensor, activation: ActivationType, parameters: SwigluParameters, expert_idx: Tensor
) -> Tensor:
    """Apply the activation in float32.

    Args:
        x: `[rows, 2I]` for gated forms, `[rows, I]` otherwise; any float dtype.
        activation: Which function.
        parameters: Per-expert parameters, used by Swiglu alone.
        expert_idx: int64 `[rows]`, local expert of each row.

    Returns:
        float32 `[rows, I]`.

    Runtime: no host sync; allocates O(rows*I); CUDA-graph safe; bitwise deterministic; differentiable in `x`.
    """
    x = x.float()
    if activation is ActivationType.Silu:
        return torch.nn.functional.silu(x)
    if not activation.is_gated:
        return torch.relu(x).square() if activation is ActivationType.Relu2 else x
    gate, up = x.chunk(2, dim=-1)
    if activation is ActivationType.Geglu:
        return torch.nn.functional.gelu(gate) * up
    return _swiglu(gate, up, parameters, expert_idx)
