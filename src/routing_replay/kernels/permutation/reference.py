"""The plan of the grouped GEMMs in plain torch."""

import torch
from torch import Tensor

from routing_replay.kernels.permutation.plan import PermutationPlan, PermutationShape
from routing_replay.kernels.routing import usable_ids

__all__ = ["plan_reference"]


def _local_ids(topk_ids: Tensor, shape: PermutationShape) -> Tensor:
    """Local experts int64 `[T * K]`; `num_local_experts` for a pair that is not computed here."""
    local = topk_ids.long() - shape.local_expert_offset
    is_here = (local >= 0) & (local < shape.num_local_experts)
    is_here &= usable_ids(topk_ids, shape.num_experts)
    return local.where(is_here, shape.num_local_experts).flatten()


def plan_reference(topk_ids: Tensor, shape: PermutationShape) -> PermutationPlan:
    """Lay out the pairs of tokens and experts for a grouped GEMM.

    Source: FlashInfer's routing metadata, at cluster granularity as in its PR #2741; ranks in token order.

    Args:
        topk_ids: `[T, K]`, integers: *global* experts. Ids outside the model, on other ranks, or repeated in a row are not
            computed.
        shape: Sizes; `num_tokens` and `top_k` are those of the ids.

    Returns:
        The plan, on the device of the ids; past the end it holds -1, no expert, and 0.

    Runtime: no host sync; allocates O(T*K*K + T*K*tile_tokens), fixed by `shape`; CUDA-graph safe; bitwise deterministic;
        no gradients.
    """
    assert topk_ids.shape == (shape.num_tokens, shape.top_k), topk_ids.shape
    device = topk_ids.device
    tile, clusters = shape.tile_tokens, shape.cluster_size
    local = _local_ids(topk_ids, shape)
    counts = torch.zeros(shape.num_local_experts + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, local, torch.ones_like(local))
    counts = counts[:-1]
    tiles = (counts + tile - 1) // tile
    tile_ends = tiles.cumsum(0)
    starts = (tile_ends - tiles) * tile

    # The rank of a pair inside its expert: how far it stands behind the expert's first in a stable sort.
    order = local.argsort(stable=True)
    sorted_local = local[order]
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])[sorted_local]
    position = torch.arange(shape.num_expanded, device=device)
    is_here = sorted_local < shape.num_local_experts
    padded_starts = torch.cat([starts, starts.new_zeros(1)])
    rows = (padded_starts[sorted_local] + position - firsts).where(is_here, -1)
    expanded = torch.empty(shape.num_expanded, dtype=torch.int32, device=device)
    expanded[order] = rows.int()

    # One more row takes what is not computed, so that no index depends on data.
    tokens = torch.full((shape.max_padded_tokens + 1,), -1, dtype=torch.int32, device=device)
    targets = rows.where(is_here, shape.max_padded_tokens)
    tokens[targets] = torch.div(order, shape.top_k, rounding_mode="floor").int()

    cta = torch.arange(shape.max_ctas, device=device)
    cta_ends = tile_ends * clusters
    batch = torch.searchsorted(cta_ends, cta, right=True)
    is_used = batch < shape.num_local_experts
    expert = batch.clamp_max(shape.num_local_experts - 1)
    limit = torch.minimum((cta + 1) * (tile // clusters), starts[expert] + counts[expert])
    return PermutationPlan(
        shape=shape,
        expanded_idx_to_permuted_idx=expanded,
        permuted_idx_to_token_idx=tokens[:-1],
        cta_idx_xy_to_batch_idx=batch.where(is_used, -1).int(),
        cta_idx_xy_to_mn_limit=limit.where(is_used, 0).int(),
        num_non_exiting_ctas=cta_ends[-1:].int(),
        total_num_padded_tokens=(tile_ends[-1:] * tile).int(),
    )
