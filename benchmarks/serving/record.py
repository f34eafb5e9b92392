"""Where a figure comes from, how figures are summed up, and how a result is written."""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

_PACKAGES = (
    "torch",
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httpx",
    "msgspec",
    "schemathesis",
)


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add what every script takes, and parse; a script that is told to end then ends its servers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--commit", help="what is measured; the checkout's commit if not given")
    return parser.parse_args()


def provenance(commit: str | None) -> dict[str, object]:
    """Return commit, machine, versions, and how busy the machine is."""
    here = Path(__file__).parent
    if commit is None:
        git = [
            "git",
            "-C",
            str(here),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
            "--exclude=*",
        ]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]  # fmt: skip
    return {
        "commit": commit,
        "day": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(),
                    "load_average_at_start": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }  # fmt: skip


def write(path: Path, result: dict[str, object]) -> None:
    """Write a result, and name the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}", flush=True)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p99 and the largest of times in seconds, as milliseconds."""
    ranked = sorted(values)
    return {
        "p50_ms": 1e3 * ranked[len(ranked) // 2],
        "p99_ms": 1e3 * ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))],
        "max_ms": 1e3 * ranked[-1],
    }


def interval_of_median(values: Sequence[float]) -> dict[str, object]:
    """Return the median, with a bootstrap interval of 95 %."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return {"median": statistics.median(values), "interval_95": [medians[50], medians[1949]]}


def paired_ratio(ours: Sequence[float], others: Sequence[float]) -> dict[str, object]:
    """Return the median of ratios within rounds, with a bootstrap interval of 95 % over rounds."""
    ratios = [a / b for a, b in zip(ours, others, strict=True)]
    return {**interval_of_median(ratios), "rounds": len(ratios), "all": ratios}
