"""Paged attention of rows of any number per sequence as one Triton kernel, and the choice of launches."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from routing_replay.kernels.attention._triton_decode import launch_decode
from routing_replay.kernels.attention.keys_triton import attend_keys, load_blocks
from routing_replay.kernels.attention.tiles import (
    AttentionTile,
    choose_decode_tile,
    choose_prefill_tile,
    choose_splits,
)

__all__ = ["compile_cases", "launch_paged_attention", "launch_prefill"]

_LOG2_E = 1.4426950408889634
_SEQUENCES_AT_ONCE = 128


@triton.jit
def _sequence_of(
    query_starts_ptr, tile, num_sequences, BLOCK_Q: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Sequence of a tile; rows past the last sequence count as one more."""
    sequence = tl.full((), -1, tl.int32)
    first = tl.full((), 0, tl.int32)
    while first <= num_sequences:
        index = first + tl.arange(0, AT_ONCE)
        is_sequence = index <= num_sequences
        starts = tl.load(query_starts_ptr + index, mask=is_sequence, other=0).to(tl.int32)
        is_before = is_sequence & (starts // BLOCK_Q + index <= tile)
        sequence += tl.sum(is_before.to(tl.int32), axis=0)
        first += AT_ONCE
    return sequence


@triton.jit(
    # One binary for all steps: a row's bits may not depend on what else is in the step.
    do_not_specialize=["num_rows", "num_sequences", "table_width"],
    do_not_specialize_on_alignment=["block_tables_ptr", "query_starts_ptr", "context_lens_ptr"],
)
def _prefill_kernel(
    query_ptr,
    kv_cache_ptr,
    block_tables_ptr,
    query_starts_ptr,
    context_lens_ptr,
    out_ptr,
    scale,
    value_offset,
    num_rows,
    num_sequences,
    table_width,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`BLOCK_M // GROUP` rows of one sequence, with all heads of one KV head.

    ONE_LOOP: every block of keys is masked, so that a row meets the same instructions whatever rows are beside it.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # The last rows of a sequence see most keys, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _sequence_of(query_starts_ptr, tile, num_sequences, BLOCK_Q, AT_ONCE)
    is_sequence = sequence < num_sequences
    start = tl.load(query_starts_ptr + sequence).to(tl.int32)
    end = tl.load(query_starts_ptr + sequence + 1, mask=is_sequence, other=0).to(tl.int32)
    end = tl.where(is_sequence, end, num_rows)
    context = tl.load(context_lens_ptr + sequence, mask=is_sequence, other=0).to(tl.int32)
    first_row = start + (tile - start // BLOCK_Q - sequence) * BLOCK_Q
    if first_row >= end:
        return

    member = tl.arange(0, BLOCK_M)
    row = first_row + member // GROUP
    is_row = (member < BLOCK_Q * GROUP) & (row < end)
    column = tl.arange(0, HEAD_DIM)
    head = kv_head * GROUP + member % GROUP
    at = (row.to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM + column[None, :]
    query = tl.load(query_ptr + at, mask=is_row[:, None], other=0)
    # Rows that are not live see zeros, or keys of this sequence; nothing of them is stored.
    position = context - end + row
    num_keys = tl.maximum(tl.minimum(context - end + first_row + BLOCK_Q, context), 0)
    num_full = tl.maximum(context - end + first_row + 1, 0) // BLOCK_N * BLOCK_N

    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_width
    keys_ptr = kv_cache_ptr + kv_head * HEAD_DIM
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    blocks = load_blocks(table_ptr, 0, context, BLOCK_SIZE, BLOCK_N)
    first_masked = 0
    if not ONE_LOOP:
        for low in tl.range(0, num_full, BLOCK_N, num_stages=STAGES):
            following = load_blocks(table_ptr, low + BLOCK_N, context, BLOCK_SIZE, BLOCK_N)
            acc, total, top = attend_keys(
                acc, total, top, query, keys_ptr, value_offset, blocks, low, position, context, scale,
                KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, False, PRECISION,
            )  # fmt: skip
            blocks = following
        first_masked = num_full
    for low in tl.range(first_masked, num_keys, BLOCK_N, num_stages=STAGES):
        following = load_blocks(table_ptr, low + BLOCK_N, context, BLOCK_SIZE, BLOCK_N)
        acc, total, top = attend_keys(
            acc, total, top, query, keys_ptr, value_offset, blocks, low, position, context, scale,
            KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, True, PRECISION,
        )  # fmt: skip
        blocks = following
    total = tl.where(context == 0, 1.0, total)
    tl.store(out_ptr + at, (acc / total[:, None]).to(query.dtype), mask=is_row[:, None])


def launch_prefill(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    tile: AttentionTile,
    one_loop: bool,
) -> None:
    """Launch the kernel for sequences with rows of any number.

    Args:
        query: `[T, heads, D]`.
        kv_cache: `[2, num_blocks, block_size, kv_heads, D]`.
        block_tables: `[B, max_blocks]`.
        query_starts: `[B + 1]`.
        context_lens: `[B]`.
        out: `[T, heads, D]`; overwritten.
        tile: The tile.
        one_loop: Mask every block of keys, for batch invariance.

    Runtime: one launch on the current stream, its grid from shapes alone; no host sync; no allocation; CUDA-graph safe;
        bitwise deterministic; no gradients.
    """
    num_rows, num_heads, head_dim = query.shape
    num_sequences, table_width = block_tables.shape
    num_kv_heads = kv_cache.shape[3]
    group = num_heads // num_kv_heads
    # One tile more for each sequence that may end inside one, and for the rows past the last sequence.
    num_tiles = num_rows // (tile.rows // group) + num_sequences + 1
    _prefill_kernel[(num_tiles, num_kv_heads)](
        query,
        kv_cache,
        block_tables,
        query_starts,
        context_lens,
        out,
        head_dim**-0.5 * _LOG2_E,
        kv_cache.stride(0),
        num_rows,
        num_sequences,
        table_width,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv_cache.shape[2],
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        AT_ONCE=_SEQUENCES_AT_ONCE,
        ONE_LOOP=one_loop,
        STAGES=tile.stages,
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32",
        num_warps=tile.warps,
    )


def launch_paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    max_query_len: int,
    batch_invariant: bool,
) -> None:
    """Launch the kernels that suit the step; arguments are those of `paged_attention`, already checked.

    Args:
        query: `[T, heads, D]`.
        kv_cache: `[2, num_blocks, block_size, kv_heads, D]`.
        block_tables: `[B, max_blocks]`.
        query_starts: `[B + 1]`.
        context_lens: `[B]`.
        out: `[T, heads, D]`; overwritten.
        max_query_len: At least the rows of any sequence.
        batch_invariant: Use the one kernel and tile that serve every step.

    Runtime: one launch, or two for decoding with split keys, by shapes and `max_query_len` alone; no host sync;
        allocates float32 partial results for split keys alone; CUDA-graph safe; bitwise deterministic; no gradients.
    """
    num_rows, num_heads, head_dim = query.shape
    num_sequences, table_width = block_tables.shape
    if num_rows == 0:
        return
    block_size, num_kv_heads = kv_cache.shape[2:4]
    sizes = (num_heads // num_kv_heads, head_dim, query.element_size())
    tensors = (query, kv_cache, block_tables, query_starts, context_lens, out)
    if batch_invariant or max_query_len > 1 or num_sequences == 0:
        tile = choose_prefill_tile(*sizes, batch_invariant=batch_invariant)
        launch_prefill(*tensors, tile=tile, one_loop=batch_invariant)
        return
    tile = choose_decode_tile(*sizes)
    splits = choose_splits(
        num_sequences,
        num_kv_heads,
        triton.cdiv(table_width * block_size, tile.keys),
        num_processors=_num_processors(query.device),
    )
    launch_decode(*tensors, tile=tile, splits=splits, scale=head_dim**-0.5 * _LOG2_E)


def _num_processors(device: torch.device) -> int:
    """Of a GPU, or where kernels are interpreted, of an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        Prefill and batch invariance in each dtype, with 32-bit and 64-bit tables, and a group that is no power of two. Tiles
        have at most 64 rows, since the compile tests give every kernel four warps.
    """
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for name, kind, index, group, head_dim, block_size, invariant in (
        ("prefill", "bf16", "*i32", 8, 128, 16, False),
        ("invariant", "bf16", "*i64", 8, 128, 64, True),
        ("seven_heads", "fp16", "*i32", 7, 64, 16, False),
        ("f32", "fp32", "*i32", 4, 128, 16, True),
    ):
        tile = choose_prefill_tile(
            group, head_dim, 4 if kind == "fp32" else 2, batch_invariant=invariant
        )
        signature = {
            **dict.fromkeys(("query_ptr", "kv_cache_ptr", "out_ptr"), f"*{kind}"),
            **dict.fromkeys(("block_tables_ptr", "query_starts_ptr", "context_lens_ptr"), index),
            "scale": "fp32",
            "value_offset": "i64",
            **dict.fromkeys(("num_rows", "num_sequences", "table_width"), "i32"),
        }
        constexprs: dict[str, Any] = {
            "KV_HEADS": 4,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "BLOCK_M": min(tile.rows, 64),
            "BLOCK_N": tile.keys,
            "AT_ONCE": _SEQUENCES_AT_ONCE,
            "ONE_LOOP": invariant,
            "STAGES": tile.stages,
            "PRECISION": "ieee" if kind == "fp32" else "tf32",
        }
        cases.append((name, _prefill_kernel, signature, constexprs))
    return cases
