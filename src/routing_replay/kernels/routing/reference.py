"""Routing in plain torch: the definition that every other backend is compared with, position by position."""

import torch
from torch import Tensor

from routing_replay.kernels.routing.method import RoutingMethodType

__all__ = ["route_reference"]


def _select(keys: Tensor, top_k: int) -> Tensor:
    """The `top_k` largest keys of each row `[T, E]`, ties to the smaller id; int64 `[T, K]`.

    A stable sort, because the order of ties in `torch.topk` is unspecified.
    """
    return keys.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def _usable(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Which columns of int64 `[T, K]` hold an id in range that no earlier column of the row holds; bool `[T, K]`."""
    in_range = (topk_ids >= 0) & (topk_ids < num_experts)
    same = topk_ids.unsqueeze(2) == topk_ids.unsqueeze(1)  # [T, K, K]
    repeated = same.tril(diagonal=-1).any(dim=2)
    return in_range & ~repeated


def _weights(
    router_logits: Tensor, topk_ids: Tensor, usable: Tensor, method: RoutingMethodType
) -> Tensor:
    """Combine weights float32 `[T, K]` of int64 ids `[T, K]`; columns that are not `usable` get 0."""
    gather_ids = topk_ids.where(usable, 0)
    if method is RoutingMethodType.Renormalize:
        selected = router_logits.float().gather(1, gather_ids).masked_fill(~usable, -torch.inf)
        return selected.softmax(dim=-1).masked_fill(~usable, 0.0)
    probs = router_logits.softmax(dim=-1, dtype=torch.float32)
    selected = probs.gather(1, gather_ids).masked_fill(~usable, 0.0)
    if method is RoutingMethodType.Default:
        return selected
    total = selected.sum(dim=-1, keepdim=True)
    # A row without any usable id has no weight to share out; dividing would make it NaN.
    return selected / total.where(usable.any(dim=-1, keepdim=True), 1.0)


def route_reference(
    router_logits: Tensor,
    top_k: int,
    method: RoutingMethodType,
    *,
    routing_replay_in: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick experts from logits, or take given ones, and compute their combine weights.

    The arithmetic is that of Hugging Face's routers: scores in float32, weights float32 to the end.

    Args:
        router_logits: `[T, E]` float32 or bfloat16.
        top_k: Experts per token, `1 <= top_k <= E`.
        method: How logits become ids and weights.
        routing_replay_in: `[>= T, K]` int16 ids to take instead of selecting. A row whose first id is -1 routes
            natively; in any other row an id that is out of range or repeats gets weight 0.

    Returns:
        `topk_weights` float32 `[T, K]` and `topk_ids` int64 `[T, K]`, columns in rank order (native rows) or as
        given (forced rows). Ids of forced rows are returned as given, also where they are out of range.

    Runtime: no host sync; allocates O(T*E); CUDA-graph safe; bitwise deterministic; differentiable in `router_logits`.
    """
    num_tokens, num_experts = router_logits.shape
    if method is RoutingMethodType.Renormalize:
        keys = router_logits.detach()
    else:
        keys = router_logits.detach().softmax(dim=-1, dtype=torch.float32)
    topk_ids = _select(keys, top_k)
    if routing_replay_in is None:
        usable = torch.ones_like(topk_ids, dtype=torch.bool)
    else:
        given = routing_replay_in[:num_tokens].long()
        topk_ids = torch.where(given[:, :1] == -1, topk_ids, given)
        usable = _usable(topk_ids, num_experts)
    return _weights(router_logits, topk_ids, usable, method), topk_ids
