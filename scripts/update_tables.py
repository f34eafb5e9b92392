"""Write the tables of README and model card from the committed results; `--check` only compares.

python scripts/update_tables.py
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "demo.json"
README = ROOT / "README.md"
CARD = ROOT / "src" / "routing_replay" / "assets" / "tiny_moe" / "README.md"


def _source(record: dict[str, Any]) -> str:
    versions = record["runs"][0]["versions"]
    return (
        f"Commit {record['commit'][:12]}, {record['cpu']}, {record['runs'][0]['machine']['threads']} threads, "
        f"torch {versions['torch']}, transformers {versions['transformers']}; "
        "[docs/results/demo.json](docs/results/demo.json)."
    )


def readme_table(record: dict[str, Any]) -> str:
    """Return the headline table: the demo with its default seed."""
    run = record["runs"][0]
    native, replayed, control = run["native"], run["replayed"], run["control"]
    ratio = run["kl_ratio"]
    lines = [
        "| `make demo`: bf16 engine against float32 Transformers | native | replayed | control (trainer twice) |",
        "|---|---|---|---|",
    ]
    for label, name, form in (
        ("routing mismatch, (token, layer) pairs", "mismatch_pairs", ".2%"),
        ("routing mismatch, tokens", "mismatch_tokens", ".1%"),
        ("KL (k3), nats a token", "kl_k3", ".2e"),
        ("mean abs. difference of logprobs", "mean_abs_dlogp", ".2e"),
        ("F(2)", "f2", ".2e"),
    ):
        cells = (format(column[name], form) for column in (native, replayed, control))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        f"KL replayed / native {ratio['value']:.2f}, 95 % interval [{ratio['low']:.2f}, {ratio['high']:.2f}]; "
        f"{run['num_response_tokens']} response tokens, {run['solved']:.0%} of problems solved, coverage "
        f"{run['coverage']:.0%}, {run['num_wrong_ids']} wrong ids, {run['trace_bytes_per_token']:.0f} trace bytes a "
        f"token, {run['seconds']['total']:.0f} s. {_source(record)}",
    ]
    return "\n".join(lines)


def card_table(record: dict[str, Any]) -> str:
    """Return the figures of the fresh seeds."""
    lines = [
        "| seed | solved | response tokens | mismatch, pairs | mismatch, tokens | KL native | KL replayed | "
        "replayed / native, 95 % | F(2) native | F(2) replayed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in record["runs"][1:]:
        ratio, native, replayed = run["kl_ratio"], run["native"], run["replayed"]
        lines.append(
            f"| {run['seed']} | {run['solved']:.1%} | {run['num_response_tokens']} | {native['mismatch_pairs']:.2%} | "
            f"{native['mismatch_tokens']:.1%} | {native['kl_k3']:.2e} | {replayed['kl_k3']:.2e} | "
            f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] | {native['f2']:.1e} | {replayed['f2']:.1e} |"
        )
    return "\n".join([*lines, "", _source(record).replace("](docs", "](../../../../docs")])


def filled(text: str, table: str) -> str:
    """Return a document with the part between its two markers replaced."""
    pattern = r"(<!-- demo figures -->\n).*?(\n<!-- end of demo figures -->)"
    new, count = re.subn(pattern, lambda match: match[1] + table + match[2], text, flags=re.DOTALL)
    if count != 1:
        sys.exit(f"expected one pair of 'demo figures' markers, found {count}")
    return new


def main() -> None:
    """Update or check both documents."""
    record = json.loads(RESULT.read_text())
    stale: list[str] = []
    for path, table in ((README, readme_table(record)), (CARD, card_table(record))):
        old = path.read_text()
        new = filled(old, table)
        if new != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        sys.exit(
            f"{', '.join(stale)} differ from {RESULT.name}; run python scripts/update_tables.py"
        )


if __name__ == "__main__":
    main()
