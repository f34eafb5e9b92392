"""Norms, rotation and the paged cache's new rows in plain torch."""

import torch
from torch import Tensor

from routing_replay.kernels.norm.reference import rms_norm_reference

__all__ = ["norm_rotate_store_reference"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def norm_rotate_store_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """Normalise and rotate queries and keys; keys and values go into the cache; see `norm_rotate_store`.

    Args:
        qkv: `[T, (num_heads + 2 * num_kv_heads) * D]`.
        q_weight: `[D]`, or None for no norm.
        k_weight: `[D]`, or None for no norm.
        eps: Added to the mean square.
        cos: `[P, D]`.
        sin: `[P, D]`.
        positions: int64 `[T]`.
        kv_cache: `[2, num_blocks, block_size, num_kv_heads, D]`; changed in place.
        slot_mapping: int64 `[T]`, -1 for rows that are not stored.
        num_heads: Query heads.
        num_kv_heads: Key heads.

    Returns:
        Queries `[T, num_heads, D]`.

    Runtime: one host sync (whether rows are left out); allocates a few times `qkv`; not CUDA-graph safe; bitwise
        deterministic; differentiable in the query.
    """
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None:
        query = rms_norm_reference(query, q_weight, eps)
    if k_weight is not None:
        key = rms_norm_reference(key, k_weight, eps)
    angles = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    query, key = _rotate(query, *angles), _rotate(key, *angles)
    is_left_out = slot_mapping < 0
    if is_left_out.any():
        stored = ~is_left_out
        slot_mapping, key, value = slot_mapping[stored], key[stored], value[stored]
    slots = (kv_cache.shape[1] * kv_cache.shape[2], num_kv_heads, -1)
    kv_cache[0].view(slots)[slot_mapping] = key
    kv_cache[1].view(slots)[slot_mapping] = value
    return query
