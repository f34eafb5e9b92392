"""The residual norm rounds as Hugging Face's decoders do; the Triton kernel (interpreted) does the same."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from routing_replay.errors import ConfigError
from routing_replay.kernels import add_rms_norm

SCRIPT = Path(__file__).with_name("interpreted_norm_rotary.py")


def test_interpreted_norm_equals_the_reference(tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), "norm"], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm_equals_transformers(dtype: torch.dtype):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    norm = Qwen3MoeRMSNorm(48, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(48))
    x, residual = torch.randn(2, 5, 48).to(dtype)
    normed, total = add_rms_norm(x, residual, norm.weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, norm(residual + x))
    normed, total = add_rms_norm(x, None, norm.weight, 1e-5)
    assert total is x
    assert torch.equal(normed, norm(x))
    other, _ = add_rms_norm(x, residual, norm.weight, 1e-2)
    assert not torch.equal(other, norm(residual + x))


@pytest.mark.parametrize("has_residual", [False, True])
def test_add_rms_norm_passes_opcheck(has_residual: bool):
    x = torch.randn(3, 8)
    residual = torch.randn(3, 8) if has_residual else None
    arguments = (x, residual, torch.randn(8), 1e-6, "reference")
    torch.library.opcheck(torch.ops.routing_replay.add_rms_norm.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 2, 4)}, r"x is torch.float32 of shape \(3, 2, 4\)"),
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, "x is torch.int32"),
        ({"x": torch.zeros(8, 3).t()}, r"x has strides \(1, 3\)"),
        ({"residual": torch.zeros(2, 8)}, r"residual .*accepted is torch.float32 \[3, 8\]"),
        ({"residual": torch.zeros(3, 8).half()}, "residual is torch.float16"),
        ({"weight": torch.zeros(7)}, r"weight .*\[8\]"),
        ({"weight": torch.zeros(8).half()}, "weight is torch.float16"),
        ({"weight": torch.zeros(8, device="meta")}, "weight is on meta"),
        ({"backend": "triton"}, "backend='triton' on cpu"),
    ],
)
def test_add_rms_norm_refuses_bad_arguments(changes: dict[str, object], message: str):
    arguments: dict[str, Any] = {
        "x": torch.zeros(3, 8),
        "residual": torch.zeros(3, 8),
        "weight": torch.zeros(8),
        "eps": 1e-6,
    }
    with pytest.raises(ConfigError, match=message):
        add_rms_norm(**{**arguments, **changes})
