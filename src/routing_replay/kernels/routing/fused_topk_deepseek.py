"""`fused_topk_deepseek` with FlashInfer's signature, validation and normalisation."""

from dataclasses import replace

import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels.routing.method import RoutingMethod, RoutingMethodType
from routing_replay.kernels.routing.reference import route_reference

__all__ = ["fused_topk_deepseek"]

_MAX_EXPERTS = {True: 384, False: 256}
_MAX_CANDIDATES = 128
_MAX_GROUP_SIZE = 32
_MAX_TOP_K = 8
_TINY = 1e-20


def fused_topk_deepseek(
    scores: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    topk: int,
    routed_scaling_factor: float,
    topk_values: Tensor,
    topk_indices: Tensor,
    launch_with_pdl: bool = True,
    routing_replay_out: Tensor | None = None,
) -> None:
    """Route as DeepSeek-V3 does, into given tensors, as FlashInfer's op of this name.

    Numerics are FlashInfer's where they differ from `route`: the weights are divided by their sum and scaled in float64,
    then rounded to the dtype of `topk_values`.

    Args:
        scores: Router logits `[T, E]`, bfloat16, float16 or float32.
        bias: Selection bias `[E]`.
        n_group: Groups, 1 to 32, a divisor of E.
        topk_group: Groups that a token may use.
        topk: Experts of a token, at most 8.
        routed_scaling_factor: Factor on the weights.
        topk_values: `[T, K]`, dtype of `scores`: receives the weights.
        topk_indices: int32 `[T, K]`: receives the ids in rank order.
        launch_with_pdl: Accepted for compatibility; there is no dependent launch here.
        routing_replay_out: int16 `[>= T, K]`, contiguous: receives the ids; later rows stay untouched.

    Raises:
        ConfigError: A tensor or value is not accepted (a `ValueError`, as in FlashInfer).

    Runtime: one launch on a GPU, where it allocates nothing; no host sync; CUDA-graph safe; bitwise deterministic; no
        gradients. On a CPU allocates O(T*E).
    """
    del launch_with_pdl
    num_tokens, num_experts = _checked_shape(scores, bias)
    _check_limits(num_experts, n_group, topk_group, topk)
    _check_outputs(scores, topk_values, topk_indices, routing_replay_out, num_tokens, topk)
    for name, tensor in (("bias", bias), ("topk_values", topk_values), ("topk_indices", topk_indices),
                         ("routing_replay_out", routing_replay_out)):  # fmt: skip
        if tensor is not None and tensor.device != scores.device:
            raise ConfigError(
                f"{name} is on {tensor.device}, expected {scores.device}; use one device"
            )
    method = RoutingMethod(
        type=RoutingMethodType.DeepSeekV3,
        num_experts=num_experts,
        top_k=topk,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=False,
    )
    if scores.is_cuda:
        from routing_replay.kernels.routing._triton import launch_route

        launch_route(
            scores,
            replace(method, routed_scaling_factor=routed_scaling_factor),
            topk_values,
            topk_indices,
            routing_bias=bias,
            routing_replay_in=None,
            routing_replay_out=routing_replay_out,
            in_float64=True,
        )
        return
    weights, ids = route_reference(scores.float(), method, routing_bias=bias.float())
    total = weights.sum(dim=-1, keepdim=True).double() + _TINY
    topk_values.copy_(weights.double() * routed_scaling_factor / total)
    topk_indices.copy_(ids)
    if routing_replay_out is not None:
        routing_replay_out[:num_tokens] = ids.to(torch.int16)


def _checked_shape(scores: Tensor, bias: Tensor) -> tuple[int, int]:
    if scores.ndim != 2 or not scores.is_contiguous():
        raise ConfigError(
            f"scores has shape {tuple(scores.shape)} and strides {scores.stride()}; accepted is [num_tokens, num_experts], "
            "contiguous"
        )
    if scores.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"scores is {scores.dtype}; accepted are bfloat16, float16 and float32")
    if not bias.is_floating_point():
        raise ConfigError(f"bias is {bias.dtype}; accepted are floating-point numbers")
    if tuple(bias.shape) != (scores.shape[1],) or not bias.is_contiguous():
        raise ConfigError(
            f"bias has shape {tuple(bias.shape)}, expected [{scores.shape[1]}], contiguous"
        )
    return scores.shape[0], scores.shape[1]


def _check_limits(num_experts: int, n_group: int, topk_group: int, topk: int) -> None:
    alone = n_group == 1
    if num_experts > _MAX_EXPERTS[alone]:
        raise ConfigError(
            f"num_experts={num_experts} with n_group={n_group}; accepted is up to {_MAX_EXPERTS[alone]}"
        )
    if not 1 <= topk <= _MAX_TOP_K:
        raise ConfigError(f"topk={topk}; accepted is 1 to {_MAX_TOP_K}")
    if topk_group > n_group or (not alone and topk_group * n_group < topk):
        raise ConfigError(
            f"topk_group={topk_group} with n_group={n_group} and topk={topk}; accepted is topk_group <= n_group and, "
            "with groups, topk_group * n_group >= topk"
        )
    size = num_experts // max(n_group, 1)
    if not alone and (size > _MAX_GROUP_SIZE or size * topk_group > _MAX_CANDIDATES):
        raise ConfigError(
            f"groups of {size} experts, {topk_group} of them picked; accepted are groups of up to {_MAX_GROUP_SIZE} and up "
            f"to {_MAX_CANDIDATES} candidates"
        )


def _check_outputs(
    scores: Tensor,
    topk_values: Tensor,
    topk_indices: Tensor,
    routing_replay_out: Tensor | None,
    num_tokens: int,
    topk: int,
) -> None:
    for name, tensor, dtype in (
        ("topk_values", topk_values, scores.dtype),
        ("topk_indices", topk_indices, torch.int32),
    ):
        if (
            tuple(tensor.shape) != (num_tokens, topk)
            or tensor.dtype is not dtype
            or not tensor.is_contiguous()
        ):
            raise ConfigError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} [{num_tokens}, {topk}], contiguous"
            )
    if routing_replay_out is None:
        return
    if routing_replay_out.dtype is not torch.int16 or not routing_replay_out.is_contiguous():
        raise ConfigError(
            f"routing_replay_out is {routing_replay_out.dtype} with strides {routing_replay_out.stride()}; expected int16, "
            "contiguous"
        )
    rows, columns = routing_replay_out.shape if routing_replay_out.ndim == 2 else (-1, -1)
    if rows < num_tokens or columns != topk:
        raise ConfigError(
            f"routing_replay_out has shape {tuple(routing_replay_out.shape)}; shape[0] must be >= {num_tokens} and shape[1] "
            f"must be {topk}"
        )
