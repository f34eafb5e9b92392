"""`routing-replay tune`: find the fastest tiles of a layer on this GPU, and write them as a table.

Its arguments are read by the standard library: a machine with a GPU often has torch and triton and little else.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from routing_replay.cli.provenance import versions
from routing_replay.errors import ConfigError, RoutingReplayError

if TYPE_CHECKING:
    from routing_replay.kernels.experts.tables import ConfigTable, Device, LayerShape
    from routing_replay.kernels.experts.tuning import TunedTokens

__all__ = ["TuneOptions", "layer_of", "parse_tune", "run_tune", "tokens_of"]

_SIZES = ("hidden_size", "intermediate_size", "num_experts", "num_local_experts", "top_k")
_LAYERS = {
    "qwen3-30b-a3b": (2048, 768, 128, 128, 8),
    "olmoe": (2048, 1024, 64, 64, 8),
    "mixtral-tp2": (4096, 7168, 8, 8, 2),
    "deepseek-v3-tp8": (7168, 256, 256, 256, 8),
    "deepseek-v3-ep8": (7168, 2048, 256, 32, 8),
}
_TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192,16384"
_DESCRIPTION = """\
Time tiles of the expert GEMMs of one layer on this GPU, with weights that are not in its cache, and write the best as a
table. Every candidate must first give the reference's output. A row is printed for each number of tokens: microseconds
of a whole layer with what the rule of the package has, and with what was found."""
_EPILOG = """\
The table is used where it is named: choose_config(shape, capability=..., tables=ConfigTables.from_file("tiles.json"))
gives a configuration, and its as_choice() is what bf16_moe(..., config=...) takes.

