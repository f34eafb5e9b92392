"""Validation of the fused-MoE arguments, before any launch and without a host sync."""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels.experts import ActivationType
from routing_replay.kernels.routing import RoutingMethod, RoutingMethodType

__all__ = [
    "MoEShape",
    "check_experts",
    "check_given_routing",
    "check_rank",
    "check_routing_logits",
    "checked_routing",
]

_MAX_INT16 = torch.iinfo(torch.int16).max
# Plain integers: torch.compile of some versions cannot follow a search among members of an enumeration.
_METHOD_NUMBERS = tuple(item.value for item in RoutingMethodType)
_ACTIVATION_NUMBERS = tuple(item.value for item in ActivationType)
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
    if int(routing_method_type) not in _METHOD_NUMBERS:
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


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOAT_DTYPES:
        raise ConfigError(
            f"{name} is {tensor.dtype}; accepted are torch.bfloat16 and torch.float32"
        )


def check_rank(hidden_states: Tensor) -> None:
    """Check that the tokens are rows, before their sizes are read.

    Args:
        hidden_states: `[T, H]`.

    Raises:
        ConfigError: Another number of dimensions.

    Runtime: host only; no sync.
    """
    if hidden_states.ndim != 2:
        raise ConfigError(
            f"hidden_states has shape {tuple(hidden_states.shape)}, expected [num_tokens, hidden_size]; flatten the tokens"
        )


def _check_rows(name: str, tensor: Tensor) -> None:
    if tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ConfigError(
            f"{name} has strides {tensor.stride()}; accepted are rows of consecutive elements: pass {name}.contiguous()"
        )


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ConfigError(
            f"{name} has strides {tensor.stride()}; accepted are contiguous tensors: pass {name}.contiguous()"
        )


def check_routing_logits(shape: MoEShape, routing_logits: Tensor, hidden_states: Tensor) -> None:
    """Check router logits against the tokens.

    Args:
        shape: The integers of the call.
        routing_logits: `[T, E]` bfloat16 or float32, rows of consecutive elements.
        hidden_states: `[T, H]`.

    Raises:
        ConfigError: Another dtype, shape, stride or device.

    Runtime: host only; no sync.
    """
    _check_dtype("routing_logits", routing_logits)
    size = (shape.num_tokens, shape.num_experts)
    _check_tensor("routing_logits", routing_logits, size, hidden_states)
    _check_rows("routing_logits", routing_logits)


def check_given_routing(
    shape: MoEShape, topk_ids: Tensor, topk_weights: Tensor | None, hidden_states: Tensor
) -> None:
    """Check given routing against the tokens.

    Args:
        shape: The integers of the call.
        topk_ids: int32 `[T, K]`, contiguous.
        topk_weights: bfloat16 or float32 `[T, K]`, contiguous; None where ids and weights are packed.
        hidden_states: `[T, H]`.

    Raises:
        ConfigError: Another dtype, shape, stride or device.

    Runtime: host only; no sync.
    """
    if topk_ids.dtype is not torch.int32:
        raise ConfigError(f"topk_ids is {topk_ids.dtype}; accepted is torch.int32")
    size = (shape.num_tokens, shape.top_k)
    _check_tensor("topk_ids", topk_ids, size, hidden_states)
    _check_contiguous("topk_ids", topk_ids)
    if topk_weights is not None:
        _check_dtype("topk_weights", topk_weights)
        _check_tensor("topk_weights", topk_weights, size, hidden_states)
        _check_contiguous("topk_weights", topk_weights)


def _check_weights(
    shape: MoEShape, activation: ActivationType, hidden_states: Tensor, weights: tuple[Tensor, Tensor]
) -> None:  # fmt: skip
    num_rows = shape.intermediate_size * (2 if activation.is_gated else 1)
    num_weights = shape.local_num_experts + shape.num_fused_shared_experts
    sizes = (
        (num_weights, num_rows, shape.hidden_size),
        (num_weights, shape.hidden_size, shape.intermediate_size),
    )
    for name, tensor, size in zip(("gemm1_weights", "gemm2_weights"), weights, sizes, strict=True):
        _check_tensor(name, tensor, size, hidden_states)
        if tensor.dtype not in (hidden_states.dtype, torch.float32):
            raise ConfigError(
                f"{name} is {tensor.dtype}, hidden_states {hidden_states.dtype}; use one dtype, or float32 weights"
            )
        _check_rows(name, tensor)
    if weights[0].dtype is not weights[1].dtype:
        raise ConfigError(
            f"gemm1_weights is {weights[0].dtype}, gemm2_weights {weights[1].dtype}; use one dtype"
        )


def check_experts(
    shape: MoEShape,
    hidden_states: Tensor,
    weights: tuple[Tensor, Tensor],
    *,
    activation_type: int,
    parameters: dict[str, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    output: Tensor | None,
    use_routing_scales_on_input: bool,
) -> None:
    """Check everything about a fused-MoE call but its routing and its replay buffers.

    Args:
        shape: The integers of the call.
        hidden_states: `[T, H]`.
        weights: `gemm1_weights` and `gemm2_weights`.
        activation_type: An `ActivationType`.
        parameters: Parameters of Swiglu by name, `[E_local]` each, or None.
        biases: `gemm1_bias` and `gemm2_bias`, or None.
        output: `[T, H]` or None.
        use_routing_scales_on_input: Whether the rows are multiplied by their weight before GEMM 1.

    Raises:
        ConfigError: A shape, dtype, stride, device or option is not accepted.

    Runtime: host only; no sync.
    """
    if int(activation_type) not in _ACTIVATION_NUMBERS:
        accepted = ", ".join(f"{item.name} ({item.value})" for item in ActivationType)
        raise ConfigError(
            f"activation_type={activation_type} is not supported; accepted are {accepted}"
        )
    activation = ActivationType(activation_type)
    if use_routing_scales_on_input and (shape.top_k > 1 or shape.num_fused_shared_experts):
        raise ConfigError(
            f"use_routing_scales_on_input with top_k={shape.top_k} and num_fused_shared_experts="
            f"{shape.num_fused_shared_experts}; accepted is one expert a token, as in Llama 4"
        )
    _check_dtype("hidden_states", hidden_states)
    _check_rows("hidden_states", hidden_states)
    _check_weights(shape, activation, hidden_states, weights)
    num_weights = shape.local_num_experts + shape.num_fused_shared_experts
    num_rows = shape.intermediate_size * (2 if activation.is_gated else 1)
    sizes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        **{name: (tensor, (num_weights,)) for name, tensor in parameters.items()},
        "gemm1_bias": (biases[0], (num_weights, num_rows)),
        "gemm2_bias": (biases[1], (num_weights, shape.hidden_size)),
    }
    for name, (tensor, size) in sizes.items():
        if tensor is None:
            continue
        _check_dtype(name, tensor)
        _check_tensor(name, tensor, size, hidden_states)
        _check_contiguous(name, tensor)
        if name in parameters and activation is not ActivationType.Swiglu:
            raise ConfigError(
                f"{name} is given but activation {activation.name} has no such parameter; pass None"
            )
    if output is not None:
        _check_tensor("output", output, (shape.num_tokens, shape.hidden_size), hidden_states)
        if output.dtype is not hidden_states.dtype:
            raise ConfigError(
                f"output is {output.dtype}, hidden_states {hidden_states.dtype}; use one dtype"
            )
        _check_rows("output", output)
