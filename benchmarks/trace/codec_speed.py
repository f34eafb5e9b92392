"""Measure the trace codecs: bytes a token, and megabytes of raw ids a second each way on one thread; write JSON.

python benchmarks/trace/codec_speed.py --out docs/results/trace_codecs.json
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from math import comb, log2
from pathlib import Path

import numpy as np
import zstandard

from routing_replay.trace import (
    RoutingTrace,
    TraceStoreReader,
    TraceStoreWriter,
    decode_trace,
    encode_trace,
)

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


def measure_store(trace: RoutingTrace, count: int = 10_000) -> dict[str, float]:
    """Append many short traces, open the store, read at random."""
    short = trace.slice(0, 16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.rrs"
        with TraceStoreWriter(path) as writer:
            started = time.perf_counter()
            for number in range(count):
                writer.append(str(number), short)
            appending = time.perf_counter() - started
        opening = seconds(lambda: TraceStoreReader(path))
        keys = [str(number) for number in np.random.default_rng(0).integers(0, count, 500)]
        with TraceStoreReader(path) as reader:
            reading = seconds(lambda: [reader[key] for key in keys])
    return {
        "traces": count,
        "appends_per_s": count / appending,
        "open_s": opening,
        "random_reads_per_s": len(keys) / reading,
    }


def main() -> None:
    """Measure everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    git = ["git", "rev-parse", "HEAD"]
    result: dict[str, object] = {
        "commit": subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip(),
        "machine": platform.processor() or platform.machine(),
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
    result["store"] = measure_store(skewed_trace(48, 128, 8, rows=64))
    print(result["store"])
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
