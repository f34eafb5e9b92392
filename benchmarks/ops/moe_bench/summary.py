"""Merge files of JSON lines into one result, and print it as tables."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["as_json", "merge", "tables"]

_LISTS = {
    "layer": "layers",
    "routing": "routing",
    "ratio": "recording",
    "refused": "not_measured",
    "absent": "not_measured",
    "failed": "not_measured",
    "wrong": "not_measured",
    "skipped": "not_measured",
    "clocks": "clocks",
    "machine": "runs",
}

Row = dict[str, object]


def merge(paths: Iterable[Path]) -> dict[str, list[Row]]:
    """Merge runs; every row keeps the name of its file's run, since runs may be on different machines.

    Args:
        paths: Files that `moe_layer.py` or `routing.py` wrote.

    Returns:
        `runs`, `layers`, `routing`, `recording`, `not_measured` and `clocks`.

    Raises:
        ValueError: A file has rows but no machine, or a line is no row.
    """
    merged: dict[str, list[Row]] = {name: [] for name in dict.fromkeys(_LISTS.values())}
    for path in paths:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if not any(row.get("kind") == "machine" for row in rows):
            raise ValueError(
                f"{path} does not say on which machine it ran; it is no file of these benchmarks"
            )
        for row in rows:
            kind = row.pop("kind", None)
            if kind not in _LISTS:
                raise ValueError(
                    f"{path} has a row of kind {kind!r}; accepted are {', '.join(_LISTS)}"
                )
            is_reason = _LISTS[kind] == "not_measured"
            merged[_LISTS[kind]].append({"run": path.stem, **({"what": kind} if is_reason else {}), **row})  # fmt: skip
    return merged


def as_json(result: dict[str, list[Row]]) -> str:
    """Return a result as JSON with one row per line, so that a change of one figure is a change of one line.

    Args:
        result: What `merge` returns.

    Returns:
        The text of a file.
    """
    parts: list[str] = []
    for name, rows in result.items():
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        parts.append(f' "{name}": [\n{lines}\n ]' if rows else f' "{name}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def tables(result: dict[str, list[Row]]) -> str:
    """Return Markdown: one table per run, shape and load, one column per entrant.

    Args:
        result: What `merge` returns.

    Returns:
        Microseconds and share of the floor, the rate of the fastest, and what was not measured.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in result["layers"]:
        groups.setdefault((row["run"], row["shape"], row["zipf"]), []).append(row)
    parts = [_table(key, rows) for key, rows in groups.items()]
    parts += [
        f"recording {row['shape']} T={row['tokens']}: {row['ratio']} [{row['p20']}, {row['p80']}]"
        for row in result["recording"]
    ]
    parts += [
        f"{row['what']}: {row.get('peer', '-')} {row.get('shape', '')} {row.get('tokens', '')}: {row['reason']}"
        for row in result["not_measured"]
    ]
    return "\n".join(parts)


def _table(key: tuple[object, ...], rows: Sequence[Row]) -> str:
    peers = list(dict.fromkeys(str(row["peer"]) for row in rows))
    run, shape, zipf = key
    load = f", Zipf {zipf}" if zipf else ""
    lines = [
        f"\n{shape}{load} ({run}); us, share of the floor\n",
        f"| T | experts | floor | {' | '.join(peers)} | fastest |",
        f"|--:|--:|--:|{'--:|' * len(peers)}--:|",
    ]
    for tokens in sorted({int(str(row["tokens"])) for row in rows}):
        by_peer = {str(row["peer"]): row for row in rows if row["tokens"] == tokens}
        fastest = min(by_peer.values(), key=lambda row: float(str(row["us"])))
        cells = [_cell(by_peer.get(peer), fastest) for peer in peers]
        rate = f"{fastest['tb_per_s']} TB/s" if fastest["bound"] == "memory" else f"{fastest['tflop_per_s']} TFLOP/s"  # fmt: skip
        lines.append(
            f"| {tokens} | {float(str(fastest['touched_experts'])):.0f} | {float(str(fastest['floor_us'])):.1f} | "
            f"{' | '.join(cells)} | {rate} |"
        )
    return "\n".join(lines)


def _cell(row: Row | None, fastest: Row) -> str:
    if row is None:
        return "-"
    text = f"{float(str(row['us'])):.1f} ({100 * float(str(row['share_of_floor'])):.0f} %)"
    return f"**{text}**" if row is fastest else text
