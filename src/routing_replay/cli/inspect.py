"""`routing-replay inspect`: describe and validate a trace, a store, a rollout, or an engine's responses.

Its arguments are read by the standard library: it is the one command that works where numpy alone is installed.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from routing_replay.errors import ConfigError
from routing_replay.trace.inspection import inspect_path

__all__ = ["InspectOptions", "parse_inspect", "run_inspect"]

_SHOWN_PROBLEMS = 10
_LISTED = ("problems", "layouts", "facts", "findings")


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions:
    """What to look at.

    Attributes:
        path: A trace (.rrt), a store (.rrs), a rollout, or an engine's responses (.json, .jsonl).
        config: The model's config.json, which responses need.
        prompt: A JSON file with the prompt's token ids, where responses do not repeat them.
        start: Token index of the responses' first row.
        json: Print JSON.
    """

    path: Path
    config: Path | None = None
    prompt: Path | None = None
    start: int = 0
    json: bool = False


def parse_inspect(arguments: Sequence[str]) -> InspectOptions:
    """Read the command's arguments; exits with 2 where they are wrong, with 0 after --help.

    Args:
        arguments: Words after the command's name.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="routing-replay inspect",
        description="Describe and validate a trace, a store, a rollout, or an engine's responses.",
        epilog="Example: routing-replay inspect rollout/ | routing-replay inspect response.json --config config.json",
    )
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="a trace (.rrt), a store (.rrs), a rollout, or responses of vLLM, SGLang, NeMo-RL or Megatron (.json, or .jsonl with one a line)")  # fmt: skip
    add("--config", type=Path, metavar="FILE", help="the model's config.json, which responses need")  # fmt: skip
    add("--prompt", type=Path, metavar="FILE", help="a JSON list of the prompt's token ids, where responses do not repeat them")  # fmt: skip
    add("--start", type=int, default=0, metavar="N", help="token index of the first row (routed_experts_prompt_start, routed_experts_start_len)")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    return InspectOptions(**vars(parser.parse_args(list(arguments))))


def _token_ids(path: Path) -> list[int]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ConfigError(f"prompt={path} cannot be read ({err}); pass a JSON list of token ids") from err  # fmt: skip
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ConfigError(f"prompt={path} holds no list of token ids; pass one such as [1, 2, 3]")
    return value


def _print(found: Mapping[str, object]) -> None:
    width = max(map(len, (*found, "PROBLEM")))
    for name, value in found.items():
        if name not in _LISTED:
            print(f"{name:<{width}}  {value}")
    layouts, findings = found.get("layouts", []), found.get("findings", [])
    assert isinstance(layouts, list)
    assert isinstance(findings, list)
    for layout in layouts:
        print(f"{'layout':<{width}}  " + ", ".join(f"{k} {v}" for k, v in layout.items()))
    for finding in findings:
        known = f" (known: {', '.join(finding['upstream'])})" if finding["upstream"] else ""
        print(f"{finding['severity'].upper():<{width}}  {finding['where']}: {finding['code']}: {finding['message']}")  # fmt: skip
        print(f"{'':<{width}}  {finding['cause']}{known}")
    problems = found.get("problems", {})
    assert isinstance(problems, dict)
    explained = {finding["where"] for finding in findings}
    untold = [
        (key, problem)
        for key, problem in problems.items()
        if key not in explained and not key.startswith("rows ")
    ]
    for key, problem in untold[:_SHOWN_PROBLEMS]:
        print(f"{'PROBLEM':<{width}}  {key}: {problem}")
    if len(untold) > _SHOWN_PROBLEMS:
        print(f"{'':<{width}}  and {len(untold) - _SHOWN_PROBLEMS} more; --json lists all")
    print(f"{'valid':<{width}}  {'no' if problems else 'yes'}")


def run_inspect(options: InspectOptions) -> int:
    """Describe and validate.

    Args:
        options: What to look at.

    Returns:
        0 if everything is valid, otherwise 1.

    Raises:
        ConfigError: There is nothing at the path, or responses come without a config.
        TraceFormatError: The file is not a valid trace.
    """
    found = inspect_path(
        options.path,
        config=options.config,
        prompt_token_ids=None if options.prompt is None else _token_ids(options.prompt),
        start=options.start,
    )
    if options.json:
        print(json.dumps(found))
    else:
        _print(found)
    return 1 if found.get("problems") else 0
