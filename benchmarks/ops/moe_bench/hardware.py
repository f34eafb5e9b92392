"""Which machine, which clocks, which versions."""

import argparse
import importlib.metadata
import math
import subprocess
from pathlib import Path

import torch
import triton

__all__ = ["PACKAGES", "clocks", "machine", "recorded_options"]

PACKAGES = (
    "sglang",
    "sglang-kernel",
    "vllm",
    "sonic-moe",
    "quack-kernels",
    "nvidia-cutlass-dsl-libs-base",
    "flashinfer-python",
)
"""Peers whose versions are written where they are installed."""

_QUERY = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"


def recorded_options(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the options of a run without the paths, which are of one machine and change no figure, or what is unlimited."""
    left_out = (None, math.inf)
    return {
        name: value
        for name, value in vars(arguments).items()
        if value not in left_out and name != "commit" and not isinstance(value, Path)
    }


def clocks() -> str:
    """Return what nvidia-smi says of clocks, temperature, power and throttling now, or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        return f"nvidia-smi: {err}"
    return (done.stdout or done.stderr).strip()


def machine() -> dict[str, object]:
    """Return the GPU, its driver and limits, and the versions of what runs."""
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,power.limit,clocks.max.sm"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver_power_limit_max_clock": driver.stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        **_peer_versions(),
    }


def _peer_versions() -> dict[str, object]:
    found: dict[str, object] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
