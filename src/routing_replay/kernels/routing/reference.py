"""Routing in plain torch: the definition that every other backend is compared with, position by position."""

import torch
from torch import Tensor

from routing_replay.kernels.routing.method import RoutingMethod, RoutingMethodType

__all__ = ["route_reference", "usable_ids"]

_TINY = 1e-20
_SOFTMAX_FIRST = (RoutingMethodType.Default, RoutingMethodType.RenormalizeNaive)
_SIGMOID_FIRST = (
    RoutingMethodType.DeepSeekV3,
    RoutingMethodType.SigmoidRenorm,
    RoutingMethodType.MiniMax2,
    RoutingMethodType.Sigmoid,
)
_SIGMOID_LAST = (RoutingMethodType.Llama4, RoutingMethodType.TopKSigmoid)


def _ranked(keys: Tensor, count: int) -> Tensor:
    """The ids of the `count` largest float32 keys of each row `[T, N]`, ties to the smaller id; int64 `[T, count]`.

    NaN counts as larger than everything, and 0.0 as equal to -0.0.
    """
    if not keys.is_cuda:
        return keys.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    # Sorts on a GPU tell -0.0 from 0.0, and one NaN from another: integers that carry the id have no ties.
    bits = (keys + 0.0).view(torch.int32).long()
    order = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    order = torch.where(keys.isnan(), torch.tensor(0x7FC00000, device=keys.device), order)
    ids = torch.arange(keys.shape[1], device=keys.device)
    return (order * (1 << 16) + (0xFFFF - ids)).topk(count, dim=-1).indices


def _candidates(keys: Tensor, method: RoutingMethod) -> Tensor:
    """Put the experts outside the best groups at minus infinity."""
    groups = keys.unflatten(1, (method.n_group, -1))
    best = _ranked_values(groups.flatten(0, 1), 2).sum(dim=-1).unflatten(0, (-1, method.n_group))
    chosen = torch.zeros_like(best, dtype=torch.bool)
    chosen.scatter_(1, _ranked(best, method.topk_group), True)
    return groups.masked_fill(~chosen.unsqueeze(2), -torch.inf).flatten(1)


def _ranked_values(keys: Tensor, count: int) -> Tensor:
    return keys.gather(1, _ranked(keys, count))


def _select(scores: Tensor, bias: Tensor | None, method: RoutingMethod) -> Tensor:
    """Ids of the experts that a row picks, int64 `[T, K]` in rank order."""
    keys = scores if bias is None or method.has_router_bias else scores + bias.float()
    if method.n_group > 1:
        keys = _candidates(keys, method)
    return _ranked(keys, method.top_k)


def _scores(logits: Tensor, method: RoutingMethod) -> Tensor:
    """What is selected on, before a selection bias, and weighted by: float32 `[T, E]`."""
    if method.type in _SOFTMAX_FIRST:
        return logits.softmax(dim=-1, dtype=torch.float32)
    if method.type in _SIGMOID_FIRST:
        return logits.float().sigmoid()
    return logits.float()


def usable_ids(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Tell which ids count: those in range that no earlier column of their row holds.

    Args:
        topk_ids: Integers `[T, K]`.
        num_experts: Experts that there are.

    Returns:
        bool `[T, K]`.

    Runtime: no host sync; allocates O(T*K*K); CUDA-graph safe; bitwise deterministic.
    """
    in_range = (topk_ids >= 0) & (topk_ids < num_experts)
    same = topk_ids.unsqueeze(2) == topk_ids.unsqueeze(1)  # [T, K, K]
    repeated = same.tril(diagonal=-1).any(dim=2)
    return in_range & ~repeated


def _weights(scores: Tensor, topk_ids: Tensor, usable: Tensor, method: RoutingMethod) -> Tensor:
    """Combine weights float32 `[T, K]` of int64 ids `[T, K]`; columns that are not `usable` get 0."""
    picked = scores.gather(1, topk_ids.where(usable, 0))
    if method.type is RoutingMethodType.Renormalize:
        picked = picked.masked_fill(~usable, -torch.inf).softmax(dim=-1)
    elif method.type in _SIGMOID_LAST:
        picked = picked.sigmoid()
    picked = picked.masked_fill(~usable, 0.0)
    if method.type is RoutingMethodType.RenormalizeNaive:
        total = picked.sum(dim=-1, keepdim=True)
        # A row without any usable id has no weight to share out; dividing would make it NaN.
        return picked / total.where(usable.any(dim=-1, keepdim=True), 1.0)
    if method.divides_by_sum:
        # All selected sigmoids can underflow to 0.
        picked = picked / (picked.sum(dim=-1, keepdim=True) + _TINY)
    return picked if method.routed_scaling_factor == 1.0 else picked * method.routed_scaling_factor


def route_reference(
    router_logits: Tensor,
    method: RoutingMethod,
    *,
    routing_bias: Tensor | None = None,
    routing_replay_in: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick experts from logits, or take given ones, and compute their combine weights.

    The arithmetic is that of Hugging Face's routers: scores and biases in float32, weights float32 to the end. Weights
    come from scores without a selection bias. NaN counts as larger than every number, ties among NaN go to the smaller id,
    and weights of such rows are NaN; ids stay in range.

    Args:
        router_logits: `[T, E]` float32 or bfloat16.
        method: How logits become ids and weights.
        routing_bias: `[E]` float32 or bfloat16, or None: added to the scores for selection alone (DeepSeekV3, MiniMax2),
            or to the logits, as the router's own bias (Renormalize, TopK, TopKSigmoid).
        routing_replay_in: `[>= T, K]` int16 ids to take instead of selecting. A row whose first id is -1 routes
            natively; in any other row an id that is out of range or repeats gets weight 0.

    Returns:
        `topk_weights` float32 `[T, K + S]` and `topk_ids` int64 `[T, K + S]`, columns in rank order (native rows) or as
        given (forced rows). Ids of forced rows are returned as given, also where they are out of range, but -1 for one
        of a fused shared expert. The last S columns are these, E to E+S-1, with weight 1.

    Runtime: no host sync; allocates O(T*E); CUDA-graph safe; bitwise deterministic; differentiable in `router_logits`.
    """
    num_tokens, num_experts = router_logits.shape
    logits = router_logits
    if routing_bias is not None and method.has_router_bias:
        logits = router_logits.float() + routing_bias.float()
    scores = _scores(logits, method)
    topk_ids = _select(scores.detach(), routing_bias, method)
    if routing_replay_in is None:
        usable = torch.ones_like(topk_ids, dtype=torch.bool)
    else:
        given = routing_replay_in[:num_tokens].long()
        topk_ids = torch.where(given[:, :1] == -1, topk_ids, given)
        # A row's shared experts have columns of their own, which a given id must not take for itself.
        is_shared = (topk_ids >= num_experts) & (
            topk_ids < num_experts + method.num_fused_shared_experts
        )
        topk_ids = topk_ids.masked_fill(is_shared, -1)
        usable = usable_ids(topk_ids, num_experts)
    weights = _weights(scores, topk_ids, usable, method)
    if not method.num_fused_shared_experts:
        return weights, topk_ids
    shared = torch.arange(
        num_experts, num_experts + method.num_fused_shared_experts, device=topk_ids.device
    )
    ones = weights.new_ones(num_tokens, method.num_fused_shared_experts)
    return torch.cat([weights, ones], 1), torch.cat([topk_ids, shared.expand(num_tokens, -1)], 1)
