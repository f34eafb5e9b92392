"""Write docs/engine_performance.md from the committed results of the engine on GPUs, whichever there are.

python scripts/write_engine_docs.py           writes it
python scripts/write_engine_docs.py --check   only compares
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
DOCUMENT = ROOT / "docs" / "engine_performance.md"
Row = dict[str, Any]

INTRO = """\
# Performance of the engine on GPUs

Written by `make docs` from the JSON files in [results](results); a test compares. How the figures are made, and the floor of a
decode step, are in [benchmarks](../benchmarks/README.md). The CPU's figures are in
[cpu_throughput.json](results/cpu_throughput.json).
"""
NOTHING = "No result has been committed yet.\n"


def source_line(name: str, record: Row, *, more: str = "") -> str:
    """Name the hardware, versions and commit of a result."""
    device = record.get("device") or record["gpu"]
    versions = f"torch {record['torch']}"
    if "triton" in record:
        versions += f", Triton {record['triton']}"
    if "note" in record:
        more += f"; {record['note']}"
    return f"{device}, {versions}, commit {str(record['commit'])[:12]}{more}; [{name}](results/{name}).\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, numbers to the right."""
    marks = "|".join(["--:"] * len(header))
    return [f"| {' | '.join(header)} |", f"|{marks}|", *(f"| {' | '.join(row)} |" for row in rows), ""]  # fmt: skip


def cell(value: object, digits: int = 3) -> str:
    """Return a figure; nothing for what was not measured."""
    if isinstance(value, dict):
        middle = value.get("us", value.get("median_us", value.get("median")))
        low, high = value.get("p20", value.get("p20_us")), value.get("p80", value.get("p80_us"))
        spread = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
        return cell(middle, 2) + spread
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:.{digits}f}" if abs(value) >= 10**-digits or value == 0 else f"{value:.1e}"
    return "" if value is None else str(value)


def rows_table(rows: Sequence[Row]) -> list[str]:
    """Return a table of rows that have the same kind of columns; times and their percentiles share one."""
    merged = [_with_one_time(row) for row in rows]
    names = list(dict.fromkeys(name for row in merged for name in row))
    return table(
        [name.replace("_", " ") for name in names],
        [[cell(row.get(name)) for name in names] for row in merged],
    )


def _with_one_time(row: Row) -> Row:
    if "us" not in row:
        return row
    rest = {name: value for name, value in row.items() if name not in ("us", "p20", "p80")}
    return {**rest, "us": {name: row.get(name) for name in ("us", "p20", "p80")}}


def exactness_section(name: str, record: Row) -> Iterator[str]:
    """Yield what the matrix of schedules found."""
    cells = record["cells"]
    yield "## Exact under every schedule\n"
    yield source_line(name, record, more=f", {record['model']}, {record['dtype']}")
    same = "bit for bit the same" if record["capture_on_equals_off"] else "NOT THE SAME"
    yield (
        f"{len(cells)} cells. In each of them forced ids came back equal in every row, tokens, logprobs and ids equal those of "
        "the first cell bit for bit (`batch_invariant=True`), a layer whose writes were dropped was named, and swapped layers "
        f"failed the canary. With and without capture, tokens and logprobs are {same}.\n"
    )
    columns = ("cell", "requests", "forced_rows_equal", "prefix_hits", "preemptions", "graphs")
    yield from table(
        ["schedule", "requests", "forced rows equal", "prefix hits", "preemptions", "graphs"],
        [[cell(row.get(column)) for column in columns] for row in cells],
    )


def speed_section(name: str, record: Row) -> Iterator[str]:
    """Yield throughput, the cost of capture, and shares of the floor."""
    model = record["model"]
    shape = f"{model['num_hidden_layers']} layers, {model['num_experts']} experts, top {model['num_experts_per_tok']}"
    yield f"## Throughput and the cost of capture ({name.removesuffix('.json')})\n"
    more = f", {shape}, hidden size {model['hidden_size']}, {model['dtype']}, random weights, attention by {record['attention']}"
    yield source_line(name, record, more=more)
    rows = record["rows"]
    decodes = [row for row in rows if row["new_tokens"] > 1]
    prefills = [row for row in rows if row["new_tokens"] == 1]
    if decodes:
        yield "### Decoding\n"
        yield from _decode_table(decodes)
    if prefills:
        yield "### Prefill alone: seconds to the first token of every request\n"
        yield from _prefill_table(prefills)
    if "prefill_steps" in record:
        yield "### A prefill step: until the host has launched it, and until the device has run it; the same without a graph\n"
        columns = ("tokens", "launch_ms", "step_ms", "eager_launch_ms", "eager_step_ms")
        yield from table(
            ["tokens", "launched ms", "run ms", "eager launched ms", "eager run ms"],
            [[cell(row.get(column)) for column in columns] for row in record["prefill_steps"]],
        )
    yield "### The host's part of capture\n"
    columns = ("requests", "prompt_tokens", "new_tokens", "bytes_per_row", "capture_host_us_per_row", "full_ring_waits", "full_ring_seconds")  # fmt: skip
    yield from table(
        ["requests", "prompt", "new tokens", "bytes a row", "host us a row", "waits for a slot", "seconds waited"],
        [[cell(row.get(column)) for column in columns] for row in rows],
    )  # fmt: skip
    for row in decodes:
        if "decode_step" in row:
            yield from _kernels(row)


