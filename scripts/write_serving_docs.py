"""Write the tables of docs/serving.md from the committed results of the server, whichever there are.

python scripts/write_serving_docs.py           writes them
python scripts/write_serving_docs.py --check   only compares
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
DOCUMENT = ROOT / "docs" / "serving.md"
NOTHING = "No result has been committed yet."
Row = dict[str, Any]


def source_line(name: str, record: Row, more: str = "") -> str:
    """Name machine, versions and commit of a result."""
    machine, versions = record["machine"], record["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, load average {machine['load_average_at_start']:.1f} at the start, torch "
        f"{versions['torch']}, Python {versions['python']}, commit {record['commit']}{more}; [{name}](results/{name})."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a Markdown table, numbers to the right."""
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'|'.join(['--:'] * (len(header) - 1))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def of_phase(record: Row, phase: str) -> Row:
    """Return a result whose commit is that of one of its phases."""
    return {**record, "commit": record.get("commits", {}).get(phase, record["commit"])}


def milliseconds(found: Row) -> str:
    """Return a time with its interval."""
    low, high = found["interval_95"]
    return f"{found['median']:.2f} [{low:.2f}, {high:.2f}]"


def ratio(found: Row) -> str:
    """Return a paired ratio with its interval."""
    low, high = found["interval_95"]
    return f"{found['median']:.3f} [{low:.3f}, {high:.3f}], {found['rounds']} rounds"


def counted(found: Mapping[str, int]) -> str:
    """Return what was counted, the most frequent first."""
    return ", ".join(
        f"{count} {what}" for what, count in sorted(found.items(), key=lambda item: -item[1])
    )


def rows_section(name: str, record: Row) -> Iterator[str]:
    """Yield what the comparison of every row found."""
    if "rows" not in record:
        yield NOTHING
        return
    found = record["rows"]
    yield (
        f"{found['requests']} requests over {found['streams']} concurrent streams (`--batch-invariant`): {found['lost']} lost, "
        f"{found['other_tokens']} with other tokens, {found['mixed_up']} with other rows than offline generation; "
        f"{found['rows_equal']} rows equal in every id. The twin, compared with another request's rows, "
        f"{'differs' if found['twin_differs'] else 'DOES NOT DIFFER'}."
    )
    yield ""
    yield source_line(name, of_phase(record, "rows"), f", {record['model']}")


def cost_section(name: str, record: Row) -> Iterator[str]:
    """Yield throughput and latencies with and without routing."""
    if "cost" not in record:
        yield NOTHING
        return
    found = record["cost"]
    speed, work = found["tokens_per_second"], found["cpu_us_a_token"]
    yield (
        f"{found['concurrency']} concurrent requests, {found['max_tokens']} new tokens each, {found['requests_a_round']} requests "
        "a round, arms in turn; ratios within a round, median with 95 % bootstrap interval."
    )
    yield ""
    yield from table(
        ["", "tokens/s", "beside captured but not returned", "beside no capture", "processor us a token", "beside captured", "beside no capture"],
        [
            ["no capture", f"{speed['no capture']:.0f}", "", "", f"{work['no capture']:.0f}", "", ""],
            ["captured, not returned", f"{speed['captured']:.0f}", "1", "", f"{work['captured']:.0f}", "1", ""],
            ["captured and returned (`trace`, `packed+zstd`)", f"{speed['returned']:.0f}",
             ratio(found["returned_over_captured"]), ratio(found["returned_over_no_capture"]), f"{work['returned']:.0f}",
             ratio(found["cpu_returned_over_captured"]), ratio(found["cpu_returned_over_no_capture"])],
        ],
    )  # fmt: skip
    yield ""
    times = ("time_to_first_token", "between_tokens")
    yield from table(
        [f"{found['concurrency']} streams, ms", *(f"{label} {p}" for label in ("first token", "between tokens") for p in ("p50", "p99"))],
        [[side, *(f"{row[kind][p]:.1f}" for kind in times for p in ("p50_ms", "p99_ms"))] for side, row in found["streams"].items()],
    )  # fmt: skip
    yield ""
    yield source_line(name, of_phase(record, "cost"), f", {record['model']}")


