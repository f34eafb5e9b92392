"""Measure what it takes to get a long response of vLLM into a trace: import, diagnosis, packing, memory, import time.

python benchmarks/trace/import_speed.py --out docs/results/trace_import.json
"""

import argparse
import base64
import io
import json
import statistics
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
from measuring import provenance, seconds, skewed_trace

from routing_replay.trace import ModelRouting, RoutingTrace, encode_trace
from routing_replay.trace.importers import find_shared_rows, import_vllm

ROWS = 32_768
NUM_REQUESTS = 8
TIMED_IMPORT = (
    "import time; t = time.perf_counter(); import numpy; n = time.perf_counter(); "
    "import routing_replay.trace.importers; "
    "e = time.perf_counter(); print(n - t, e - t)"
)


def npy_base64(ids: np.ndarray) -> str:
    """Return the field as vLLM sends it."""
    buffer = io.BytesIO()
    np.save(buffer, ids)
    return base64.b64encode(buffer.getvalue()).decode()


def peak_over(raw_bytes: int, call: object) -> float:
    """Return the most memory that a call holds at once, as a multiple of the raw array."""
    assert callable(call)
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / raw_bytes


def import_times(repeats: int = 21) -> dict[str, float]:
    """Time importing the package in fresh interpreters; medians and minima."""
    runs: list[tuple[float, float]] = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", TIMED_IMPORT], capture_output=True, text=True, check=True
        )
        numpy_s, all_s = map(float, done.stdout.split())
        runs.append((numpy_s, all_s))
    totals = [total for _, total in runs]
    return {
        "import_ms": 1000 * statistics.median(totals),
        "import_ms_min": 1000 * min(totals),
        "import_without_numpy_ms": 1000 * statistics.median(total - first for first, total in runs),
    }


def main() -> None:
    """Measure everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    source = skewed_trace(ROWS)
    routing = ModelRouting(
        layer_ids=source.layer_ids, num_layers=48, num_experts=128, top_k=source.top_k
    )
    tokens: list[int] = np.random.default_rng(1).integers(0, 150_000, ROWS + 1).tolist()
    text = npy_base64(source.ids)

    def load() -> RoutingTrace:
        return import_vllm(text, token_ids=tokens, routing=routing)

    trace = load()
    assert np.array_equal(trace.ids, source.ids)
    requests = {str(i): (trace, tokens) for i in range(NUM_REQUESTS)}
    result = {
        **provenance(),
        "shape": "Qwen3-30B-A3B, 48 layers, E 128, K 8",
        "rows": ROWS,
        "raw_mb": trace.ids.nbytes / 1e6,
        "base64_mb": len(text) / 1e6,
        "import_and_diagnosis_s": seconds(load, 9),
        "packing_s": seconds(lambda: encode_trace(trace, codec="packed"), 9),
        "shared_rows_of_8_requests_s": seconds(lambda: find_shared_rows(requests), 3),
        "peak_over_raw_import": peak_over(trace.ids.nbytes, load),
        "peak_over_raw_packing": peak_over(
            trace.ids.nbytes, lambda: encode_trace(trace, codec="packed")
        ),
        **import_times(),
    }
    print(json.dumps(result, indent=2))
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
