"""Measure the trace codecs: bytes a token, and megabytes of raw ids a second each way on one thread; write JSON.

Encoding and decoding are those of a whole file: packing, checksums, and the validation of every id are in the times.

python benchmarks/trace/codec_speed.py --output docs/results/trace_codecs.json
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from math import comb, log2
from pathlib import Path

import numpy as np
import zstandard

from routing_replay.trace import RoutingTrace, decode_trace, encode_trace

# layers, E, K: Qwen3-30B-A3B, DeepSeek-V3, Qwen3-Next, Kimi-K3
SHAPES = ((48, 128, 8), (58, 256, 8), (48, 512, 10), (92, 896, 16))
CODECS = ("raw", "packed", "raw+zstd", "packed+zstd")


def skewed_trace(layers: int, num_experts: int, top_k: int, rows: int = 2048) -> RoutingTrace:
    """Return random routing with popular experts, other ones in each layer, as routers have."""
    rng = np.random.default_rng(0)
    ids = np.empty((rows, layers, top_k), np.int64)
    for layer in range(layers):
        popularity = rng.gumbel(size=num_experts)
        keys = popularity + rng.gumbel(size=(rows, num_experts))
        ids[:, layer] = np.argsort(-keys, axis=1)[:, :top_k]
    return RoutingTrace.from_rows(
        ids, token_ids=rng.integers(0, 150_000, rows + 1), layer_ids=range(layers), num_layers=layers,
        num_experts=num_experts,
    )  # fmt: skip


def seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Return the median time of a call."""
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure_codec(trace: RoutingTrace, codec: str) -> dict[str, float]:
    """Encode and decode a trace, the same bytes each time."""
    data = encode_trace(trace, codec=codec)
    wanted = trace.as_sets() if "packed" in codec else trace
    assert decode_trace(data).equals(wanted)
    return {
        "bytes_per_token": len(data) / trace.num_rows,
        "encode_mb_per_s": trace.ids.nbytes
        / seconds(lambda: encode_trace(trace, codec=codec))
        / 1e6,
        "decode_mb_per_s": trace.ids.nbytes / seconds(lambda: decode_trace(data)) / 1e6,
    }


def cpu_name() -> str:
    """Return the processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    """Measure everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    git = ["git", "rev-parse", "HEAD"]
    result: dict[str, object] = {
        "commit": subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip(),
        "cpu": cpu_name(),
        "threads": 1,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "zstandard": zstandard.__version__,
        "rows": 2048,
    }
    shapes: dict[str, object] = {}
    for layers, num_experts, top_k in SHAPES:
        trace = skewed_trace(layers, num_experts, top_k)
        entropy_bytes = layers * log2(comb(num_experts, top_k)) / 8
        codecs = {codec: measure_codec(trace, codec) for codec in CODECS}
        width = (comb(num_experts, top_k) - 1).bit_length()
        shapes[f"L{layers} E{num_experts} K{top_k}"] = {
            "raw_id_bytes_per_token": trace.ids[:1].nbytes,
            "set_entropy_bytes_per_token": entropy_bytes,
            "packed_id_bytes_per_token": layers * width / 8,
            "packed_over_entropy": layers * width / 8 / entropy_bytes,
            "codecs": codecs,
        }
        for codec, row in codecs.items():
            print(
                f"L{layers} E{num_experts} K{top_k} {codec}: "
                + ", ".join(f"{k} {v:.1f}" for k, v in row.items())
            )
    result["shapes"] = shapes
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
