"""Paged attention in plain torch, in float32: the definition of correct."""

import torch
from torch import Tensor

__all__ = ["paged_attention_reference"]


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last n rows `[n, heads, D]` of a sequence over all of its keys `[S, kv_heads, D]`, causally, in float32."""
    num_rows, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, _ = key.shape
    grouped = query.float().view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("nhgd,shd->hgns", grouped, key.float()) * head_dim**-0.5
    is_visible = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query.device)
    is_visible = is_visible.tril(diagonal=num_keys - num_rows)
    weights = scores.masked_fill(~is_visible, float("-inf")).softmax(-1)
    return torch.einsum("hgns,shd->nhgd", weights, value.float()).reshape(query.shape)


def paged_attention_reference(
    query: Tensor,
    kv_cache: Tensor,
    *,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    batch_invariant: bool = False,
) -> Tensor:
    """Attend causally, every row to its own sequence; see `paged_attention`.

    Args:
        query: `[T, heads, D]`.
        kv_cache: `[2, num_blocks, block_size, kv_heads, D]`.
        block_tables: `[B, max_blocks]`.
        query_starts: `[B + 1]`.
        context_lens: `[B]`.
        batch_invariant: Compute every row by itself.

    Returns:
        `[T, heads, D]` in the dtype of `query`.

    Runtime: host syncs; allocates scores of one sequence at a time in float32; not CUDA-graph safe; bitwise
        deterministic; differentiable in the query.
    """
    block_size = kv_cache.shape[2]
    starts, lengths = query_starts.tolist(), context_lens.tolist()
    out = torch.zeros_like(query)
    for index, context_len in enumerate(lengths):
        low, high = starts[index], starts[index + 1]
        if low == high or context_len == 0:
            continue
        blocks = block_tables[index, : -(-context_len // block_size)].long()
        key, value = kv_cache[:, blocks].flatten(1, 2)[:, :context_len]
        step = 1 if batch_invariant else high - low
        for first in range(low, high, step):
            last = context_len - high + first + step  # keys that the piece's last row sees
            attended = _attend(query[first : first + step], key[:last], value[:last])
            out[first : first + step] = attended.to(query.dtype)
    return out
