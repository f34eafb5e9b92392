"""What the benchmarks of the trace share: routing as routers make it, clocks, and where a figure comes from."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from routing_replay.trace import RoutingTrace


def skewed_trace(
    rows: int, *, layers: int = 48, num_experts: int = 128, top_k: int = 8
) -> RoutingTrace:
    """Return random routing with popular experts, other ones in each layer; by default of Qwen3-30B-A3B's shape."""
    rng = np.random.default_rng(0)
    ids = np.empty((rows, layers, top_k), np.int64)
    for layer in range(layers):
        popularity = rng.gumbel(size=num_experts)
        keys = popularity + rng.gumbel(size=(rows, num_experts))
        ids[:, layer] = np.argsort(-keys, axis=1)[:, :top_k]
    return RoutingTrace.from_rows(
        ids,
        token_ids=rng.integers(0, 150_000, rows + 1),
        layer_ids=range(layers),
        num_layers=layers,
        num_experts=num_experts,
    )


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Return the median time of a call."""
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def provenance() -> dict[str, object]:
    """Return commit, processor and versions."""
    git = ["git", "rev-parse", "HEAD"]
    status = ["git", "status", "--porcelain", "--untracked-files=no"]
    return {
        "commit": subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip(),
        "dirty": bool(
            subprocess.run(status, check=True, capture_output=True, text=True).stdout.strip()
        ),
        "cpu": _cpu_name(),
        "threads": 1,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _cpu_name() -> str:
    """Return the processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
