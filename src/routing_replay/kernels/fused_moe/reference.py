"""The fused MoE in plain torch: route, run the experts, combine."""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.kernels.experts import (
    ActivationType,
    ExpertWeights,
    SwigluParameters,
    experts_reference,
)
from routing_replay.kernels.routing import RoutingMethod, route_reference, usable_ids

__all__ = ["MoEOptions", "moe_reference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEOptions:
    """What is fixed for a layer.

    Attributes:
        routing: How logits become ids and weights.
        activation: Activation between the GEMMs.
        local_expert_offset: First expert on this rank.
        batch_invariant: Make a row's bits independent of the other rows.
    """

    routing: RoutingMethod
    activation: ActivationType
    local_expert_offset: int
    batch_invariant: bool = False


def _local_ids(
    topk_ids: Tensor, num_experts: int, offset: int, num_local: int, *, is_native: bool
) -> Tensor:
    """Ids on this rank `[T, K]`, -1 where the expert lives elsewhere, is no expert, or repeats in its row."""
    if is_native and num_local == num_experts:
        return topk_ids
    local = topk_ids - offset
    is_here = (local >= 0) & (local < num_local)
    return local.where(is_here & usable_ids(topk_ids, num_experts), -1)


def moe_reference(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    weights: ExpertWeights,
    parameters: SwigluParameters,
    options: MoEOptions,
    *,
    routing_replay_out: Tensor | None,
    routing_replay_in: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything of a fused MoE but the final sum.

    Args:
        routing_logits: `[T, E]`.
        routing_bias: `[E]`, or None.
        hidden_states: `[T, H]`.
        weights: Weights of the local experts, fused shared ones last.
        parameters: Per-expert parameters of Swiglu.
        options: Routing method, activation, expert offset.
        routing_replay_out: int16 `[>= T, K]`; rows `[0, T)` are overwritten with the ids in use.
        routing_replay_in: int16 `[>= T, K]` ids to force; a row that starts with -1 routes natively.

    Returns:
        `gemm2_output` `[rows, H]`, `topk_weights` float32 `[T, K + S]`, `expanded_idx_to_permuted_idx` int32
        `[T * (K + S)]`, with S fused shared experts.

    Runtime: one host sync; allocates O(T*(E+K*(H+I))); not CUDA-graph safe; bitwise deterministic for one shape.
    """
    routing = options.routing
    topk_weights, topk_ids = route_reference(
        routing_logits, routing, routing_bias=routing_bias, routing_replay_in=routing_replay_in
    )
    if routing_replay_out is not None:
        routed = topk_ids[:, : routing.top_k]
        routing_replay_out[: len(topk_ids)] = routed.to(torch.int16)
    local_ids = _local_ids(
        topk_ids,
        routing.num_experts + routing.num_fused_shared_experts,
        options.local_expert_offset,
        weights.gemm1_weights.shape[0],
        is_native=routing_replay_in is None,
    )
    gemm2_output, permuted = experts_reference(
        hidden_states,
        local_ids,
        weights,
        options.activation,
        parameters,
        batch_invariant=options.batch_invariant,
    )
    return gemm2_output, topk_weights, permuted
