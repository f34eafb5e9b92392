"""Check the Triton plan of the grouped GEMMs, alone and fused with the router, against plain torch on a GPU; time both; write JSON.

python benchmarks/ops/check_permutation.py --out docs/results/permutation.json --commit "$(git rev-parse HEAD)"

Times are per call of a CUDA graph of 20 calls on 20 inputs. No time is written unless every case is equal.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from check_routing import GRAPH_CALLS, METHODS, TOKENS, forced_ids, graph_time, logits_of
from torch import Tensor

from routing_replay.kernels import PermutationPlan, RoutingMethod, plan_permutation, route
from routing_replay.kernels.permutation import plan_reference, route_and_plan
from routing_replay.kernels.permutation.workspace import route_and_plan_workspace
from routing_replay.kernels.routing import route_reference

# experts, K, first local expert, local experts
LAYOUTS = ((128, 8, 0, 128), (256, 8, 64, 32), (8, 2, 0, 8), (64, 6, 0, 64), (16, 1, 3, 5))
TILES = ((16, 1), (64, 1), (128, 2), (12, 3), (192, 2))  # rows, CTAs of a cluster
INPUTS = ("distinct", "repeated", "one expert", "none")
TIMED_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 4096)
FUSED_TOKENS = (1, 3, 4, 5, 16, 17, 63, 64, 65, 255, 256, 257)
FUSED_METHODS = ("RenormalizeNaive", "Renormalize", "grouped", "grouped, 160 experts", "odd", "all", "Llama4")  # fmt: skip
FUSED_INPUTS = ("random", "ties", "strange", "same")
FUSED_TIMED = {"softmax, E 128, K 8": "RenormalizeNaive", "grouped, E 256, K 8": "grouped"}
RACE_TOKENS = (2, 17, 64, 255, 256)
RACE_REPLAYS = 400


def ids_of(kind: str, tokens: int, num_experts: int, top_k: int, first: int) -> Tensor:
    """Return expert ids as routers pick them, or as they should not be."""
    if kind == "distinct":
        return torch.rand(tokens, num_experts, device="cuda").argsort(-1)[:, :top_k].int().contiguous()  # fmt: skip
    if kind == "repeated":
        return torch.randint(-2, num_experts + 2, (tokens, top_k), device="cuda").int()
    value = first if kind == "one expert" else -1
    return torch.full((tokens, top_k), value, dtype=torch.int32, device="cuda")


def used(plan: PermutationPlan) -> tuple[list[int], ...]:
    """Return the parts of a plan that are defined."""
    rows, ctas = int(plan.total_num_padded_tokens), int(plan.num_non_exiting_ctas)
    return (
        plan.expanded_idx_to_permuted_idx.tolist(),
        plan.permuted_idx_to_token_idx[:rows].tolist(),
        plan.cta_idx_xy_to_batch_idx[:ctas].tolist(),
        plan.cta_idx_xy_to_mn_limit[:ctas].tolist(),
    )


def cases() -> Iterator[tuple[tuple[int, ...], tuple[int, int], int, str]]:
    """Every combination of the plan alone that is checked."""
    for layout in LAYOUTS:
        for tile in TILES:
            for tokens in TOKENS:
                for kind in INPUTS:
                    yield layout, tile, tokens, kind


def check(layout: tuple[int, ...], tile: tuple[int, int], tokens: int, kind: str) -> None:
    """Compare one plan with the reference, entry by entry."""
    num_experts, top_k, first, local = layout
    ids = ids_of(kind, tokens, num_experts, top_k, first)
    plans = [
        plan_permutation(
            ids,
            num_experts=num_experts,
            local_expert_offset=first,
            num_local_experts=local,
            tile_tokens=tile[0],
            cluster_size=tile[1],
            are_distinct=kind == "distinct",
            backend=backend,
        )
        for backend in ("triton", "reference")
    ]
    if used(plans[0]) != used(plans[1]):
        raise SystemExit(f"plans differ: {layout} {tile} T={tokens} {kind}")


def fused_cases() -> Iterator[tuple[str, int, str, bool, tuple[int, int], bool]]:
    """Every combination of the fused kernel that is checked; methods take turns with the tiles, each of them to compile."""
    for turn, name in enumerate(FUSED_METHODS):
        for on_rank in (False, True):
            tile = TILES[(turn + 2 * on_rank) % len(TILES)]
            for tokens in FUSED_TOKENS:
                for kind in FUSED_INPUTS:
                    for is_forced in (False, True):
                        yield name, tokens, kind, is_forced, tile, on_rank


def check_fused(
    case: tuple[str, int, str, bool, tuple[int, int], bool], workspaces: dict[int, Tensor]
) -> None:
    """Compare ids, weights, record and plan of one launch with the reference, and its weights with those of `route`."""
    name, tokens, kind, is_forced, tile, on_rank = case
    method = METHODS[name]
    logits = logits_of("random" if kind == "same" else kind, tokens, method.num_experts)
    if kind == "same":  # all tokens to the same experts
        logits[:] = logits[0].clone()
    bias = torch.randn(method.num_experts, device="cuda") / 4 if method.takes_bias else None
    forced = forced_ids(method, tokens) if is_forced else None
    experts = method.num_experts + method.num_fused_shared_experts
    first, local = (experts // 4, experts // 2) if on_rank else (0, experts)
    workspace = workspaces.setdefault(local, route_and_plan_workspace(local, device="cuda"))
    recorded = torch.full((tokens + 3, method.top_k), -1, dtype=torch.int16, device="cuda")
    weights, ids, plan = route_and_plan(
        logits, method, tile_tokens=tile[0], cluster_size=tile[1], local_expert_offset=first, num_local_experts=local,
        routing_bias=bias, routing_replay_in=forced, routing_replay_out=recorded, workspace=workspace, backend="triton",
    )  # fmt: skip
    _, expected = route_reference(logits, method, routing_bias=bias, routing_replay_in=forced)
    alone, _ = route(logits, method, routing_bias=bias, routing_replay_in=forced, backend="triton")
    assert torch.equal(ids.long(), expected), "ids differ"
    assert torch.equal(weights.view(torch.int32), alone.view(torch.int32)), (
        "weights are not those of route"
    )
    assert torch.equal(recorded[:tokens].long(), expected[:, : method.top_k]), "record differs"
    assert (recorded[tokens:] == -1).all(), "a row past the end was written"
    assert used(plan) == used(plan_reference(expected, plan.shape)), "plans differ"


def check_races(name: str, tokens: int) -> int:
    """Replay a graph of fused calls many times, all on one workspace; every replay must leave the same."""
    method = METHODS[name]
    logits = [torch.randn(tokens, method.num_experts, device="cuda") for _ in range(GRAPH_CALLS)]
    bias = torch.randn(method.num_experts, device="cuda") if method.takes_bias else None
    workspace = route_and_plan_workspace(method.num_experts, device="cuda")
    expected = [route_reference(rows, method, routing_bias=bias)[1] for rows in logits]

    def calls() -> list[tuple[Tensor, Tensor, PermutationPlan]]:
        return [
            route_and_plan(rows, method, tile_tokens=16, routing_bias=bias, workspace=workspace)
            for rows in logits
        ]

    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = calls()
    plans = [
        plan_reference(ids, plan.shape) for ids, (_, _, plan) in zip(expected, results, strict=True)
    ]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(RACE_REPLAYS):
        for _, ids, plan in results:
            ids.fill_(-7)
            plan.expanded_idx_to_permuted_idx.fill_(-7)
        graph.replay()
        for ids, plan, (_, mine, made) in zip(expected, plans, results, strict=True):
            wrong += (mine != ids).sum()
            wrong += (made.expanded_idx_to_permuted_idx != plan.expanded_idx_to_permuted_idx).sum()
    if int(wrong):
        raise SystemExit(
            f"{name} T={tokens}: {int(wrong)} entries differ in {RACE_REPLAYS} replays"
        )
    for plan, (_, _, made) in zip(plans, results, strict=True):
        assert used(plan) == used(made), (name, tokens)
    return RACE_REPLAYS * GRAPH_CALLS


def time_plan(method: RoutingMethod, tokens: int) -> dict[str, object]:
    """Time the plan alone, after the router, and fused with it."""
    logits = [torch.randn(tokens, method.num_experts, device="cuda") for _ in range(GRAPH_CALLS)]
    bias = torch.randn(method.num_experts, device="cuda") if method.takes_bias else None
    buffer = torch.empty(tokens, method.top_k, dtype=torch.int16, device="cuda")
    ids = [route(rows, method, routing_bias=bias)[1] for rows in logits]
    workspace = route_and_plan_workspace(method.num_experts, device="cuda")

    def plan_of(topk_ids: Tensor) -> PermutationPlan:
        return plan_permutation(
            topk_ids, num_experts=method.num_experts, tile_tokens=16, are_distinct=True
        )

    def in_two(index: int) -> None:
        plan_of(route(logits[index], method, routing_bias=bias, routing_replay_out=buffer)[1])

    def in_one(index: int, recorded: Tensor | None) -> None:
        route_and_plan(
            logits[index], method, tile_tokens=16, routing_bias=bias, routing_replay_out=recorded, workspace=workspace
        )  # fmt: skip

    result: dict[str, object] = {
        "tokens": tokens,
        "plan": graph_time(lambda index: plan_of(ids[index])),
        "route_and_plan": graph_time(in_two),
    }
    if tokens <= 256:
        result["one_launch"] = graph_time(lambda index: in_one(index, buffer))
        result["one_launch_without_replay"] = graph_time(lambda index: in_one(index, None))
    return result


def main() -> None:
    """Check everything, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--only-fused", action="store_true", help="leave out the plan alone")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    count, fused = 0, 0
    for case in () if arguments.only_fused else cases():
        check(*case)
        count += 1
    workspaces: dict[int, Tensor] = {}
    for case in fused_cases():
        try:
            check_fused(case, workspaces)
        except AssertionError as err:
            raise SystemExit(f"one launch: {case}: {err}") from err
        fused += 1
    print(f"{count} plans and {fused} fused launches equal", flush=True)
    repeated = sum(
        check_races(name, tokens) for name in FUSED_TIMED.values() for tokens in RACE_TOKENS
    )
    print(f"{repeated} launches in graphs equal", flush=True)
    result = {
        "commit": arguments.commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cases_equal": count,
        "fused_cases_equal": fused,
        "fused_launches_in_graphs_equal": repeated,
        "tile_tokens": 16,
        "times": {
            label: [time_plan(METHODS[name], tokens) for tokens in TIMED_TOKENS]
            for label, name in FUSED_TIMED.items()
        },
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
