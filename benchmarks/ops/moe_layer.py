"""Time whole mixture-of-experts layers, from router logits to output, against public peers on one GPU.

python benchmarks/ops/moe_layer.py measure --site /tmp/peers --warm 12 --out qwen3.jsonl --commit "$(git rev-parse HEAD)"
python benchmarks/ops/moe_layer.py summarise qwen3.jsonl more.jsonl --out docs/results/moe_layer.json

Weights are cold: one CUDA graph goes through several layers with weights and routing of their own. Entrants take turns. No
time is written for an output that was not first compared with float32. A peer that does not load has a row that says why.
"""

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

import torch
from moe_bench.budget import Budget
from moe_bench.comparison import Case, Options, compare, run_once
from moe_bench.data import layer_weights
from moe_bench.graphs import GraphTimer
from moe_bench.hardware import clocks, machine, recorded_options
from moe_bench.peers import PEERS
from moe_bench.peers.contract import Peer
from moe_bench.peers.sites import Site
from moe_bench.rows import JsonLines
from moe_bench.shapes import SHAPES, TOKENS, LayerShape
from moe_bench.summary import as_json, merge, tables

_SEED = 100
_SHARE_OF_BUDGET_TO_BUILD = 0.5


def names_of(text: str, known: dict[str, object]) -> list[str]:
    """Split a list of names and refuse unknown ones."""
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: not known; accepted are {', '.join(known)}"
        )
    return names


def arguments_of(command: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True)
    measure = actions.add_parser("measure", help="time layers; append a line of JSON per figure")
    measure.add_argument("--shapes", type=lambda text: names_of(text, dict(SHAPES)), default=list(SHAPES))  # fmt: skip
    measure.add_argument("--tokens", type=lambda text: [int(item) for item in text.split(",")], default=list(TOKENS))  # fmt: skip
    measure.add_argument("--peers", type=lambda text: names_of(text, dict(PEERS)), default=list(PEERS))  # fmt: skip
    measure.add_argument("--rounds", type=int, default=6, help="turns of every entrant")
    measure.add_argument("--runs", type=int, default=5, help="timed runs in a turn")
    measure.add_argument("--zipf", type=float, default=0.0, help="exponent of a skewed load")
    measure.add_argument("--site", type=Path, help="where the packs of peers are unpacked")
    measure.add_argument("--profile", action="store_true", help="cudaProfilerStart around the timed region")  # fmt: skip
    measure.add_argument("--warm", type=int, default=0, help="processes that build kernels first")
    measure.add_argument("--budget-seconds", type=float, default=float("inf"))
    measure.add_argument("--out", type=Path, required=True)
    measure.add_argument("--commit", required=True)
    measure.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    summarise = actions.add_parser("summarise", help="merge files into one result, print tables")
    summarise.add_argument("files", nargs="+", type=Path)
    summarise.add_argument("--out", type=Path)
    return parser.parse_args(command)


def load_peers(names: list[str], site: Site, output: JsonLines | None) -> list[Peer]:
    """Load the entrants; one that does not load is a row, not a missing column."""
    peers: list[Peer] = []
    for name in names:
        try:
            peers.append(PEERS[name](site))
        except Exception as err:  # whatever a peer's import raises is its row
            reason = f"{type(err).__name__}: {' '.join(str(err).split())}"[:600]
            print(f"{name} does not load: {reason}", flush=True)
            if output is not None:
                output.write("absent", peer=name, reason=reason)
    return peers


def free_memory() -> None:
    """Give back what the last case held."""
    gc.collect()
    torch.cuda.empty_cache()


def build_kernels(arguments: argparse.Namespace) -> None:
    """One of several processes that run every case once, so that the kernels are in Triton's cache."""
    peers = load_peers([name for name in arguments.peers if name not in ("torch", "sonic")], opened(arguments.site), None)  # fmt: skip
    options = Options(zipf=arguments.zipf)
    jobs = [(shape, tokens) for tokens in arguments.tokens for shape in arguments.shapes]
    for name, tokens in jobs[arguments.shard :: arguments.warm]:
        try:
            for problem in build_case(SHAPES[name], tokens, peers, options):
                print(f"building {name} T={tokens}: {problem}", flush=True)
        except torch.OutOfMemoryError:
            print(
                f"building {name} T={tokens}: no memory beside the others; built later", flush=True
            )
        free_memory()