def formats_section(name: str, record: Row) -> Iterator[str]:
    """Yield the cost of each form."""
    if "formats" not in record:
        yield NOTHING
        return
    yield from table(
        ["form", "bytes a row", "ms added to a request alone", "throughput beside none", "processor time beside none"],
        [
            [row["format"], f"{row['bytes_a_row']:.1f}", milliseconds(row["ms_alone"]), ratio(row["throughput"]), ratio(row["cpu"])]
            for row in record["formats"]
        ],
    )  # fmt: skip
    yield ""
    yield source_line(name, of_phase(record, "formats"), f", {record['model']}")


def encode_section(name: str, record: Row) -> Iterator[str]:
    """Yield the processor time of making each form."""
    short, long = (record["responses"][length] for length in ("short", "long"))
    model = record["model"]
    yield (
        "What the server does to make a form, from rows to the JSON text that is sent, at the shape of Qwen3-30B-A3B "
        f"({model['num_layers']} layers, {model['num_experts']} experts, top {model['top_k']}): a response of {short['prompt']} + {short['output']} tokens and one of {long['prompt']} + "
        f"{long['output']}; median of {short['rounds']} and {long['rounds']} rounds, forms in turn."
    )
    yield ""
    yield from table(
        ["form", "bytes a row", "short: us a row", "ms", "long: us a row", "ms"],
        [
            [row["format"], f"{row['bytes_a_row']:.1f}", f"{row['us_a_row']:.2f}", f"{row['ms_a_response']:.1f}",
             f"{other['us_a_row']:.2f}", f"{other['ms_a_response']:.0f}"]
            for row, other in zip(short["forms"], long["forms"], strict=True)
        ],
    )  # fmt: skip
    yield ""
    yield source_line(name, record)


def stall_section(name: str, record: Row) -> Iterator[str]:
    """Yield waits between tokens of other streams."""
    yield (
        f"{record['context']} tokens of context, {record['model']}; {record['streams']} other streams, each case "
        f"{record['repeats']} times. Waits between tokens of those streams that overlap the request for the long context, whose "
        "prefix is cached: one step computes its last two tokens, with routing or without, then its rows leave. The last column "
        "holds the waits that begin after that step."
    )
    yield ""
    yield from table(
        ["long request", "MB", "its own ms", "others' p50 ms", "longest", "longest while rows leave"],
        [
            [row["case"], f"{row['response_bytes'] / 1e6:.2f}", f"{row['response_ms']:.0f}",
             f"{row['gaps']['p50_ms']:.1f}", f"{row['gaps']['max_ms']:.1f}",
             "" if row["while_rows_leave"] is None else f"{row['while_rows_leave']['max_ms']:.1f}"]
            for row in record["rows"]
        ],
    )  # fmt: skip
    yield ""
    yield source_line(name, record)


def faults_section(name: str, record: Row) -> Iterator[str]:
    """Yield what each request got."""
    rows: list[list[str]] = []
    for row in record["rows"]:
        if "not_measured" in row:
            rows.append([row["scenario"], f"not measured: {row['not_measured']}", "", ""])
            continue
        beside = [
            f"{label.replace('_', ' ')}: {counted(row[label])}"
            for label in ("afterwards", "sent_after_the_signal", "inline_afterwards", "beside_them")
            if label in row
        ]
        then = [
            f"{label.replace('_', ' ')} {row[label]:.1f}"
            for label in (
                "seconds_until_told",
                "seconds_until_ready",
                "seconds_until_exit",
                "seconds_until_idle",
            )
            if label in row
        ]
        if "exit_code" in row:
            then.append(f"exit code {row['exit_code']}")
        grown = row.get("memory_growth_mb")
        memory = "" if grown is None else f"API {grown['api']:+.1f}, engine {grown['engine']:+.1f}"
        rows.append([row["scenario"], "; ".join([counted(row["outcomes"]), *beside]), ", ".join(then), memory])  # fmt: skip
    yield from table(["fault", "what requests got", "then", "memory, MB"], rows)
    yield ""
    yield (
        "Idle: no request open, none running or waiting, every KV block free. Nothing hung is part of each scenario: a request "
        "without an answer after 60 s would stand in the table."
    )
    yield ""
    yield source_line(name, record, f", {record['model']}")


