"""Validation of the fused-MoE arguments, before any launch and without a host sync."""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels.experts import ActivationType
from routing_replay.kernels.routing import RoutingMethodType

__all__ = ["MoEShape", "check_moe_arguments", "check_replay_buffer"]

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
    """

    num_tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    local_expert_offset: int
    local_num_experts: int

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


def check_replay_buffer(
    name: str, buffer: Tensor | None, shape: MoEShape, device: torch.device
) -> None:
    """Check a replay buffer in FlashInfer's order: dtype, rank, columns, rows, contiguity, device.

    Args:
        name: Name of the argument, for the message.
        buffer: int16 `[>= T, K]`, contiguous, or None.
        shape: The integers of the call.
        device: Device of `hidden_states`.

    Raises:
        ConfigError: The buffer is not as above.

    Runtime: host only; no sync.
    """
    if buffer is None:
        return
    if buffer.dtype is not torch.int16:
        raise ConfigError(f"{name} must be int16, got {buffer.dtype}")
    if buffer.ndim != 2:
        raise ConfigError(f"{name} must be 2D [num_tokens, top_k], got {buffer.ndim}D")
    if buffer.shape[1] != shape.top_k:
        raise ConfigError(f"{name} dim1 must equal top_k={shape.top_k}, got {buffer.shape[1]}")
    if buffer.shape[0] < shape.num_tokens:
        raise ConfigError(
            f"{name} dim0 must be >= num_tokens={shape.num_tokens}, got {buffer.shape[0]}; "
            "every token has one row"
        )
    if not buffer.is_contiguous():
        raise ConfigError(
            f"{name} must be contiguous (packed row-major), got strides {buffer.stride()}; pass a contiguous buffer"
        )
    if buffer.device != device:
        raise ConfigError(
            f"{name} is on {buffer.device}, hidden_states on {device}; use one device"
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


def _check_method(
    method: int, activation: int, routing_bias: Tensor | None, groups: tuple[int | None, int | None]
) -> None:
    if method not in tuple(RoutingMethodType):
        accepted = ", ".join(f"{item.name} ({item.value})" for item in RoutingMethodType)
        raise ConfigError(f"routing_method_type={method} is not supported; accepted are {accepted}")
    if activation not in tuple(ActivationType):
        accepted = ", ".join(f"{item.name} ({item.value})" for item in ActivationType)
        raise ConfigError(f"activation_type={activation} is not supported; accepted are {accepted}")
    name = RoutingMethodType(method).name
    if routing_bias is not None:
        raise ConfigError(f"routing_bias is given but routing method {name} takes none; pass None")
    for argument, value in zip(("n_group", "topk_group"), groups, strict=True):
        if value not in (None, 0, 1):
            raise ConfigError(
                f"{argument}={value} but routing method {name} has no groups; pass None"
            )


def check_moe_arguments(
    shape: MoEShape,
    routing_logits: Tensor,
    hidden_states: Tensor,
    weights: tuple[Tensor, Tensor],
    *,
    routing_method_type: int,
    activation_type: int,
    routing_bias: Tensor | None,
    groups: tuple[int | None, int | None],
    routed_scaling_factor: float | None,
    per_expert: dict[str, tuple[Tensor | None, int]],
    output: Tensor | None,
) -> None:
    """Check everything about a fused-MoE call but its replay buffers.

    Args:
        shape: The integers of the call.
        routing_logits: `[T, E]`.
        hidden_states: `[T, H]`.
        weights: `gemm1_weights` and `gemm2_weights`.
        routing_method_type: A `RoutingMethodType`.
        activation_type: An `ActivationType`.
        routing_bias: Must be None for every method that takes none.
        groups: `n_group` and `topk_group`.
        routed_scaling_factor: Must be None or 1 for every method that applies none.
        per_expert: Optional per-expert tensors by name, with the size of their second axis (0: none).
        output: `[T, H]` or None.

    Raises:
        ConfigError: A shape, dtype, device or option is not accepted.

    Runtime: host only; no sync.
    """
    _check_method(routing_method_type, activation_type, routing_bias, groups)
    if routed_scaling_factor not in (None, 1.0):
        name = RoutingMethodType(routing_method_type).name
        raise ConfigError(
            f"routed_scaling_factor={routed_scaling_factor} but routing method {name} applies none; pass None"
        )
    for name, tensor in (("routing_logits", routing_logits), ("hidden_states", hidden_states)):
        if tensor.dtype not in _FLOAT_DTYPES:
            raise ConfigError(
                f"{name} is {tensor.dtype}; accepted are torch.bfloat16 and torch.float32"
            )
    num_rows = shape.intermediate_size * (2 if ActivationType(activation_type).is_gated else 1)
    expected = (
        (shape.local_num_experts, num_rows, shape.hidden_size),
        (shape.local_num_experts, shape.hidden_size, shape.intermediate_size),
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
        size = (shape.local_num_experts, width) if width else (shape.local_num_experts,)
        _check_optional(name, tensor, size, hidden_states)
    _check_optional("output", output, (shape.num_tokens, shape.hidden_size), hidden_states)
    if output is not None and output.dtype is not hidden_states.dtype:
        raise ConfigError(
            f"output is {output.dtype}, hidden_states {hidden_states.dtype}; use one dtype"
        )
