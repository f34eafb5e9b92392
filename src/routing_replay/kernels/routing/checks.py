"""Validation of routing arguments, before any launch and without a host sync."""

import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels.routing.method import RoutingMethod, RoutingMethodType

__all__ = ["check_bias", "check_logits", "check_replay_buffer"]

_FLOAT_DTYPES = (torch.bfloat16, torch.float32)


def check_replay_buffer(
    name: str, buffer: Tensor | None, *, num_tokens: int, top_k: int, device: torch.device
) -> None:
    """Check a replay buffer in FlashInfer's order and words: dtype, rank, columns, rows, contiguity, then device.

    Args:
        name: Name of the argument, for the message.
        buffer: int16 `[>= T, K]`, contiguous, or None.
        num_tokens: T.
        top_k: K.
        device: Where it must be.

    Raises:
        ConfigError: The buffer is not as above.

    Runtime: host only; no sync.
    """
    if buffer is None:
        return
    if buffer.dtype is not torch.int16:
        raise ConfigError(
            f"{name} must be int16, got {buffer.dtype}; allocate it with dtype=torch.int16"
        )
    if buffer.ndim != 2:
        raise ConfigError(
            f"{name} must be 2D [num_tokens, top_k], got {buffer.ndim}D; pass one layer's [>= {num_tokens}, {top_k}]"
        )
    if buffer.shape[1] != top_k:
        raise ConfigError(
            f"{name} dim1 must equal top_k={top_k}, got {buffer.shape[1]}; routed experts alone have a column, fused "
            "shared ones have none"
        )
    if buffer.shape[0] < num_tokens:
        raise ConfigError(
            f"{name} dim0 must be >= num_tokens={num_tokens}, got {buffer.shape[0]}; the routing kernel uses one replay "
            f"row per token: pass {num_tokens} rows or more"
        )
    if not buffer.is_contiguous():
        raise ConfigError(
            f"{name} must be contiguous (packed row-major), got strides {buffer.stride()}; keep layers in the first axis "
            "of a cache, so that each layer's rows are packed"
        )
    if buffer.device != device:
        raise ConfigError(
            f"{name} is on {buffer.device}, expected {device}; allocate it where the router logits are"
        )


def check_logits(logits: Tensor, method: RoutingMethod) -> None:
    """Check router logits.

    Args:
        logits: `[T, E]` bfloat16 or float32, rows of consecutive elements.
        method: The method, which says E.

    Raises:
        ConfigError: Another dtype, shape or stride.

    Runtime: host only; no sync.
    """
    if logits.dtype not in _FLOAT_DTYPES:
        raise ConfigError(
            f"router_logits is {logits.dtype}; accepted are torch.bfloat16 and torch.float32"
        )
    if logits.ndim != 2 or logits.shape[1] != method.num_experts:
        raise ConfigError(
            f"router_logits has shape {tuple(logits.shape)}, expected [num_tokens, num_experts={method.num_experts}]"
        )
    if logits.shape[0] and logits.stride(1) != 1:
        raise ConfigError(
            f"router_logits has strides {logits.stride()}; accepted are rows of consecutive elements: pass "
            "router_logits.contiguous()"
        )


def check_bias(bias: Tensor | None, method: RoutingMethod, device: torch.device) -> None:
    """Check a routing bias against the method.

    Args:
        bias: `[E]` bfloat16 or float32, contiguous, or None.
        method: The method.
        device: Where it must be.

    Raises:
        ConfigError: It is given to a method that takes none, missing where one is needed, or of another form.

    Runtime: host only; no sync.
    """
    if bias is None:
        if method.type is RoutingMethodType.MiniMax2:
            raise ConfigError(
                "routing_bias is None but routing method MiniMax2 selects with one; pass it, or choose SigmoidRenorm"
            )
        return
    if not method.takes_bias:
        raise ConfigError(
            f"routing_bias is given but routing method {method.type.name} takes none; pass None"
        )
    if bias.dtype not in _FLOAT_DTYPES:
        raise ConfigError(
            f"routing_bias is {bias.dtype}; accepted are torch.bfloat16 and torch.float32"
        )
    if tuple(bias.shape) != (method.num_experts,) or not bias.is_contiguous():
        raise ConfigError(
            f"routing_bias has shape {tuple(bias.shape)} and strides {bias.stride()}, expected [{method.num_experts}], contiguous"
        )
    if bias.device != device:
        raise ConfigError(f"routing_bias is on {bias.device}, expected {device}; use one device")
