"""What is in a file, a store, a rollout or an engine's responses, and what is wrong with it: `routing-replay inspect`.

Depends on numpy alone, so that it works where an engine or a trainer pins everything else.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from routing_replay.errors import ConfigError, RoutingDiagnosisError, RoutingReplayError
from routing_replay.trace._file import load_trace
from routing_replay.trace._model_routing import ModelRouting
from routing_replay.trace._rollout import RolloutReader, is_rollout
from routing_replay.trace._store_reader import TraceStoreReader
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.importers import (
    Finding,
    ImportedChoice,
    diagnose,
    find_shared_rows,
    import_response,
)

__all__ = ["inspect_path", "inspect_responses"]

_RESPONSES = (".json", ".jsonl")

_Object = dict[str, object]


@dataclass(frozen=True, slots=True)
class _Sent:
    """One response, with what its request said."""

    name: str
    body: Mapping[str, object] | Sequence[object]
    prompt_token_ids: Sequence[int] | None
    start: int


def inspect_path(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    prompt_token_ids: Sequence[int] | None = None,
    start: int = 0,
) -> _Object:
    """Describe and validate what lies at a path.

    Args:
        path: A trace (`.rrt`), a store (`.rrs`), a rollout, or responses of an engine: `.json` (one, or a list of SGLang's)
            or `.jsonl` (one a line). A response may be wrapped as `{"response": ..., "prompt_token_ids": [...],
            "start": 0}`.
        config: The model's `config.json`, which responses need.
        prompt_token_ids: The prompt of responses that do not repeat it.
        start: The request's `routed_experts_prompt_start` or `routed_experts_start_len`.

    Returns:
        Facts as JSON values. `problems` maps names to what is wrong; `findings` lists what the diagnosis of responses
        found. Both are absent or empty where everything is valid.

    Raises:
        ConfigError: There is nothing at the path, or responses come without `config`.
        TraceFormatError: A trace or response is damaged.
    """
    place = Path(path)
    if not place.exists():
        raise ConfigError(
            f"path={place} does not exist; pass a trace, a store, a rollout, or an engine's response"
        )
    if place.is_file():
        if place.suffix in _RESPONSES:
            return _responses_of(place, config, prompt_token_ids, start)
        trace = load_trace(place)
        size = place.stat().st_size
        per_row = {"bytes_per_row": round(size / trace.num_rows, 2)} if trace.num_rows else {}
        return {"kind": "trace", "file_bytes": size, **per_row, **_describe(trace)}
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    if is_rollout(place):
        return {"kind": "rollout", "file_bytes": size, **_rollout(place)}
    with TraceStoreReader(place) as reader:
        return {"kind": "store", "file_bytes": size, **_summarise(_traces_of(reader))}


def _describe(trace: RoutingTrace) -> _Object:
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


def _summarise(named: Iterable[tuple[str, RoutingTrace | RoutingReplayError]]) -> _Object:
    """Totals over many traces, and what is wrong with which."""
    problems: dict[str, str] = {}
    layouts: set[tuple[int, tuple[int, ...], int, int]] = set()
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
            for n, ids, experts, k in sorted(layouts)
        ],
        "problems": problems,
    }


def _traces_of(reader: TraceStoreReader) -> Iterator[tuple[str, RoutingTrace | RoutingReplayError]]:
    for key in reader:
        try:
            trace = reader[key]
            trace.validate()
            yield key, trace
        except RoutingReplayError as err:
            yield key, err


def _rollout(path: Path) -> _Object:
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


def _responses_of(
    path: Path,
    config: str | os.PathLike[str] | None,
    prompt_token_ids: Sequence[int] | None,
    start: int,
) -> _Object:
    if config is None:
        raise ConfigError(
            f"{path} is read as an engine's response, and the model's config is not given; pass --config config.json "
            "(traces end in .rrt)"
        )
    routing = ModelRouting.from_config(config)
    sent = [_sent(value, name, prompt_token_ids, start) for name, value in _loaded(path)]
    found = inspect_responses(
        {item.name: (item.body, item.prompt_token_ids, item.start) for item in sent}, routing
    )
    return {"kind": "responses", "file_bytes": path.stat().st_size, **found}


def _loaded(path: Path) -> Iterator[tuple[str, object]]:
    text = path.read_text(encoding="utf-8")
    parts = [("response", text)]
    if path.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), start=1)
        parts = [(f"line {number}", line) for number, line in lines if line.strip()]
    for name, part in parts:
        try:
            yield name, json.loads(part)
        except ValueError as err:
            raise ConfigError(
                f"{path}, {name}, is not JSON ({err}); pass an engine's response"
            ) from err


def _sent(value: object, name: str, prompt_token_ids: Sequence[int] | None, start: int) -> _Sent:
    if isinstance(value, dict) and "response" in value:
        return _Sent(
            name,
            value["response"],
            value.get("prompt_token_ids", prompt_token_ids),
            value.get("start", start),
        )
    if not isinstance(value, dict | list):
        raise ConfigError(f"{name} is a {type(value).__name__}; pass an engine's response, a JSON object")  # fmt: skip
    return _Sent(name, value, prompt_token_ids, start)


def inspect_responses(
    responses: Mapping[
        str, tuple[Mapping[str, object] | Sequence[object], Sequence[int] | None, int]
    ],
    routing: ModelRouting,
) -> _Object:
    """Import and diagnose responses, also against each other.

    Args:
        responses: Name to body, prompt (None where the body holds it), and token index of the first row.
        routing: The model.

    Returns:
        Facts as JSON values, with `problems` and `findings` as `inspect_path` returns them.
    """
    traces: dict[str, tuple[RoutingTrace, Sequence[int]]] = {}
    findings: list[tuple[str, Finding]] = []
    problems: dict[str, str] = {}
    sources: set[str] = set()
    for name, (body, prompt, start) in responses.items():
        try:
            choices = import_response(body, routing=routing, prompt_token_ids=prompt, start=start)
        except RoutingReplayError as err:
            problems[name] = str(err)
            if isinstance(err, RoutingDiagnosisError):
                findings += [(name, item) for item in err.findings if isinstance(item, Finding)]
            continue
        for choice in choices:
            key = name if len(choices) == 1 else f"{name}, choice {choice.index}"
            sources.add(choice.source)
            tokens = [*choice.prompt_token_ids, *choice.token_ids]
            traces[key] = (choice.trace, tokens)
            findings += [(key, item) for item in _warnings(choice, tokens, routing)]
    for item in find_shared_rows(traces):
        findings.append(("responses", item))
        problems[f"rows {len(problems)}"] = str(item)
    return {
        "responses": len(responses),
        "sources": sorted(sources),
        **_summarise((name, trace) for name, (trace, _) in traces.items()),
        "findings": [_as_json(name, item) for name, item in findings],
        "problems": problems,
    }


def _warnings(
    choice: ImportedChoice, tokens: Sequence[int], routing: ModelRouting
) -> tuple[Finding, ...]:
    """What is suspicious about rows that were accepted."""
    trace = choice.trace
    if not trace.is_complete:
        return ()
    return diagnose(
        trace.ids, token_ids=tokens, routing=routing, start=trace.start, all_layers=False
    )


def _as_json(name: str, finding: Finding) -> _Object:
    return {
        "where": name,
        "code": finding.code,
        "severity": finding.severity,
        "message": finding.message,
        "row": finding.row,
        "layer_idx": finding.layer_idx,
        "values": list(finding.values),
        "cause": finding.cause,
        "upstream": list(finding.upstream),
    }
