"""Runs of the attention kernels in the interpreter, by name: `TRITON_INTERPRET=1 python interpreted_attention.py NAME`.

A process of its own, because the interpreter is chosen where a kernel is defined. Prints `same` at the end.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from exact_interpreter import repair_interpreter
from torch import Tensor

from routing_replay.kernels.attention import _triton, paged_attention_reference
from routing_replay.kernels.attention._triton_decode import launch_decode
from routing_replay.kernels.attention.tiles import (
    AttentionTile,
    choose_decode_tile,
    choose_prefill_tile,
)

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences in a cache whose other slots are NaN, and whose tables end in ids that do not exist."""

    query: Tensor
    kv_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.kv_cache, self.block_tables, self.query_starts, self.context_lens

    @property
    def reference(self) -> Tensor:
        return paged_attention_reference(
            self.query,
            self.kv_cache,
            block_tables=self.block_tables,
            query_starts=self.query_starts,
            context_lens=self.context_lens,
        )


def make_case(
    contexts: Sequence[int],
    rows: Sequence[int],
    *,
    group: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
    index: torch.dtype = torch.int32,
) -> Case:
    blocks_of = [-(-context // block_size) for context in contexts]
    num_blocks = sum(blocks_of) + 3
    order = torch.randperm(num_blocks)
    tables = torch.full((len(contexts), max(blocks_of) + 1), 10**6, dtype=index)
    cache = torch.full((2, num_blocks, block_size, kv_heads, head_dim), float("nan"), dtype=dtype)
    used = 0
    for sequence, (context, count) in enumerate(zip(contexts, blocks_of, strict=True)):
        blocks = order[used : used + count]
        used += count
        tables[sequence, :count] = blocks.to(index)
        positions = torch.arange(context)
        kv = torch.randn(2, context, kv_heads, head_dim).to(dtype)
        cache[:, blocks[positions // block_size], positions % block_size] = kv
    starts = torch.tensor([0, *rows]).cumsum(0).to(index)
    query = torch.randn(sum(rows) + padding, kv_heads * group, head_dim).to(dtype)
    return Case(
        query=query,
        kv_cache=cache,
        block_tables=tables,
        query_starts=starts,
        context_lens=torch.tensor(contexts, dtype=index),
    )


def attend(
    case: Case, *, batch_invariant: bool = False, max_query_len: int | None = None
) -> Tensor:
    starts = case.query_starts
    most = int((starts[1:] - starts[:-1]).max()) if max_query_len is None else max_query_len
    out = torch.full_like(case.query, float("nan"))
    _triton.launch_paged_attention(
        *case.tensors, out, max_query_len=most, batch_invariant=batch_invariant
    )
    return out


def decode(case: Case, splits: int, tile: AttentionTile | None = None) -> Tensor:
    _, num_heads, head_dim = case.query.shape
    sizes = (num_heads // case.kv_cache.shape[3], head_dim, case.query.element_size())
    out = torch.full_like(case.query, float("nan"))
    launch_decode(
        *case.tensors, out, tile=tile or choose_decode_tile(*sizes), splits=splits, scale=head_dim**-0.5 * LOG2_E
    )  # fmt: skip
    return out


def check(out: Tensor, case: Case) -> None:
    """Close to the reference, and exactly zero where it is exactly zero: in rows of padding."""
    expected = case.reference
    assert not expected.isnan().any()
    tolerance = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[case.query.dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    unused = (expected == 0).flatten(1).all(1)
    assert (out[unused] == 0).all()


def mixed() -> None:
    """Whole prompts, chunks, decoding rows, padding sequences with and without rows, padding rows, at tile borders."""
    contexts, rows = (40, 0, 32, 33, 31, 1, 64, 0), (3, 2, 32, 1, 5, 1, 33, 0)
    for group, head_dim, dtype in (
        (1, 64, torch.float32),
        (4, 128, torch.bfloat16),
        (7, 64, torch.float32),
        (8, 128, torch.float16),
    ):
        case = make_case(contexts, rows, group=group, head_dim=head_dim, padding=5, dtype=dtype)
        check(attend(case), case)
    case = make_case((65, 128, 63), (65, 2, 63), kv_heads=1, dtype=torch.bfloat16, block_size=64, index=torch.int64)  # fmt: skip
    check(attend(case), case)
    assert case.reference[:65].abs().max() > 0


def one_row() -> None:
    """Rows of one token each, with every number of splits, at tile borders, beside padding."""
    contexts = (1, 31, 32, 33, 0, 95, 64, 128)
    for group, head_dim, dtype, splits in (
        (1, 64, torch.float32, 1),
        (4, 64, torch.float32, 3),
        (8, 128, torch.bfloat16, 2),
        (7, 64, torch.float16, 1),
    ):
        case = make_case(contexts, (1,) * 8, group=group, head_dim=head_dim, padding=3, dtype=dtype)
        check(decode(case, splits), case)
    # A sequence without a row: later rows move up, and the last row is nobody's.
    case = make_case((40, 0, 70), (1, 0, 1), kv_heads=1, padding=1)
    for splits in (1, 2, 5):
        check(decode(case, splits), case)
    check(attend(case), case)
    check(attend(case, max_query_len=7), case)


def many_sequences() -> None:
    """More sequences than one look-up of a tile's sequence holds."""
    contexts = [1 + index % 40 for index in range(131)]
    rows = [min(1 + index % 3, contexts[index]) for index in range(131)]
    case = make_case(contexts, rows, group=2, kv_heads=1, padding=1)
    check(attend(case), case)


def values_apart() -> None:
    """Values that do not follow their keys at once."""
    case = make_case((70, 20), (70, 1), kv_heads=1)
    kv = case.kv_cache
    apart = torch.full((2, kv[0].numel() + 7), float("nan"))
    view = apart.as_strided(kv.shape, (apart.shape[1], *kv.stride()[1:]))
    view.copy_(kv)
    case = replace(case, kv_cache=view)
    check(attend(case), case)
    check(attend(case, batch_invariant=True), case)


def piece_of(case: Case, sequence: int, low: int, high: int) -> Case:
    """Rows `[low, high)` of one sequence in a step of their own."""
    first = int(case.query_starts[sequence])
    context = int(case.context_lens[sequence])
    rows = int(case.query_starts[sequence + 1]) - first
    return replace(
        case,
        query=case.query[first + low : first + high].contiguous(),
        block_tables=case.block_tables[sequence : sequence + 1].contiguous(),
        query_starts=torch.tensor([0, high - low], dtype=torch.int32),
        context_lens=torch.tensor([context - rows + high], dtype=torch.int32),
    )


def invariant() -> None:
    """A row's bits are the same in a whole prompt, in chunks of any size, decoded, and beside others."""
    for group, dtype in ((4, torch.float32), (8, torch.bfloat16)):
        case = make_case((70, 45, 0), (70, 40, 1), group=group, kv_heads=1, dtype=dtype, padding=2)
        whole = attend(case, batch_invariant=True)
        check(whole, case)
        for sequence, bounds in ((0, (0, 1, 3, 20, 70)), (0, (0, 33, 69, 70)), (1, (0, 39, 40))):
            first = int(case.query_starts[sequence])
            for low, high in pairwise(bounds):
                piece = piece_of(case, sequence, low, high)
                out = attend(piece, batch_invariant=True)
                assert torch.equal(out, whole[first + low : first + high]), (sequence, low, high)
        # The twin: another key, and only the rows that see it change.
        changed = case.kv_cache.clone()
        changed[1, case.block_tables[0, 2], 1] += 1.0  # key 33
        other = attend(replace(case, kv_cache=changed), batch_invariant=True)
        differs = (other != whole).flatten(1).any(1)
        assert differs.tolist() == [33 <= row < 70 for row in range(len(whole))]


def tiles() -> None:
    """Every tile that may be chosen gives the same rows."""
    case = make_case((100, 17), (100, 5), kv_heads=1, dtype=torch.float16)
    for rows, keys in ((16, 16), (64, 64), (128, 32), (128, 128)):
        out = torch.full_like(case.query, float("nan"))
        tile = AttentionTile(rows=rows, keys=keys, stages=2, warps=4)
        _triton.launch_prefill(*case.tensors, out, tile=tile, one_loop=rows == 64)
        check(out, case)
    assert choose_prefill_tile(32, 128, 2, batch_invariant=True).rows >= 32


RUNS: dict[str, Callable[[], None]] = {
    run.__name__: run for run in (mixed, one_row, many_sequences, values_apart, invariant, tiles)
}

if __name__ == "__main__":
    torch.manual_seed(0)
    repair_interpreter(uniform_rows=sys.argv[1] == "invariant")
    RUNS[sys.argv[1]]()
    print("same")  # noqa: T201