def _ratio(row: Row) -> str:
    low, high = row["interval_95"]
    middle = f", median {statistics.median(row['ratios']):.4f}" if "ratios" in row else ""
    return f"{row['on_over_off']:.4f} [{low:.4f}, {high:.4f}]{middle}, {row['rounds']} rounds"


def _decode_table(rows: Sequence[Row]) -> list[str]:
    header = ["requests", "prompt + new", "tokens/s with capture", "without", "with / without", "step ms", "floor ms",
              "share of floor", "host us a token", "step on the device, with / without, ms"]  # fmt: skip
    lines = [
        [
            str(row["requests"]),
            f"{row['prompt_tokens']} + {row['new_tokens']}",
            cell(row["on"]["tokens_per_second"], 1),
            cell(row["off"]["tokens_per_second"], 1),
            _ratio(row),
            cell(row["on"]["decode_step_ms"]),
            cell(row.get("floor_ms")),
            _percent(row.get("share_of_floor")),
            cell(row["on"]["host_us_per_token"], 1),
            " / ".join(cell(row["device_step_ms"][name]["median"]) for name in ("on", "off"))
            if "device_step_ms" in row
            else "",
        ]
        for row in rows
    ]
    return table(header, lines)


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{share:.1%}"


def _prefill_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        [
            str(row["requests"]),
            str(row["prompt_tokens"]),
            cell(row["on"]["seconds"], 4),
            cell(row["off"]["seconds"], 4),
            _ratio(row),
            cell(row["requests"] * row["prompt_tokens"] / row["on"]["seconds"], 0),
        ]
        for row in rows
    ]
    return table(["requests", "prompt", "seconds with capture", "without", "with / without", "prompt tokens/s"], lines)  # fmt: skip


def _kernels(row: Row) -> Iterator[str]:
    step = row["decode_step"]
    yield f"### Where a decode step's time goes, {row['requests']} requests: {step['kernels_us']:.1f} us of kernels\n"
    lines = [[f"`{name}`", cell(us, 1), str(calls)] for name, (us, calls) in step["largest"].items()]  # fmt: skip
    yield from table(["kernel", "us", "calls"], lines)


def l1_cache_section(name: str, record: Row) -> Iterator[str]:
    """Yield what a preference for L1 cache is worth."""
    yield "## The GEMMs of few rows, with the L1 cache that they ask for and without\n"
    yield source_line(name, record, more=", random weights, one request")
    columns = ("runner", "l1_cache", "decode_step_ms")
    yield from table(
        ["runner", "L1 cache", "step ms, median of turns", "turns"],
        [[*(cell(row[column]) for column in columns), str(len(row["turns_ms"]))] for row in record["rows"]],
    )  # fmt: skip


def capture_section(name: str, record: Row) -> Iterator[str]:
    """Yield what the check of the capture pipeline found."""
    yield "## The capture pipeline\n"
    yield source_line(name, record, more=f", {record.get('model', 'stand-in model')}")
    if record.get("gather"):
        yield "### Gather, check and reset of a step's rows\n"
        yield from rows_table(record["gather"])
    if record.get("exact"):
        yield "### Rows of requests that come and go, compared one by one\n"
        yield from rows_table(record["exact"])
    if record.get("slow_host"):
        yield "### Graphs and submitter beside a slow host\n"
        yield from rows_table([{"host": label, **row} for label, row in record["slow_host"].items()])  # fmt: skip
    streams = {label: row for label, row in record.get("streams", {}).items() if "trace_on" in row}
    if streams:
        yield "### The forward stream in a profiler trace\n"
        yield from rows_table([_stream_row(label, row) for label, row in streams.items()])
    if record.get("host_time"):
        yield "### The host's time\n"
        yield from rows_table([{"step": label, **row} for label, row in record["host_time"].items()])  # fmt: skip
    if record.get("replay_buffer"):
        yield "### Given ids to the device\n"
        filled = record["replay_buffer"]["fill_us_median"]
        yield f"{record['replay_buffer']['steps_equal']} steps equal.\n"
        yield from table(["rows", "us on the host"], [[rows, cell(us, 1)] for rows, us in filled.items()])  # fmt: skip


def _stream_row(label: str, row: Row) -> Row:
    on, off = row["trace_on"], row["trace_off"]
    speed = row.get("speed_on_over_off", {})
    return {
        "step": label,
        "waits on it": on["forward_waits"],
        "copies to host on it": on["copies_to_host_on_forward"],
        "gap between steps us": on["gap_between_steps_us"]["median"],
        "without capture": off["gap_between_steps_us"]["median"],
        "gather us": on["gather_us"]["median"],
        "speed with / without": speed.get("median"),
        "lowest round": speed.get("min"),
        "highest": speed.get("max"),
    }


