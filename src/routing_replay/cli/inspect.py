"""`routing-replay inspect`: describe and validate a trace, a store of traces, or a rollout."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from routing_replay.errors import ConfigError, RoutingReplayError
from routing_replay.trace import (
    RolloutReader,
    RoutingTrace,
    TraceStoreReader,
    is_rollout,
    load_trace,
)

__all__ = ["InspectOptions", "run_inspect"]

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions:
    """Describe and validate a trace (.rrt), a store of traces (.rrs), or a rollout.

    Example: routing-replay inspect rollout/
    """

    path: Positional[Annotated[Path, arg(metavar="FILE")]]
    """A trace file, a store, or a folder that "routing-replay rollout" wrote."""

    json: bool = False
    """Print JSON."""


def _describe(trace: RoutingTrace) -> dict[str, object]:
    return {
        "tokens": [trace.start, trace.end],
        "rows": trace.num_rows,
        "valid_rows": int(trace.valid.sum()),
        "moe_layers": trace.num_moe_layers,
        "num_layers": trace.num_layers,
        "layer_ids": list(trace.layer_ids),
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "ordered": trace.ordered,
        "weights_version": [list(run) for run in trace.weights_version],
        "weights": None if trace.weights is None else trace.weights.dtype.name,
    }


def _summarise(named: Iterable[tuple[str, RoutingTrace | RoutingReplayError]]) -> dict[str, object]:
    """Totals over many traces, and what is wrong with which."""
    problems: dict[str, str] = {}
    layouts: set[tuple[object, ...]] = set()
    count = rows = valid = 0
    for key, trace in named:
        count += 1
        if isinstance(trace, RoutingReplayError):
            problems[key] = str(trace)
            continue
        rows += trace.num_rows
        valid += int(trace.valid.sum())
        layouts.add((trace.num_layers, trace.layer_ids, trace.num_experts, trace.top_k))
    return {
        "traces": count,
        "rows": rows,
        "valid_rows": valid,
        "layouts": [
            {"num_layers": n, "layer_ids": list(ids), "num_experts": experts, "top_k": k}
            for n, ids, experts, k in sorted(layouts, key=str)
            if isinstance(ids, tuple)
        ],
        "problems": problems,
    }


def _traces_of(reader: TraceStoreReader) -> Iterable[tuple[str, RoutingTrace | RoutingReplayError]]:
    for key in reader:
        try:
            trace = reader[key]
            trace.validate()
            yield key, trace
        except RoutingReplayError as err:
            yield key, err


def _inspect_rollout(path: Path) -> dict[str, object]:
    with RolloutReader(path) as rollout:
        found = _summarise(_traces_of(rollout.traces))
        tokens = 0
        problems = found["problems"]
        assert isinstance(problems, dict)
        try:
            # Each sample is checked against its trace as it is read.
            tokens = sum(len(sample.token_ids) for sample in rollout)
        except RoutingReplayError as err:
            problems["samples.jsonl"] = str(err)
        return {"samples": len(rollout), "tokens": tokens, **found, "facts": rollout.facts}


def _inspect(path: Path) -> dict[str, object]:
    if not path.exists():
        raise ConfigError(f"path={path} does not exist; pass a trace, a store, or a rollout")
    if path.is_file():
        trace = load_trace(path)
        size = path.stat().st_size
        per_row = {"bytes_per_row": round(size / trace.num_rows, 2)} if trace.num_rows else {}
        return {"kind": "trace", "file_bytes": size, **per_row, **_describe(trace)}
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if is_rollout(path):
        return {"kind": "rollout", "file_bytes": size, **_inspect_rollout(path)}
    with TraceStoreReader(path) as reader:
        return {"kind": "store", "file_bytes": size, **_summarise(_traces_of(reader))}


def run_inspect(options: InspectOptions) -> int:
    """Describe and validate.

    Args:
        options: What to look at.

    Returns:
        0 if everything is valid, otherwise 1.

    Raises:
        ConfigError: There is nothing at the path.
        TraceFormatError: The file is not a valid trace.
    """
    found = _inspect(options.path)
    problems = found.get("problems", {})
    assert isinstance(problems, dict)
    if options.json:
        print(json.dumps(found))
        return 1 if problems else 0
    width = max(map(len, found))
    for name, value in found.items():
        if name not in ("problems", "layouts", "facts"):
            print(f"{name:<{width}}  {value}")
    layouts = found.get("layouts", [])
    assert isinstance(layouts, list)
    for layout in layouts:
        print(f"{'layout':<{width}}  " + ", ".join(f"{k} {v}" for k, v in layout.items()))
    for key, problem in list(problems.items())[:_SHOWN_PROBLEMS]:
        print(f"{'PROBLEM':<{width}}  {key}: {problem}")
    if len(problems) > _SHOWN_PROBLEMS:
        print(f"{'':<{width}}  and {len(problems) - _SHOWN_PROBLEMS} more; --json lists all")
    print(f"{'valid':<{width}}  {'no' if problems else 'yes'}")
    return 1 if problems else 0
