"""Write the golden files that are missing; those that exist are the format, and stay.

PYTHONPATH=tests python tests/wire/write_golden.py
"""

from pathlib import Path

from routing_replay.trace import save_trace
from wire.trace_files import small_trace, wide_trace, write_golden_store

GOLDEN = Path(__file__).parent / "golden"
TRACES = {
    "v1_raw.rrt": (small_trace(), "raw"),
    "v1_raw_weights.rrt": (wide_trace(), "raw"),
    "v1_packed.rrt": (small_trace(), "packed"),
    "v1_packed_weights.rrt": (wide_trace(), "packed"),
    "v1_raw_zstd.rrt": (small_trace(), "raw+zstd"),
    "v1_packed_zstd.rrt": (wide_trace(), "packed+zstd"),
}


def main() -> None:
    """Write what is not there yet."""
    for name, (trace, codec) in TRACES.items():
        if not (GOLDEN / name).exists():
            save_trace(trace, GOLDEN / name, codec=codec)
    if not (GOLDEN / "v1_store.rrs").exists():
        write_golden_store(GOLDEN / "v1_store.rrs")


if __name__ == "__main__":
    main()
