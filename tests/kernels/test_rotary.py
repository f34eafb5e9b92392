"""Queries, keys and values of a step come out as in Transformers; the Triton kernel (interpreted) does the same."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels import norm_rotate_store

SCRIPT = Path(__file__).with_name("interpreted_norm_rotary.py")
HEADS, KV_HEADS, DIM, ROWS = 4, 2, 16, 5


def test_interpreted_rotary_equals_the_reference(tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), "rotary"], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def _arguments(dtype: torch.dtype = torch.float32, **changes: object) -> dict[str, Any]:
    angles = torch.randn(30, DIM // 2).repeat(1, 2)
    arguments: dict[str, Any] = {
        "qkv": torch.randn(ROWS, (HEADS + 2 * KV_HEADS) * DIM).to(dtype),
        "q_weight": torch.randn(DIM).to(dtype),
        "k_weight": torch.randn(DIM).to(dtype),
        "eps": 1e-6,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "positions": torch.tensor([0, 29, 3, 3, 12]),
        "kv_cache": torch.full((2, 4, 8, KV_HEADS, DIM), 77.0, dtype=dtype),
        "slot_mapping": torch.tensor([31, 0, -1, 9, 8]),
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
    }
    return {**arguments, **changes}


def _transformers(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import (
        Qwen3MoeRMSNorm,
        apply_rotary_pos_emb,
    )

    heads = arguments["qkv"].view(ROWS, -1, DIM)
    query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    normed: list[Tensor] = []
    for name, x in (("q_weight", query), ("k_weight", key)):
        norm = Qwen3MoeRMSNorm(DIM, eps=arguments["eps"])
        norm.weight.data = arguments[name]
        normed.append(norm(x)[None])
    angles = (arguments[name][arguments["positions"]][None] for name in ("cos", "sin"))
    query, key = apply_rotary_pos_emb(*normed, *angles, unsqueeze_dim=2)
    return query[0], key[0], value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rotate_store_equals_transformers(dtype: torch.dtype):
    arguments = _arguments(dtype)
    expected_query, key, value = _transformers(arguments)
    query = norm_rotate_store(**arguments)
    assert torch.equal(query, expected_query)
    stored = arguments["kv_cache"].flatten(1, 2)
    for row, slot in ((0, 31), (1, 0), (3, 9), (4, 8)):
        assert torch.equal(stored[0, slot], key[row])
        assert torch.equal(stored[1, slot], value[row])
    others = [slot for slot in range(32) if slot not in (31, 0, 9, 8)]
    assert (stored[:, others] == 77).all()


def test_norm_rotate_store_without_norms_turns_positions():
    arguments = _arguments(q_weight=None, k_weight=None)
    query = norm_rotate_store(**arguments)
    heads = arguments["qkv"].view(ROWS, -1, DIM)
    # A rotation keeps the length of each pair.
    pairs = query.view(ROWS, HEADS, 2, DIM // 2).norm(dim=2)
    before = heads[:, :HEADS].reshape(ROWS, HEADS, 2, DIM // 2).norm(dim=2)
    torch.testing.assert_close(pairs, before)
    moved = {**arguments, "positions": arguments["positions"] * 0}
    assert not torch.equal(norm_rotate_store(**moved)[1], query[1])
    assert torch.equal(norm_rotate_store(**moved)[0], query[0])


def test_norm_rotate_store_passes_opcheck():
    arguments = (*_arguments().values(), "reference")
    torch.library.opcheck(torch.ops.routing_replay.norm_rotate_store.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(5, 64)}, r"qkv is torch.float32 of shape \(5, 64\)"),
        ({"qkv": torch.zeros(5, 128).double()}, "qkv is torch.float64"),
        ({"qkv": torch.zeros(128, 5).t()}, "qkv has strides"),
        ({"cos": torch.zeros(30, 15)}, r"cos has shape \(30, 15\); accepted is \[P, D\]"),
        ({"sin": torch.zeros(29, 16)}, r"sin .*\[30, 16\]"),
        ({"q_weight": torch.zeros(8)}, r"q_weight .*\[16\]"),
        ({"k_weight": torch.zeros(16).half()}, "k_weight is torch.float16"),
        ({"positions": torch.zeros(5, dtype=torch.int32)}, "positions is torch.int32"),
        ({"slot_mapping": torch.zeros(4, dtype=torch.int64)}, r"slot_mapping .*\[5\]"),
        ({"kv_cache": torch.zeros(2, 4, 8, 1, 16)}, r"kv_cache .*\[2, num_blocks, block_size, 2, 16\]"),
        ({"kv_cache": torch.zeros(2, 4, 2, 8, 16).transpose(2, 3)}, "kv_cache is on cpu with strides"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"backend": "triton"}, "backend='triton' on cpu"),
    ],
)  # fmt: skip
def test_norm_rotate_store_refuses_bad_arguments(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        norm_rotate_store(**_arguments(**changes))
