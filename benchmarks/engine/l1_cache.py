"""What it costs a decode step on a GPU if the GEMMs of few rows leave the split of L1 cache and shared memory to others.

python benchmarks/engine/l1_cache.py --out docs/results/engine_l1_cache.json --commit "$(git rev-parse HEAD)"

One engine at a real model's sizes (gpu_speed.py), one request. Its graphs are recorded with what `prefer_l1_cache` asks for and
without it, for a runner that captures and for one that does not; turns of all four alternate, and a time
is the median between tokens.
"""

import argparse
import ctypes
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gpu_speed
import torch
import triton

from routing_replay.engine.runner import ModelRunner
from routing_replay.kernels.linear import _triton as few_rows

_PREFERRED_CARVEOUT = 9
PREFERENCES = {"asked for": 0, "left to others": -1}


def compiled_functions() -> Iterator[int]:
    """The driver's handles of the GEMMs of few rows that have been launched."""
    for caches in few_rows._few_rows_kernel.device_caches.values():
        for kernel in caches[0].values():
            yield kernel.function


def prefer(carveout: int) -> None:
    """Set what they prefer: a percentage of shared memory, -1 for nothing."""
    driver = ctypes.CDLL("libcuda.so.1")
    for function in compiled_functions():
        error = driver.cuFuncSetAttribute(ctypes.c_void_p(function), _PREFERRED_CARVEOUT, carveout)
        assert error == 0, error


def recorded(runner: ModelRunner, carveout: int) -> dict[object, object]:
    """The graphs of a runner, recorded under a preference; they keep it."""
    prefer(carveout)
    runner.record_graphs()
    assert runner.graphs is not None
    return dict(runner.graphs.recorded)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    arguments = parser.parse_args()
    sizes = argparse.Namespace(concurrency=[1], layers=None, batched_tokens=8192, graph_tokens=(16, 512), memory=0.9)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        llm = gpu_speed.make_llm(sizes, Path(folder))
    on = llm.core.runner
    runners = {"capture on": on, "capture off": gpu_speed.without_capture(on)}
    for runner in runners.values():  # compiles what a prompt needs
        gpu_speed.run(llm, runner, 1, gpu_speed.PROMPT_TOKENS, 8, 0)
    ways = [(name, kind) for name in runners for kind in PREFERENCES]
    graphs = {(name, kind): recorded(runners[name], PREFERENCES[kind]) for name, kind in ways}
    steps: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for number in range(arguments.rounds):
        for way in ways if number % 2 else reversed(ways):
            runner = runners[way[0]]
            assert runner.graphs is not None
            runner.graphs._replays = graphs[way]  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
            turn = gpu_speed.run(llm, runner, 1, gpu_speed.PROMPT_TOKENS, arguments.new_tokens, number)  # fmt: skip
            steps[way].append(statistics.median(turn.steps_ms))
    rows = [
        {
            "runner": name,
            "l1_cache": kind,
            "decode_step_ms": round(statistics.median(steps[name, kind]), 4),
            "turns_ms": [round(value, 4) for value in steps[name, kind]],
        }
        for name, kind in ways
    ]
    result = {
        "commit": arguments.commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "model": gpu_speed.MODEL, "prompt_tokens": gpu_speed.PROMPT_TOKENS,
        "new_tokens": arguments.new_tokens, "rows": rows,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
