"""Run the demo on several seeds, on the CPU, and write the figures that README and model card are made from.

    python scripts/measure_demo.py

Refuses a tree with uncommitted changes, so that the commit named in the result is what ran.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from routing_replay.cli.demo import DemoOptions, run_demo

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "demo.json"
SEEDS = (0, 11, 12, 13, 14, 15)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def main() -> None:
    """Measure every seed and write the result."""
    if _git("status", "--porcelain", "--untracked-files=no"):
        sys.exit("the tree has uncommitted changes; commit them, then measure")
    runs: list[object] = []
    failed: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            output = Path(folder) / str(seed)
            if run_demo(DemoOptions(seed=seed, device="cpu", output=output)):
                failed.append(seed)
            runs.append(json.loads((output / "demo.json").read_text()))
    record = {"commit": _git("rev-parse", "HEAD"), "cpu": _cpu(), "runs": runs}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    if failed:
        sys.exit(f"the demo failed on seeds {failed}")


if __name__ == "__main__":
    main()
