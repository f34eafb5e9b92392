"""`routing-replay export`: traces in a shape that other programs read."""

import json
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from routing_replay.cli.resources import check_new_folder
from routing_replay.errors import ConfigError
from routing_replay.trace import (
    EXPORT_FORMATS,
    ExportFormat,
    ExportParameters,
    RolloutReader,
    RoutingTrace,
    TraceStoreReader,
    is_rollout,
    load_trace,
)
from routing_replay.trace.export import OnMissing

__all__ = ["ExportOptions", "run_export"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Write a trace, or every trace of a store or a rollout, in a shape that other programs read.

    Example: routing-replay export rollout/ --to verl -o exported/
    """

    path: Positional[Annotated[Path, arg(metavar="FILE|DIR")]]
    """A trace file (.rrt), a store (.rrs), or a folder that "routing-replay rollout" wrote."""

    to: Annotated[str, arg(metavar="FORMAT")]
    """Trainers: verl, slime, miles, prime-rl, nemo-rl, skyrl, ms-swift, areal, megatron. Engines' HTTP fields: vllm,
    vllm-generate, vllm-split, sglang, sglang-openai. All fields: npz, safetensors."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT")]
    """A file for one trace; for many, a folder that does not exist, or is empty."""

    num_tokens: int | None = None
    """Tokens of the sequence of one trace; without it, one more than the trace ends at. A rollout knows its own."""

    num_prompt_tokens: int | None = None
    """Tokens of the prompt of one trace; for vllm-split."""

    on_missing: OnMissing = "error"
    """Missing rows: an error, the trainer's own router (nemo-rl), or the experts 0 to K-1 (miles)."""

    json: bool = False
    """Print a JSON summary."""


@contextmanager
def _named_traces(
    path: Path, given: ExportParameters
) -> Generator[Iterator[tuple[str, RoutingTrace, ExportParameters]]]:
    """The traces of a rollout, checked against its tokens, or of a store, read one by one, with their lengths."""
    if is_rollout(path):
        with RolloutReader(path) as rollout:
            yield (
                (
                    sample.key,
                    sample.trace,
                    replace(
                        given,
                        num_tokens=len(sample.all_token_ids),
                        num_prompt_tokens=len(sample.prompt_token_ids),
                    ),
                )
                for sample in rollout
            )
    else:
        with TraceStoreReader(path) as reader:
            yield ((key, reader[key], given) for key in reader)


def _export_file(source: Path, chosen: ExportFormat, output: Path, given: ExportParameters) -> int:
    """Write one trace; return the bytes written."""
    if output.exists():
        raise ConfigError(f"output={output} is there already; choose another file")
    data = chosen.encode(load_trace(source), given)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(data)
    return len(data)


def _export_folder(
    source: Path, chosen: ExportFormat, output: Path, given: ExportParameters
) -> tuple[int, int]:
    """Write every trace and `index.json`, file name to key; return their number and the bytes written.

    The folder gets its name when it is whole: a trace that the format cannot express leaves no half export.
    """
    check_new_folder(output)
    output = output.absolute()  # so that it has a name, whatever was given
    partial = output.with_name(f".{output.name}.partial")
    check_new_folder(partial)
    partial.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    num_bytes = 0
    try:
        with _named_traces(source, given) as traces:
            for key, trace, parameters in traces:
                name = f"{len(names):06d}{chosen.suffix}"
                num_bytes += (partial / name).write_bytes(chosen.encode(trace, parameters))
                names[name] = key
        (partial / "index.json").write_text(json.dumps(names, indent=2) + "\n")
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return len(names), num_bytes


def run_export(options: ExportOptions) -> int:
    """Export.

    Args:
        options: What to export, and to what.

    Returns:
        0.

    Raises:
        ConfigError: The format is not known, the output is there already, there is nothing at the path, a length is
            given for more than one trace, or the format needs or refuses a parameter.
        TraceFormatError: A trace is damaged.
        TraceMismatchError: The format cannot express a trace.
    """
    formats = {item.name: item for item in EXPORT_FORMATS}
    if options.to not in formats:
        known = "; ".join(f"{item.name} ({item.description})" for item in EXPORT_FORMATS)
        raise ConfigError(f"to={options.to!r}; accepted are {known}")
    if not options.path.exists():
        raise ConfigError(
            f"path={options.path} does not exist; pass a trace, a store, or a rollout"
        )
    chosen = formats[options.to]
    given = ExportParameters(
        num_tokens=options.num_tokens,
        num_prompt_tokens=options.num_prompt_tokens,
        on_missing=options.on_missing,
    )
    if options.path.is_file():
        count, num_bytes = 1, _export_file(options.path, chosen, options.output, given)
    elif options.num_tokens is not None or options.num_prompt_tokens is not None:
        raise ConfigError(
            f"num_tokens={options.num_tokens}, num_prompt_tokens={options.num_prompt_tokens}, but {options.path} holds "
            "many traces; leave them out, or export one trace file at a time"
        )
    else:
        count, num_bytes = _export_folder(options.path, chosen, options.output, given)
    if options.json:
        summary = {
            "format": chosen.name,
            "traces": count,
            "bytes": num_bytes,
            "output": str(options.output),
        }
        print(json.dumps(summary))
    else:
        print(f"{count} traces as {chosen.name}, {num_bytes} bytes -> {options.output}")
    return 0
