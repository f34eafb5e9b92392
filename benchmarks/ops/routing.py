"""Time routers alone, and with the plan of the grouped GEMMs, against public peers on one GPU.

python benchmarks/ops/routing.py --site /tmp/peers --out routing.jsonl --commit "$(git rev-parse HEAD)"

A figure is the time of one call in a CUDA graph of 20 calls on 20 inputs. Ids are compared with the reference as sets and
weights expert by expert before anything is timed (peers order columns as they like); recorded ids position by position.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from moe_bench.comparison import in_turns
from moe_bench.graphs import Captured, GraphTimer, Timer
from moe_bench.hardware import clocks, machine, recorded_options
from moe_bench.peers.routers import LOADERS, Router, RouterInput, load_all
from moe_bench.peers.sites import Site
from moe_bench.rows import JsonLines, distribution_of
from moe_bench.shapes import SHAPES, LayerShape
from torch import Tensor

from routing_replay.kernels.routing import route_reference

CALLS = 20
TOKENS = (1, 8, 32, 64, 128, 256, 1024, 4096)
TILE_TOKENS = 16
LARGEST_WEIGHT_ERROR = 1e-4
ROUTED_LIKE = ("qwen3_30b_a3b", "deepseek_v3_ep8")  # E 128, K 8 by softmax; E 256, K 8 in groups


def inputs_of(shape: LayerShape, num_tokens: int, device: str) -> list[RouterInput]:
    """Return as many inputs as a graph has calls."""
    generator = torch.Generator(device=device).manual_seed(num_tokens)
    size = (num_tokens, shape.routing.num_experts)
    bias = None
    if shape.routing.takes_bias:
        bias = 0.1 * torch.randn(size[1], device=device, generator=generator)
    return [
        RouterInput(
            logits=torch.randn(size, device=device, generator=generator),
            bias=bias,
            recorded=torch.empty(num_tokens, shape.routing.top_k, dtype=torch.int16, device=device),
        )
        for _ in range(CALLS)
    ]


def problem_of(router: Router, shape: LayerShape, given: RouterInput) -> str | None:
    """Compare a router with the reference; return what is wrong."""
    weights, ids = route_reference(given.logits, shape.routing, routing_bias=given.bias)
    given.recorded.fill_(-1)
    found_weights, found_ids, *_ = router.run(given)
    if router.is_recording and not torch.equal(given.recorded.long(), found_ids.long()):
        return "recorded ids are not those that it returns, position by position"
    error = (spread(found_weights, found_ids, shape) - spread(weights, ids, shape)).abs().max()
    if not error < LARGEST_WEIGHT_ERROR:
        return f"weights by expert are off by {float(error):.3g}, at most {LARGEST_WEIGHT_ERROR}"
    return None


def spread(weights: Tensor, ids: Tensor, shape: LayerShape) -> Tensor:
    """Return weights `[T, E]` by expert, in whatever order the columns are."""
    by_expert = weights.new_zeros(len(weights), shape.routing.num_experts, dtype=torch.float32)
    return by_expert.scatter_(1, ids.long(), weights.float())


def measure(
    shape: LayerShape,
    num_tokens: int,
    routers: Sequence[Router],
    timer: Timer,
    output: JsonLines,
    device: str = "cuda",
) -> None:
    """Check and time all routers on one number of tokens."""
    inputs = inputs_of(shape, num_tokens, device)
    where = {"shape": shape.name, "tokens": num_tokens}
    captured: list[tuple[Router, Captured]] = []
    for router in routers:
        columns = {**where, "peer": router.name, "makes_plan": router.makes_plan}
        try:
            problem = problem_of(router, shape, inputs[0])
            if problem is not None:
                output.write("wrong", **columns, reason=problem)
                continue
            calls = [lambda given=given, router=router: router.run(given)[0] for given in inputs]
            captured.append((router, timer.capture(calls)))
        except Exception as err:
            reason = f"{type(err).__name__}: {' '.join(str(err).split())}"[:400]
            output.write("failed", **columns, reason=reason)
    rounds = in_turns([item for _, item in captured], rounds=6, runs=10)
    for (router, _), turns in zip(captured, rounds, strict=True):
        distribution = distribution_of([time / CALLS for turn in turns for time in turn])
        columns = {**where, "peer": router.name, "makes_plan": router.makes_plan}
        output.write("routing", **columns, **asdict(distribution), calls_in_a_graph=CALLS)
        plan = " with plan" if router.makes_plan else ""
        print(f"{shape.name} T={num_tokens} {router.name}{plan}: {distribution.us} us", flush=True)


def main() -> None:
    """Time everything that loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--site", type=Path, help="where the packs of peers are unpacked")
    parser.add_argument("--peers", default=",".join(LOADERS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    arguments = parser.parse_args()
    names = arguments.peers.split(",")
    unknown = set(names).difference(LOADERS)
    if unknown:
        parser.error(f"--peers {sorted(unknown)}: not known; accepted are {', '.join(LOADERS)}")
    site = Site(arguments.site)
    site.open()
    tokens = [int(item) for item in arguments.tokens.split(",")]
    with JsonLines(arguments.out) as output:
        output.write(
            "machine", commit=arguments.commit, options=recorded_options(arguments), **machine()
        )
        for name in ROUTED_LIKE:
            measure_shape(SHAPES[name], tokens, names, site, output)


def measure_shape(
    shape: LayerShape, tokens: Sequence[int], names: Sequence[str], site: Site, output: JsonLines
) -> None:
    """Load the routers of a shape and time them; those that do not load are rows as well."""

    def absent(name: str, reason: str) -> None:
        print(f"{name} is absent: {reason}", flush=True)
        output.write("absent", shape=shape.name, peer=name, reason=reason)

    routers = load_all(names, shape, TILE_TOKENS, site, absent)
    output.write("clocks", when=f"before {shape.name}", clocks=clocks())
    for num_tokens in tokens:
        measure(shape, num_tokens, routers, GraphTimer(), output)
    output.write("clocks", when=f"after {shape.name}", clocks=clocks())


if __name__ == "__main__":
    main()
