"""Validation of the fused-MoE arguments, before any launch and without a host sync."""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels.experts import ActivationType
from routing_replay.kernels.routing import RoutingMethod, RoutingMethodType

__all__ = ["MoEShape", "check_moe_arguments", "checked_routing"]

_MAX_INT16 = torch.iinfo(torch.int16).max
_FLOAT_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """The integers of a fused-MoE call.

    Attributes:
        num_tokens: T.
        num_experts: E, experts of the model.
        top_k: K.
        hidden_size: H.
        intermediate_size: I, of one expert.
        local_expert_offset: First expert on this rank.
        local_num_experts: Experts on this rank.
        num_fused_shared_experts: S, experts that every token goes to, beside the E routed ones.
    """

    num_tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    local_expert_offset: int
    local_num_experts: int
    num_fused_shared_experts: int = 0

    def __post_init__(self) -> None:
        """Check the integers against each other."""
        if not 0 < self.num_experts <= _MAX_INT16:
            raise ConfigError(
                f"num_experts={self.num_experts} is outside [1, {_MAX_INT16}]; replay buffers hold int16 ids"
            )
        if not 0 < self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k={self.top_k} is outside [1, num_experts={self.num_experts}]; pass the model's own values"
            )
        end = self.local_expert_offset + self.local_num_experts
        if self.local_expert_offset < 0 or self.local_num_experts < 1 or end > self.num_experts:
            raise ConfigError(
                f"local_expert_offset={self.local_expert_offset} and local_num_experts={self.local_num_experts} "
                f"name experts [{self.local_expert_offset}, {end}); accepted is a part of [0, {self.num_experts})"
            )
        if self.num_fused_shared_experts and self.local_num_experts != self.num_experts:
            raise ConfigError(
                f"num_fused_shared_experts={self.num_fused_shared_experts} with {self.local_num_experts} of "
                f"{self.num_experts} experts on this rank; accepted is 0, or all experts on one rank"
            )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.device != like.device:
        raise ConfigError(
            f"{name} is on {tensor.device}, hidden_states on {like.device}; use one device"
        )


def _check_optional(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor is not None:
        _check_tensor(name, tensor, shape, like)


def checked_routing(
    shape: MoEShape,
    *,
    routing_method_type: int,
    groups: tuple[int | None, int | None],
    routed_scaling_factor: float | None,
    norm_topk_prob: bool,
) -> RoutingMethod:
    """Put the routing arguments of a fused-MoE call together.

    Args:
        shape: The integers of the call.
        routing_method_type: A `RoutingMethodType`.
        groups: `n_group` and `topk_group`; None, 0 and 1 mean none.
        routed_scaling_factor: Factor on the weights; None means 1.
        norm_topk_prob: As in `RoutingMethod`.

    Returns:
        The method.

    Raises:
        ConfigError: A value is not accepted.

    Runtime: host only; no sync.
    """
    if routing_method_type not in tuple(RoutingMethodType):
        accepted = ", ".join(f"{item.name} ({item.value})" for item in RoutingMethodType)
        raise ConfigError(
            f"routing_method_type={routing_method_type} is not supported; accepted are {accepted}"
        )
    return RoutingMethod(
        type=RoutingMethodType(routing_method_type),
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        n_group=groups[0] or 1,
        topk_group=groups[1] or 1,
        routed_scaling_factor=1.0 if routed_scaling_factor is None else routed_scaling_factor,
        norm_topk_prob=norm_topk_prob,
        num_fused_shared_experts=shape.num_fused_shared_experts,
    )


def check_moe_arguments(
    shape: MoEShape,
    routing_logits: Tensor,
    hidden_states: Tensor,
    weights: tuple[Tensor, Tensor],
    *,
    activation_type: int,
    per_expert: dict[str, tuple[Tensor | None, int]],
    output: Tensor | None,
) -> None:
    """Check everything about a fused-MoE call but its replay buffers.

    Args:
        shape: The integers of the call.
        routing_logits: `[T, E]`.
        hidden_states: `[T, H]`.
        weights: `gemm1_weights` and `gemm2_weights`.
        activation_type: An `ActivationType`.
        per_expert: Optional per-expert tensors by name, with the size of their second axis (0: none).
        output: `[T, H]` or None.

    Raises:
        ConfigError: A shape, dtype, device or option is not accepted.

    Runtime: host only; no sync.
    """
    if activation_type not in tuple(ActivationType):
        accepted = ", ".join(f"{item.name} ({item.value})" for item in ActivationType)
        raise ConfigError(
            f"activation_type={activation_type} is not supported; accepted are {accepted}"
        )
    for name, tensor in (("routing_logits", routing_logits), ("hidden_states", hidden_states)):
        if tensor.dtype not in _FLOAT_DTYPES:
            raise ConfigError(
                f"{name} is {tensor.dtype}; accepted are torch.bfloat16 and torch.float32"
            )
    num_rows = shape.intermediate_size * (2 if ActivationType(activation_type).is_gated else 1)
    num_weights = shape.local_num_experts + shape.num_fused_shared_experts
    expected = (
        (num_weights, num_rows, shape.hidden_size),
        (num_weights, shape.hidden_size, shape.intermediate_size),
    )
    _check_tensor(
        "routing_logits", routing_logits, (shape.num_tokens, shape.num_experts), hidden_states
    )
    for name, tensor, size in zip(
        ("gemm1_weights", "gemm2_weights"), weights, expected, strict=True
    ):
        _check_tensor(name, tensor, size, hidden_states)
        if tensor.dtype not in (hidden_states.dtype, torch.float32):
            raise ConfigError(
                f"{name} is {tensor.dtype}, hidden_states {hidden_states.dtype}; use one dtype, or float32 weights"
            )
    for name, (tensor, width) in per_expert.items():
        size = (num_weights, width) if width else (num_weights,)
        _check_optional(name, tensor, size, hidden_states)
    _check_optional("output", output, (shape.num_tokens, shape.hidden_size), hidden_states)
    if output is not None and output.dtype is not hidden_states.dtype:
        raise ConfigError(
            f"output is {output.dtype}, hidden_states {hidden_states.dtype}; use one dtype"
        )
