"""Paged attention equals dense attention; the Triton kernels (interpreted) equal the reference."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from routing_replay.errors import ConfigError
from routing_replay.kernels import paged_attention
from routing_replay.kernels.attention.tiles import (
    AttentionTile,
    choose_decode_tile,
    choose_prefill_tile,
    choose_splits,
)

SCRIPT = Path(__file__).with_name("interpreted_attention.py")
NAMES = ("mixed", "one_row", "many_sequences", "values_apart", "invariant", "tiles")


@pytest.mark.parametrize("name", NAMES)
def test_interpreted_attention_equals_the_reference(name: str, tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), name], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def _arguments(**changes: object) -> dict[str, Any]:
    """Two sequences, 3 rows of 40 tokens and 5 of 5, in blocks of 16, and a row of padding."""
    arguments: dict[str, Any] = {
        "query": torch.randn(9, 4, 8),
        "kv_cache": torch.randn(2, 10, 16, 2, 8),
        "block_tables": torch.tensor([[7, 0, 4], [2, 9, 9]], dtype=torch.int32),
        "query_starts": torch.tensor([0, 3, 8], dtype=torch.int32),
        "context_lens": torch.tensor([40, 5], dtype=torch.int32),
        "max_query_len": 5,
    }
    return {**arguments, **changes}


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_paged_attention_equals_dense_attention(index: torch.dtype, batch_invariant: bool):
    arguments = _arguments()
    for name in ("block_tables", "query_starts", "context_lens"):
        arguments[name] = arguments[name].to(index)
    kv_cache = arguments["kv_cache"]
    kv_cache[:, 2, 5:] = float("nan")
    kv_cache[:, 4, 8:] = float("nan")
    kv_cache[:, 9] = float("nan")
    out = paged_attention(**arguments, batch_invariant=batch_invariant)
    for sequence, (low, high, context) in enumerate(((0, 3, 40), (3, 8, 5))):
        for row in range(low, high):
            seen = context - (high - 1 - row)
            slots = torch.arange(seen)
            blocks = arguments["block_tables"][sequence, slots // 16].long()
            key, value = kv_cache[:, blocks, slots % 16].transpose(1, 2)
            expected = torch.nn.functional.scaled_dot_product_attention(
                arguments["query"][row, :, None], key, value, enable_gqa=True
            )
            torch.testing.assert_close(out[row], expected.squeeze(1), atol=1e-6, rtol=1e-5)
    assert (out[8] == 0).all()


def test_context_of_zero_gives_zeros():
    lengths = torch.tensor([40, 0], dtype=torch.int32)
    out = paged_attention(**_arguments(context_lens=lengths))
    assert (out[3:] == 0).all()
    assert (out[:3] != 0).all()


def test_batch_invariant_reference_computes_rows_alone():
    arguments = _arguments()
    whole = paged_attention(**arguments, batch_invariant=True)
    arguments["query"] = arguments["query"][2:3].contiguous()
    arguments["block_tables"] = arguments["block_tables"][:1]
    arguments["query_starts"] = torch.tensor([0, 1], dtype=torch.int32)
    arguments["context_lens"] = arguments["context_lens"][:1]
    alone = paged_attention(**{**arguments, "max_query_len": 1}, batch_invariant=True)
    assert torch.equal(alone[0], whole[2])


def test_paged_attention_passes_opcheck():
    tensors = _arguments()
    most = tensors.pop("max_query_len")
    arguments = (*tensors.values(), most, False, "reference")
    torch.library.opcheck(torch.ops.routing_replay.paged_attention.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(9, 32)}, r"query is torch.float32 of shape \(9, 32\)"),
        ({"query": torch.zeros(9, 4, 8, dtype=torch.float64)}, "query is torch.float64"),
        ({"query": torch.zeros(9, 8, 4).transpose(1, 2)}, r"strides \(32, 1, 4\)"),
        ({"query": torch.zeros(9, 3, 8)}, "query has 3 heads, kv_cache 2"),
        ({"kv_cache": torch.zeros(2, 10, 16, 2, 4)}, r"\[2, num_blocks, block_size, kv_heads, 8\]"),
        ({"kv_cache": torch.zeros(2, 10, 16, 2, 8).half()}, "kv_cache is torch.float16"),
        ({"kv_cache": torch.zeros(2, 10, 2, 16, 8).transpose(2, 3)}, "kv_cache has strides"),
        ({"block_tables": torch.zeros(2, 3)}, "block_tables is torch.float32"),
        ({"block_tables": torch.zeros(3, 3, dtype=torch.int32)}, r"block_tables .*\[B, max_blocks\]"),
        ({"block_tables": torch.zeros(3, 2, dtype=torch.int32).t()}, "block_tables has strides"),
        ({"query_starts": torch.zeros(2, dtype=torch.int32)}, r"query_starts .*\[B \+ 1\]"),
        ({"context_lens": torch.zeros(2, 1, dtype=torch.int32)}, r"context_lens of shape \(2, 1\)"),
        ({"context_lens": torch.zeros(2, dtype=torch.int32, device="meta")}, "another argument on meta"),
        ({"max_query_len": 0}, "max_query_len=0"),
        ({"backend": "triton"}, "backend='triton' on cpu"),
        ({"backend": "none"}, "backend='none'"),
    ],
)  # fmt: skip
def test_paged_attention_refuses_bad_arguments(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        paged_attention(**_arguments(**changes))


@pytest.mark.parametrize(
    ("sequences", "kv_heads", "max_tiles", "expected"),
    [(1, 4, 1000, 64), (1, 4, 10, 10), (8, 4, 1000, 8), (32, 4, 1000, 2), (128, 4, 1000, 1), (1, 1, 0, 1)],
)  # fmt: skip
def test_splits_fill_the_device_once(sequences: int, kv_heads: int, max_tiles: int, expected: int):
    assert choose_splits(sequences, kv_heads, max_tiles, num_processors=132) == expected


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("group", [1, 4, 7, 8, 33])
def test_tiles_hold_a_group_and_fit_shared_memory(group: int, element_size: int, head_dim: int):
    for tile in (
        choose_prefill_tile(group, head_dim, element_size, batch_invariant=False),
        choose_prefill_tile(group, head_dim, element_size, batch_invariant=True),
        choose_decode_tile(group, head_dim, element_size),
    ):
        assert tile.rows >= group
        rows_and_keys = tile.rows + 2 * tile.stages * tile.keys
        assert rows_and_keys * head_dim * element_size <= 160 * 1024  # of an A100


@pytest.mark.parametrize("sizes", [{"rows": 24}, {"rows": 8}, {"keys": 8}, {"keys": 48}])
def test_tile_refuses_sizes_that_do_not_compile(sizes: dict[str, int]):
    with pytest.raises(ConfigError, match="powers of two from 16 on"):
        AttentionTile(**{"rows": 16, "keys": 16, **sizes}, stages=2, warps=4)
