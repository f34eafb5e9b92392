"""`routing-replay export`: traces in a shape that other programs read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from routing_replay.errors import ConfigError
from routing_replay.trace import (
    EXPORT_FORMATS,
    RolloutReader,
    RoutingTrace,
    TraceStoreReader,
    is_rollout,
    load_trace,
)

__all__ = ["ExportOptions", "run_export"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Write a trace, or every trace of a store or a rollout, in a shape that other programs read.

    Example: routing-replay export rollout/ --to vllm -o exported/
    """

    path: Positional[Path]
    """A trace file (.rrt), a store (.rrs), or a folder that "routing-replay rollout" wrote."""

    to: str
    """npz, safetensors, or vllm (the routed_experts field)."""

    output: Annotated[Path, arg(aliases=["-o"])]
    """A file for one trace; for many, a folder that does not exist yet or is empty."""

    json: bool = False
    """Print a JSON summary."""


def _load(path: Path) -> dict[str, RoutingTrace] | RoutingTrace:
    if not path.exists():
        raise ConfigError(f"path={path} does not exist; pass a trace, a store, or a rollout")
    if path.is_file():
        return load_trace(path)
    if is_rollout(path):
        with RolloutReader(path) as rollout:
            return {sample.key: sample.trace for sample in rollout}
    with TraceStoreReader(path) as reader:
        return {key: reader[key] for key in reader}


def run_export(options: ExportOptions) -> int:
    """Export.

    Args:
        options: What to export, and to what.

    Returns:
        0.

    Raises:
        ConfigError: The format is not known, or the output is there already.
        TraceMismatchError: The format cannot express a trace.
    """
    formats = {item.name: item for item in EXPORT_FORMATS}
    if options.to not in formats:
        known = "; ".join(f"{item.name} ({item.description})" for item in EXPORT_FORMATS)
        raise ConfigError(f"to={options.to!r}; accepted are {known}")
    chosen = formats[options.to]
    loaded = _load(options.path)
    if isinstance(loaded, RoutingTrace):
        if options.output.exists():
            raise ConfigError(f"output={options.output} is there already; choose another file")
        written = {options.output: chosen.encode(loaded)}
        options.output.parent.mkdir(parents=True, exist_ok=True)
    else:
        if options.output.exists() and any(options.output.iterdir()):
            raise ConfigError(
                f"output={options.output} holds something already; choose an empty folder"
            )
        # Everything is encoded before anything is written: a trace that cannot be expressed leaves no half export.
        written = {
            options.output / f"{number:06d}{chosen.suffix}": chosen.encode(trace)
            for number, trace in enumerate(loaded.values())
        }
        options.output.mkdir(parents=True, exist_ok=True)
        names = {f"{number:06d}{chosen.suffix}": key for number, key in enumerate(loaded)}
        written[options.output / "index.json"] = (json.dumps(names, indent=2) + "\n").encode()
    for path, data in written.items():
        path.write_bytes(data)
    num_bytes = sum(map(len, written.values()))
    count = 1 if isinstance(loaded, RoutingTrace) else len(loaded)
    if options.json:
        print(
            json.dumps(
                {
                    "format": chosen.name,
                    "traces": count,
                    "bytes": num_bytes,
                    "output": str(options.output),
                }
            )
        )
    else:
        print(f"{count} traces as {chosen.name}, {num_bytes} bytes -> {options.output}")
    return 0
