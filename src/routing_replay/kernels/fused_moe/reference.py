"""The fused MoE in plain torch: route, run the experts, combine."""

import torch
from torch import Tensor

from routing_replay.kernels.experts import experts_reference
from routing_replay.kernels.fused_moe.layer import ExpertsLayer
from routing_replay.kernels.routing import RoutingMethod, route_reference, usable_ids

__all__ = ["given_reference", "moe_reference", "routed_moe_reference"]

_INT16 = torch.iinfo(torch.int16)


def _run(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, usable: Tensor | None, layer: ExpertsLayer
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the experts on this rank; `usable` is None where every id counts."""
    num_local = layer.num_local_experts
    local_ids = topk_ids - layer.local_expert_offset
    if usable is not None or num_local != layer.num_experts:
        is_here = (local_ids >= 0) & (local_ids < num_local)
        local_ids = local_ids.where(is_here if usable is None else is_here & usable, -1)
    on_input = layer.use_routing_scales_on_input
    gemm2_output, permuted = experts_reference(
        hidden_states,
        local_ids,
        layer.weights,
        layer.activation,
        layer.parameters,
        row_scales=topk_weights if on_input else None,
        batch_invariant=layer.batch_invariant,
    )
    return gemm2_output, torch.ones_like(topk_weights) if on_input else topk_weights, permuted


def moe_reference(
    routing_logits: Tensor,
    hidden_states: Tensor,
    routing: RoutingMethod,
    layer: ExpertsLayer,
    *,
    routing_bias: Tensor | None,
    routing_replay_out: Tensor | None,
    routing_replay_in: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything of a fused MoE but the final sum.

    Args:
        routing_logits: `[T, E]`.
        hidden_states: `[T, H]`.
        routing: How logits become ids and weights.
        layer: The experts.
        routing_bias: `[E]`, or None.
        routing_replay_out: int16 `[>= T, K]`; rows `[0, T)` are overwritten with the ids in use.
        routing_replay_in: int16 `[>= T, K]` ids to force; a row that starts with -1 routes natively.

    Returns:
        `gemm2_output` `[rows, H]`, `topk_weights` float32 `[T, K + S]`, `expanded_idx_to_permuted_idx` int32
        `[T * (K + S)]`, with S fused shared experts.

    Runtime: one host sync; allocates O(T*(E+K*(H+I))); not CUDA-graph safe; bitwise deterministic for one shape.
    """
    topk_weights, topk_ids = route_reference(
        routing_logits, routing, routing_bias=routing_bias, routing_replay_in=routing_replay_in
    )
    if routing_replay_out is not None:
        routed = topk_ids[:, : routing.top_k]
        routing_replay_out[: len(topk_ids)] = routed.to(torch.int16)
    is_native = routing_replay_in is None
    usable = None if is_native else usable_ids(topk_ids, layer.num_experts)
    return _run(hidden_states, topk_ids, topk_weights, usable, layer)


def given_reference(topk_ids: Tensor, topk_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take ids and weights apart, where they are packed.

    Args:
        topk_ids: int32 `[T, K]`: ids, or `(id << 16) | bits of the bfloat16 weight`.
        topk_weights: `[T, K]`, any float dtype; None where they are packed.

    Returns:
        ids int32 `[T, K]` and weights float32 `[T, K]`.

    Runtime: no host sync; allocates O(T*K); CUDA-graph safe; bitwise deterministic.
    """
    if topk_weights is not None:
        return topk_ids, topk_weights.float()
    return topk_ids >> 16, (topk_ids << 16).view(torch.float32)


def routed_moe_reference(
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    hidden_states: Tensor,
    layer: ExpertsLayer,
    *,
    routing_replay_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything of a fused MoE that is given its routing, but the final sum.

    Args:
        topk_ids: int32 `[T, K]`, packed or not, as in `given_reference`.
        topk_weights: `[T, K]`, or None.
        hidden_states: `[T, H]`.
        layer: The experts.
        routing_replay_out: int16 `[>= T, K]`; rows `[0, T)` are overwritten with the ids as given, -1 for one that is no int16.

    Returns:
        As `moe_reference`; weights of ids that do not count are 0.

    Runtime: as `moe_reference`.
    """
    ids, weights = given_reference(topk_ids, topk_weights)
    if routing_replay_out is not None:
        fits = (ids >= _INT16.min) & (ids <= _INT16.max)
        routing_replay_out[: len(ids)] = ids.where(fits, -1).to(torch.int16)
    usable = usable_ids(ids, layer.num_experts)
    weights = weights.where(usable, 0.0)
    return _run(hidden_states, ids.long(), weights, usable, layer)
