"""Measure the trace store: appends with and without a flush each, opening, random reads; write JSON.

python benchmarks/trace/store_speed.py --out docs/results/trace_store.json
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import provenance, seconds, skewed_trace

from routing_replay.trace import CODEC_NAMES, RoutingTrace, TraceStoreReader, TraceStoreWriter


def append_all(path: Path, trace: RoutingTrace, *, count: int, codec: str, flush: bool) -> float:
    """Append a trace under many keys; return the time, closing (one flush) not counted."""
    with TraceStoreWriter(path, codec=codec) as writer:
        started = time.perf_counter()
        for number in range(count):
            writer.append(f"step-12/prompt-{number}/0", trace)
            if flush:
                writer.flush()
        return time.perf_counter() - started


def read_keys(reader: TraceStoreReader, keys: list[str]) -> None:
    """Read and decode traces."""
    for key in keys:
        reader[key]


def measure_codec(
    folder: Path, rows: int, count: int, codec: str, repeats: int
) -> dict[str, object]:
    """Measure appends and reads with one codec; medians of new stores."""
    trace = skewed_trace(rows)
    times: dict[str, list[float]] = {"append": [], "append_flush": [], "read": []}
    nbytes = 0
    for repeat in range(repeats):
        path, flushed = folder / f"{codec}-{repeat}.rrs", folder / f"{codec}-{repeat}-flushed.rrs"
        times["append"].append(
            append_all(path, trace, count=count, codec=codec, flush=False) / count
        )
        few = max(1, count // 4)
        elapsed = append_all(flushed, trace, count=few, codec=codec, flush=True)
        times["append_flush"].append(elapsed / few)
        with TraceStoreReader(path) as reader:
            keys = list(reader)
            np.random.default_rng(repeat).shuffle(keys)
            times["read"].append(seconds(lambda: read_keys(reader, keys)) / count)  # noqa: B023
        nbytes = sum(file.stat().st_size for file in path.iterdir())
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "codec": codec,
        "rows": rows,
        "stored_bytes_per_trace": round(nbytes / count),
        "appends_per_s": round(1 / median["append"]),
        "appends_per_s_flush_each": round(1 / median["append_flush"]),
        "random_reads_per_s": round(1 / median["read"]),
        "read_mb_per_s_of_ids": round(trace.ids.nbytes / median["read"] / 1e6),
    }


def measure_opening(folder: Path, num_traces: int, repeats: int) -> dict[str, object]:
    """Time opening a large store, and reading one trace of it at random."""
    path = folder / "large.rrs"
    trace = skewed_trace(4)
    append_all(path, trace, count=num_traces, codec="raw", flush=False)
    opens: list[float] = []
    reads: list[float] = []
    for repeat in range(repeats):
        started = time.perf_counter()
        reader = TraceStoreReader(path)
        opens.append(time.perf_counter() - started)
        keys = list(reader)
        np.random.default_rng(repeat).shuffle(keys)
        reads.append(seconds(lambda: read_keys(reader, keys[:1000])) / 1000)  # noqa: B023
        assert len(keys) == num_traces
        assert reader[keys[0]].equals(trace)
        reader.close()
    return {
        "traces": num_traces,
        "rows": 4,
        "index_bytes": (path / "index").stat().st_size,
        "open_ms": round(1000 * statistics.median(opens), 2),
        "random_reads_per_s": round(1 / statistics.median(reads)),
    }


def main() -> None:
    """Measure every codec and the opening of a large store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--folder", type=Path, help="where stores are written; default: a temporary one"
    )
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        record = {
            **provenance(),
            "shape": "48 layers, E 128, K 8",
            "page_cache": "warm",
            "codecs": [
                measure_codec(folder, arguments.rows, arguments.count, codec, arguments.repeats)
                for codec in CODEC_NAMES
            ],
            "large": measure_opening(folder, arguments.traces, arguments.repeats),
        }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