def build_case(shape: LayerShape, tokens: int, peers: list[Peer], options: Options) -> list[str]:
    """Run one case once on weights of one layer; return what failed."""
    weights = [layer_weights(shape, _SEED, options.device)]
    case = Case(shape=shape, num_tokens=tokens, weights=weights)
    problems = [problem for peer in peers for problem in run_once(case, peer, options)]
    torch.cuda.synchronize()
    return problems


def build_in_parallel(budget: Budget, arguments: argparse.Namespace) -> None:
    """Run the processes; those that take more than half of the time are stopped, and what they lack is built later."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    workers = [
        subprocess.Popen([*command, "--shard", str(index)]) for index in range(arguments.warm)
    ]
    deadline = time.monotonic() + _SHARE_OF_BUDGET_TO_BUILD * min(budget.left, 1e6)
    for worker in workers:
        try:
            worker.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.terminate()
            worker.wait()


def opened(folder: Path | None) -> Site:
    """Open the folder of packs."""
    site = Site(folder)
    site.open()
    return site


def measure_all(arguments: argparse.Namespace) -> None:
    """Measure every case that the budget allows."""
    budget = Budget(arguments.budget_seconds)
    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.warm:
        build_in_parallel(budget, arguments)
        print(f"kernels built after {budget.used:.0f} s", flush=True)
    with JsonLines(arguments.out) as output:
        peers = load_peers(arguments.peers, opened(arguments.site), output)
        output.write(
            "machine", commit=arguments.commit, options=recorded_options(arguments), **machine()
        )
        for name in arguments.shapes:
            measure_shape(SHAPES[name], arguments, peers, budget, output)
    print(f"{budget.used:.0f} s", flush=True)


def measure_shape(
    shape: LayerShape,
    arguments: argparse.Namespace,
    peers: list[Peer],
    budget: Budget,
    output: JsonLines,
) -> None:
    """Measure one shape on all numbers of tokens, with one set of weights."""
    options = Options(
        rounds=arguments.rounds,
        runs=arguments.runs,
        zipf=arguments.zipf,
        is_profiled=arguments.profile,
    )

    def report(kind: str, **columns: object) -> None:
        output.write(kind, **columns)
        print(line_of(kind, columns), flush=True)

    output.write("clocks", when=f"before {shape.name}", clocks=clocks())
    weights = [layer_weights(shape, _SEED + index, "cuda") for index in range(shape.copies)]
    for tokens in arguments.tokens:
        if not budget.allows_case():
            reason = f"{budget.used:.0f} s of the budget are used"
            report("skipped", shape=shape.name, tokens=tokens, reason=reason)
            continue
        started = time.monotonic()
        case = Case(shape=shape, num_tokens=tokens, weights=weights)
        compare(case, peers, GraphTimer(), options, report)
        free_memory()
        budget.finished_case(time.monotonic() - started)
    output.write("clocks", when=f"after {shape.name}", clocks=clocks())
    del weights
    free_memory()


def line_of(kind: str, columns: dict[str, object]) -> str:
    """Return what is printed of a row."""
    where = f"{columns['shape']} T={columns['tokens']} {columns.get('peer', '')}"
    if kind == "layer":
        share = 100 * float(str(columns["share_of_floor"]))
        return f"{where}: {columns['us']} us, {share:.0f} % of the floor"
    if kind == "ratio":
        return f"{where}: {columns['ratio']} of {columns['over']}"
    return f"{where}: {kind}: {columns['reason']}"


def main() -> None:
    """Do what the command line says."""
    arguments = arguments_of()
    if arguments.action == "summarise":
        result = merge(arguments.files)
        if arguments.out is not None:
            arguments.out.write_text(as_json(result))
        print(tables(result))
    elif arguments.shard is not None:
        build_kernels(arguments)
    else:
        measure_all(arguments)


if __name__ == "__main__":
    main()
