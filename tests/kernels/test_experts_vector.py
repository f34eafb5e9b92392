"""The experts of a few tokens, without a plan, equal the references in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted_vector.py")
NAMES = (
    "activations", "replay", "expert_parallel", "part_of_the_experts", "shared_and_strided", "routed",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_interpreted_kernels_equal_the_reference(name: str, tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]