def soak_section(name: str, record: Row) -> Iterator[str]:
    """Yield memory and blocks over a long time."""
    before, after, slope = (
        record["at_rest_before"],
        record["at_rest_after"],
        record["growth_mb_per_hour"],
    )
    failed = sum(record["failed"].values())
    yield (
        f"{record['minutes']:g} minutes, {record['workers']} workers: {counted(record['requests'])}; {failed} failed."
    )
    yield ""
    yield from table(
        ["at rest", "before", "after", "slope under load, an hour"],
        [
            ["API process, MB", f"{before['api_mb']:.1f}", f"{after['api_mb']:.1f}", f"{slope['api']:+.1f}"],
            ["engine process, MB", f"{before['engine_mb']:.1f}", f"{after['engine_mb']:.1f}", f"{slope['engine']:+.1f}"],
            ["free KV blocks", f"{before['free_blocks']:.0f}", f"{after['free_blocks']:.0f}", ""],
        ],
    )  # fmt: skip
    yield ""
    yield source_line(name, record, f", {record['model']}")


def fuzz_section(name: str, record: Row) -> Iterator[str]:
    """Yield cases, 5xx and crashes."""
    document, bodies = record["document"], record["bodies"]
    rows = [
        [f"`{row['operation']}`, from the OpenAPI document", str(row["cases"]), str(row["5xx"]), str(row["hung"]),
         str(len(row["not_as_documented"]))]
        for row in document
    ]  # fmt: skip
    rows += [
        [f"by hand: {row['kind']} ({counted({str(k): v for k, v in row['answers'].items()})})", str(row["cases"]),
         str(row["5xx"]), str(row["hung"]), ""]
        for row in bodies
    ]  # fmt: skip
    every = [*document, *bodies]
    total = [sum(row[label] for row in every) for label in ("cases", "5xx", "hung")]
    rows.append(["**all**", *(f"**{count}**" for count in total), f"**{sum(len(r['not_as_documented']) for r in document)}**"])  # fmt: skip
    yield from table(["cases", "tried", "5xx", "hung", "not as documented"], rows)
    yield ""
    yield f"Crashes: {record['crashes']}. " + source_line(name, record, f", {record['model']}")


SECTIONS: Mapping[str, tuple[str, Callable[[str, Row], Iterator[str]]]] = {
    "rows": ("serving_load.json", rows_section),
    "cost": ("serving_load.json", cost_section),
    "formats": ("serving_load.json", formats_section),
    "encode": ("serving_encode.json", encode_section),
    "stall": ("serving_stall.json", stall_section),
    "faults": ("serving_faults.json", faults_section),
    "soak": ("serving_soak.json", soak_section),
    "fuzz": ("serving_fuzz.json", fuzz_section),
}


def filled(text: str, results: Path) -> str:
    """Return the document with what stands between its markers written anew."""
    for label, (name, section) in SECTIONS.items():
        path = results / name
        lines = [NOTHING] if not path.is_file() else section(name, json.loads(path.read_text()))
        body = "\n".join(lines)
        pattern = rf"(<!-- {label} -->\n).*?(<!-- end of {label} -->)"
        text, count = re.subn(
            pattern, lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            sys.exit(f"expected one pair of '{label}' markers in docs/serving.md, found {count}")
    return text


def main() -> None:
    """Write or compare the document."""
    old = DOCUMENT.read_text()
    new = filled(old, RESULTS)
    if new == old:
        return
    if "--check" in sys.argv:
        sys.exit(f"docs/serving.md differs from docs/results; run python {sys.argv[0]}")
    DOCUMENT.write_text(new)


if __name__ == "__main__":
    main()
