"""Attention of a step's query rows over keys and values in a paged cache: the paged op, or plain torch on a CPU."""

import torch
from torch import Tensor, nn

from routing_replay.kernels import paged_attention
from routing_replay.models.step import StepInputs

__all__ = ["ATTENTION_ROWS", "ATTENTION_SPAN", "attend", "attend_block"]

ATTENTION_ROWS = 8
"""Query rows of every call of batch-invariant attention."""

ATTENTION_SPAN = 64
"""Its key lengths are multiples of this many tokens."""


def attend(
    query: Tensor, kv_cache: Tensor, step: StepInputs, *, batch_invariant: bool = False
) -> Tensor:
    """Attend causally, every row to its own sequence.

    Args:
        query: `[T, heads, head_dim]`.
        kv_cache: `[2, num_blocks, block_size, kv_heads, head_dim]` of one layer, the step's rows written.
        step: Where the rows live. One that carries `context_lens` goes to `kernels.paged_attention`; another is laid out
            on the host, by its spans.
        batch_invariant: Make the bits of a row independent of the rows beside it.

    Returns:
        `[T, heads, head_dim]`.

    Runtime: that of `kernels.paged_attention`; by spans, no host sync, allocates the gathered keys and values, not
        CUDA-graph safe, bitwise deterministic for one shape of step, and with `batch_invariant` for one row.
    """
    if step.context_lens is not None and step.query_starts is not None:
        return paged_attention(
            query,
            kv_cache,
            block_tables=step.block_tables,
            query_starts=step.query_starts,
            context_lens=step.context_lens,
            max_query_len=step.max_query_len,
            batch_invariant=batch_invariant,
        )
    if batch_invariant:
        return _attend_rows(query, kv_cache, step)
    out = torch.empty_like(query)
    if step.num_decodes:
        out[: step.num_decodes] = _attend_decodes(query[: step.num_decodes], kv_cache, step)
    for index in range(step.num_decodes, len(step.spans)):
        span = step.spans[index]
        rows = slice(span.first_row, span.first_row + span.num_tokens)
        blocks = step.block_tables[index]
        out[rows] = _attend_chunk(query[rows], kv_cache, blocks, span.context_len)
    return out


def _attend_decodes(query: Tensor, kv_cache: Tensor, step: StepInputs) -> Tensor:
    """One query row per sequence `[B, heads, D]` against its padded context; the mask hides the padding."""
    assert step.decode_mask is not None
    widest = step.decode_mask.shape[-1] // kv_cache.shape[2]
    tables = step.block_tables[: step.num_decodes, :widest]
    # index_select copies whole blocks, several times faster than indexing with a table.
    used = kv_cache.index_select(1, tables.flatten()).unflatten(1, tables.shape)
    key, value = used.flatten(2, 3).transpose(2, 3)  # [B, kv_heads, S, D] each
    out = nn.functional.scaled_dot_product_attention(
        query.unsqueeze(2), key, value, attn_mask=step.decode_mask, enable_gqa=True
    )
    return out.squeeze(2)


def _attend_chunk(query: Tensor, kv_cache: Tensor, blocks: Tensor, context_len: int) -> Tensor:
    """The last rows `[n, heads, D]` of one sequence against its whole context, causally."""
    num_tokens, block_size = query.shape[0], kv_cache.shape[2]
    used = kv_cache.index_select(1, blocks[: -(-context_len // block_size)])
    key, value = used.flatten(1, 2)[:, :context_len].transpose(1, 2)  # [kv_heads, S, D] each
    mask = torch.ones(num_tokens, context_len, dtype=torch.bool, device=query.device)
    mask = mask.tril(diagonal=context_len - num_tokens)
    out = nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        attn_mask=mask,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1)


def _attend_rows(query: Tensor, kv_cache: Tensor, step: StepInputs) -> Tensor:
    """Every row by itself: calls of one shape for each key length, so that neither neighbours nor chunks matter."""
    block_size = kv_cache.shape[2]
    keys, values = kv_cache[0].flatten(0, 1), kv_cache[1].flatten(0, 1)
    out = torch.empty_like(query)
    rows_of: dict[int, list[tuple[int, int]]] = {}  # key length -> (row, sequence)
    for index, span in enumerate(step.spans):
        first_position = span.context_len - span.num_tokens
        for offset in range(span.num_tokens):
            length = -(-(first_position + offset + 1) // ATTENTION_SPAN) * ATTENTION_SPAN
            rows_of.setdefault(length, []).append((span.first_row + offset, index))
    for length, owners in rows_of.items():
        offsets = torch.arange(length, device=query.device)
        for low in range(0, len(owners), ATTENTION_ROWS):
            group = owners[low : low + ATTENTION_ROWS]
            padded = group + group[-1:] * (ATTENTION_ROWS - len(group))
            rows = torch.tensor([row for row, _ in padded], device=query.device)
            sequences = torch.tensor([index for _, index in padded], device=query.device)
            in_table = (offsets // block_size).clamp_max(step.block_tables.shape[1] - 1)
            slots = step.block_tables[sequences][:, in_table] * block_size + offsets % block_size
            mask = offsets <= step.positions[rows, None]
            attended = attend_block(query[rows], keys[slots], values[slots], mask)
            out[rows[: len(group)]] = attended[: len(group)]
    return out


def attend_block(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend rows, each to keys of its own.

    Args:
        query: `[R, heads, head_dim]`.
        key: `[R, S, kv_heads, head_dim]`.
        value: `[R, S, kv_heads, head_dim]`.
        mask: bool `[R, S]`, True where a row may attend.

    Returns:
        `[R, heads, head_dim]`.

    Runtime: no host sync; bitwise deterministic for one shape.
    """
    attended = nn.functional.scaled_dot_product_attention(
        query.unsqueeze(2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask[:, None, None],
        enable_gqa=True,
    )
    return attended.squeeze(2)