def kernel_section(title: str) -> Callable[[str, Row], Iterator[str]]:
    """Return what yields the section of a kernel's check: its lists of rows, one table for each kind of row."""

    def section(name: str, record: Row) -> Iterator[str]:
        yield f"## {title}\n"
        passed = [
            f"{key.replace('_', ' ')}: {cell(value)}"
            for key, value in record.items()
            if isinstance(value, bool)
        ]
        passed += [f"{key.replace('_', ' ')}: {value}" for key, value in record.get("checks_passed", {}).items()]  # fmt: skip
        yield source_line(name, record, more=f"; checks passed: {', '.join(passed)}" if passed else "")  # fmt: skip
        for label, rows in record.items():
            if label in ("accuracy", "sweep") or not _is_rows(rows):
                continue
            if label != "rows":
                yield f"### {label.replace('_', ' ').capitalize()}\n"
            yield from rows_table(rows)
        if _is_rows(record.get("accuracy")):
            worst = max(float(row["relative_error"]) for row in record["accuracy"])
            yield f"Accuracy: {len(record['accuracy'])} cases, worst relative error {worst:.1e}.\n"

    return section


def attention_peers_section(name: str, record: Row) -> Iterator[str]:
    """Yield paged attention beside public peers: a table of times and one of what their planning costs the host."""
    shape = record["shape"]
    yield "## Paged attention beside public peers\n"
    more = f", FlashInfer {record['flashinfer-python']}" if "flashinfer-python" in record else ""
    more += f"; {shape['heads']} query and {shape['kv_heads']} KV heads of {shape['head_dim']}, {shape['dtype']}, blocks of {shape['block_size']} tokens, cold keys"
    yield source_line(name, record, more=more)
    yield (
        "Microseconds of a layer with the 20th and 80th percentile, and the time over ours, round by round. Planning on the host "
        "before every step is not in the times.\n"
    )
    for kind, unit in (("decode", "tb_per_s"), ("prefill", "tflop_per_s")):
        rows = record[kind]
        if rows:
            yield f"### {kind.capitalize()}\n"
            label = {"decode": "sequences x context", "prefill": "step"}[kind]
            yield from _by_entrant(label, rows, lambda row, unit=unit: _peer_cell(row, unit))
    planned = [row for row in (*record["decode"], *record["prefill"]) if "plan_host_us" in row]
    if planned:
        yield "### Planning before every step, microseconds of the host\n"
        yield from _by_entrant("step", planned, lambda row: cell(row["plan_host_us"]))
    if record["not_measured"]:
        yield "### Not measured\n"
        for row in record["not_measured"]:
            where = f" ({row['case']})" if row["case"] else ""
            yield f"- {row['entrant']}{where}: {row['what']}: {row['reason']}"
        yield ""


def _by_entrant(label: str, rows: Sequence[Row], text_of: Callable[[Row], str]) -> list[str]:
    """Return a table with a line for each case and a column for each entrant."""
    found = {(row["case"], row["entrant"]): row for row in rows}
    cases = list(dict.fromkeys(case for case, _ in found))
    entrants = list(dict.fromkeys(entrant for _, entrant in found))
    lines = [
        [case, *(text_of(found[case, name]) if (case, name) in found else "" for name in entrants)]
        for case in cases
    ]
    return table([label, *entrants], lines)


def _peer_cell(row: Row, unit: str) -> str:
    digits, name = (2, "TB/s") if unit == "tb_per_s" else (0, "TFLOP/s")
    text = f"{cell(row)}, {row[unit]:.{digits}f} {name}"
    if row["entrant"] != "ours" and "time_over_ours" in row:
        text += f", x {row['time_over_ours']['ratio']:.3f}"
    return text


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


SECTIONS: Sequence[tuple[str, Callable[[str, Row], Iterator[str]]]] = (
    ("engine_exactness*.json", exactness_section),
    ("engine_gpu*.json", speed_section),
    ("engine_l1_cache.json", l1_cache_section),
    ("engine_capture*.json", capture_section),
    ("attention.json", kernel_section("Attention, norm and rotation")),
    ("attention_peers.json", attention_peers_section),
    ("linear.json", kernel_section("A few rows times a weight")),
    ("sampling.json", kernel_section("Sampling")),
)


def document(results: Path) -> str:
    """Return docs/engine_performance.md for the results in a folder."""
    lines = [INTRO]
    for pattern, section in SECTIONS:
        for path in sorted(results.glob(pattern)):
            lines += section(path.name, json.loads(path.read_text()))
    if len(lines) == 1:
        lines.append(NOTHING)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write or compare the document."""
    text = document(RESULTS)
    if DOCUMENT.is_file() and DOCUMENT.read_text() == text:
        return
    if "--check" in sys.argv:
        sys.exit(f"docs/engine_performance.md differs from docs/results; run python {sys.argv[0]}")
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