Example: routing-replay tune --like qwen3-30b-a3b --tokens 1,8,64,512,4096 --budget-seconds 300 --out tiles.json"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """What to tune.

    Attributes:
        out: The table to write, or to add this layer to.
        like: A model, and how many ranks share a layer; sizes that are given as well replace its own.
        hidden_size: H, of the model.
        intermediate_size: I, of one expert, on this rank.
        num_experts: Experts on all ranks.
        num_local_experts: Experts on this rank; all of them if not given.
        top_k: Experts of a token.
        not_gated: GEMM 1 has I rows instead of 2 I.
        tokens: Numbers of tokens, ascending, with commas between them.
        budget_seconds: Time for all of them, compiling included.
        device: Number of the CUDA device.
        seed: Of weights, tokens and routing, and of the order of candidates.
        json: Print JSON.
    """

    out: Path
    like: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    top_k: int | None = None
    not_gated: bool = False
    tokens: str = _TOKENS
    budget_seconds: float = 600.0
    device: int = 0
    seed: int = 0
    json: bool = False


def parse_tune(arguments: Sequence[str]) -> TuneOptions:
    """Read the command's arguments; exits with 2 where they are wrong, with 0 after --help.

    Args:
        arguments: Words after the command's name.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="routing-replay tune",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", "-o", type=Path, required=True, metavar="FILE", help="the table to write; layers that it already holds stay")  # fmt: skip
    add("--like", choices=tuple(_LAYERS), help="a model, and how many ranks share a layer; sizes that are given as well replace its own")  # fmt: skip
    add("--hidden-size", type=int, metavar="H", help="of the model")
    add("--intermediate-size", type=int, metavar="I", help="of one expert, on this rank")
    add("--num-experts", type=int, metavar="E", help="experts on all ranks")
    add("--num-local-experts", type=int, metavar="N", help="experts on this rank; all of them if not given")  # fmt: skip
    add("--top-k", type=int, metavar="K", help="experts of a token")
    add("--not-gated", action="store_true", help="the activation has no gate: GEMM 1 has I rows instead of 2 I")  # fmt: skip
    add("--tokens", default=_TOKENS, metavar="T,T,...", help="numbers of tokens, ascending (default: %(default)s)")  # fmt: skip
    add("--budget-seconds", type=float, default=600.0, metavar="S", help="time for all of them, compiling included; each takes an equal share of what is left (default: %(default)s)")  # fmt: skip
    add("--device", type=int, default=0, metavar="N", help="number of the CUDA device (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of weights, tokens and routing, and of the order of candidates (default: %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    return TuneOptions(**vars(parser.parse_args(list(arguments))))


def tokens_of(text: str) -> tuple[int, ...]:
    """Read numbers of tokens.

    Args:
        text: Numbers with commas between them.

    Returns:
        The numbers.

    Raises:
        ConfigError: One is no number, or they do not ascend from 1 or more.
    """
    accepted = "accepted are numbers of 1 or more with commas between them, each larger than the one before"
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise ConfigError(f"tokens={text!r}; {accepted}")
    numbers = tuple(map(int, words))
    if numbers[0] < 1 or list(numbers) != sorted(set(numbers)):
        raise ConfigError(f"tokens={text!r}; {accepted}")
    return numbers


def layer_of(options: TuneOptions) -> "LayerShape":
    """Take the layer's sizes from the options, and what they leave out from the model that they name.

    Args:
        options: The options.

    Returns:
        The layer.

    Raises:
        ConfigError: A size is missing or not accepted.
    """
    from routing_replay.kernels.experts.tables import LayerShape

    sizes: dict[str, int] = {}
    if options.like is not None:
        if options.like not in _LAYERS:
            raise ConfigError(f"like={options.like!r}; accepted are {', '.join(_LAYERS)}")
        sizes = dict(zip(_SIZES, _LAYERS[options.like], strict=True))
        if options.num_experts is not None and options.num_local_experts is None:
            sizes.pop("num_local_experts")
    for name in _SIZES:
        value: int | None = getattr(options, name)
        if value is not None:
            if value < 1:
                raise ConfigError(f"{name}={value}; accepted is 1 or more")
            sizes[name] = value
    if "num_experts" in sizes:
        sizes.setdefault("num_local_experts", sizes["num_experts"])
    missing = [f"--{name.replace('_', '-')}" for name in _SIZES if name not in sizes]
    if missing:
        raise ConfigError(f"the layer is not known: give {', '.join(missing)}, or --like a model")
    if sizes["num_experts"] < max(sizes["top_k"], sizes["num_local_experts"]):
        raise ConfigError(
            f"num_experts={sizes['num_experts']} with top_k={sizes['top_k']}, "
            f"num_local_experts={sizes['num_local_experts']}; accepted is at least as many as each"
        )
    return LayerShape(**sizes, is_gated=not options.not_gated)


def _table(path: Path, device: "Device") -> "ConfigTable":
    """The table that is there already, or a new one."""
    from routing_replay.kernels.experts.tables import ConfigTable, read_table

    if not path.parent.is_dir():
        raise ConfigError(f"out={path}: there is no folder {path.parent}; make it first")
    if not path.exists():
        return ConfigTable(device=device, shapes=())
    table = read_table(path)
    if table.device != device:
        raise ConfigError(
            f"out={path} is of {table.device}, and this device is {device}; choose another file"
        )
    return table


def _tiles(tuned: "TunedTokens") -> str:
    config = tuned.config
    cut = (
        f"{tile.rows}x{tile.depth}, {tile.stages} stages, {tile.warps} warps"
        for tile in (config.gemm1, config.gemm2)
    )
    return f"{config.engine} {config.tile_tokens} | " + " | ".join(cut)


def _print_row(tuned: "TunedTokens", *, is_first: bool) -> None:
    if is_first:
        print("tokens   rule us  tuned us  gain  tried  engine, rows of tokens | GEMM 1 | GEMM 2")
    gain = tuned.rule_microseconds / tuned.microseconds
    print(
        f"{tuned.num_tokens:>6}  {tuned.rule_microseconds:>8.1f}  {tuned.microseconds:>8.1f}  {gain:>4.2f}  "
        f"{tuned.num_timed:>5}  {_tiles(tuned)}",
        flush=True,
    )


def _report(options: TuneOptions, layer: "LayerShape", tuned: "list[TunedTokens]") -> None:
    reasons = [
        {"num_tokens": item.num_tokens, "config": asdict(config), "reason": reason}
        for item in tuned
        for config, reason in item.refused
    ]
    if options.json:
        rows = [{**asdict(item), "refused": len(item.refused)} for item in tuned]
        record = {
            "layer": asdict(layer),
            "out": str(options.out),
            "tuned": rows,
            "refused": reasons,
        }
        print(json.dumps(record))
        return
    for item in reasons[:3]:
        print(f"refused at {item['num_tokens']} tokens: {item['reason']}")
    if len(reasons) > 3:
        print(f"and {len(reasons) - 3} more; --json shows all")
    print(f"table: {options.out}")


def run_tune(options: TuneOptions) -> int:
    """Tune, print, and write the table; what is done when it is interrupted stays written.

    Args:
        options: What to tune.

    Returns:
        0.

    Raises:
        ConfigError: An option is not accepted, or the file is another device's table.
        RoutingReplayError: There is no such GPU, or what the rule has gives a wrong output on it.
    """
    import torch

    from routing_replay.kernels.experts.tables import ShapeEntries, write_table
    from routing_replay.kernels.experts.tuning import table_entries, tune_layer
    from routing_replay.kernels.experts.tuning_workload import (
        CheckedRuns,
        GraphWorkload,
        LayerCopies,
        cuda_device,
    )

    tokens, layer = tokens_of(options.tokens), layer_of(options)
    if not options.budget_seconds > 0:
        raise ConfigError(f"budget_seconds={options.budget_seconds}; accepted is a number above 0")
    if options.seed < 0 or options.device < 0:
        raise ConfigError(f"seed={options.seed}, device={options.device}; accepted is 0 or more")
    if options.device >= torch.cuda.device_count():
        raise RoutingReplayError(
            f"tuning times kernels on a GPU: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices "
            f"here and device={options.device} is asked for; run it on a machine that has one"
        )
    device, l2_bytes = cuda_device(options.device)
    table = _table(options.out, device)
    made_with = versions("torch", "triton")
    commit = made_with.pop(
        "commit", f"routing-replay {made_with.get('routing-replay', 'not installed')}"
    )
    tuned: list[TunedTokens] = []
    with torch.cuda.device(options.device):
        copies = LayerCopies(
            layer,
            fewest_tokens=tokens[0],
            device=torch.device("cuda", options.device),
            l2_bytes=l2_bytes,
            seed=options.seed,
        )
        for item in tune_layer(
            layer,
            tokens,
            device,
            lambda num_tokens: GraphWorkload(CheckedRuns(layer, copies.steps(num_tokens))),
            budget_seconds=options.budget_seconds,
            seed=options.seed,
        ):
            tuned.append(item)
            measured = ShapeEntries(
                shape=layer,
                commit=commit,
                versions=tuple(f"{name} {version}" for name, version in made_with.items()),
                seed=options.seed,
                entries=table_entries(tuned),
            )
            write_table(options.out, table.with_shape(measured))
            if not options.json:
                _print_row(item, is_first=len(tuned) == 1)
    _report(options, layer, tuned)
    return 0
