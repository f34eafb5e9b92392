"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 with the pinned Triton, and for sm_90 with the newest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NEWEST = Path(sys.prefix) / "triton-newest"
# Made only where torch brought another Triton of its own, which then is the environment's.
PINNED = Path(sys.prefix) / "triton-pinned"


@pytest.mark.parametrize(
    ("label", "folder", "architectures"),
    [
        ("pinned", PINNED if PINNED.is_dir() else None, ("80", "90", "100")),
        ("newest", NEWEST, ("90",)),
    ],
)
def test_kernels_compile_without_a_gpu(
    label: str, folder: Path | None, architectures: tuple[str, ...], tmp_path: Path
):
    # A warm cache would hide a kernel that no longer compiles.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    if folder is not None:
        assert folder.is_dir(), f"{folder} is missing; run `make test`, which installs it"
        environment["PYTHONPATH"] = str(folder)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), *architectures],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert (result["triton"] == "3.6.0") == (label == "pinned")
    assert len(result["compiled"]) >= 9
    assert all(size > 0 for size in result["compiled"].values())
    compiled_for = {name.rsplit("sm_", 1)[1] for name in result["compiled"]}
    assert compiled_for == set(architectures)
