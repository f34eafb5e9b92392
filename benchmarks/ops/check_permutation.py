"""Check the Triton plan of the grouped GEMMs against plain torch on a GPU, then time it alone and after the router; write JSON.

python benchmarks/ops/check_permutation.py --out docs/results/permutation.json --commit "$(git rev-parse HEAD)"
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from check_routing import GRAPH_CALLS, TOKENS, graph_time
from torch import Tensor

from routing_replay.kernels import (
    PermutationPlan,
    RoutingMethod,
    RoutingMethodType,
    plan_permutation,
    route,
)

# experts, K, first local expert, local experts
LAYOUTS = ((128, 8, 0, 128), (256, 8, 64, 32), (8, 2, 0, 8), (64, 6, 0, 64), (16, 1, 3, 5))
TILES = ((16, 1), (64, 1), (128, 2), (12, 3), (192, 2))  # rows, CTAs of a cluster
INPUTS = ("distinct", "repeated", "one expert", "none")
TIMED_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 4096)


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
    """Every combination that is checked."""
    for layout in LAYOUTS:
        for tile in TILES:
            for tokens in TOKENS:
                for kind in INPUTS:
                    yield layout, tile, tokens, kind


def check(layout: tuple[int, ...], tile: tuple[int, int], tokens: int, kind: str) -> None:
    """Compare one case with the reference, entry by entry."""
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


def time_plan(tokens: int) -> dict[str, object]:
    """Time the plan, and the router with it, in a CUDA graph: Qwen3-30B-A3B's layer."""
    method = RoutingMethod(type=RoutingMethodType.RenormalizeNaive, num_experts=128, top_k=8)
    logits = [torch.randn(tokens, 128, device="cuda") for _ in range(GRAPH_CALLS)]
    ids = [route(rows, method)[1] for rows in logits]

    def plan_of(topk_ids: Tensor) -> PermutationPlan:
        return plan_permutation(topk_ids, num_experts=128, tile_tokens=16, are_distinct=True)

    return {
        "tokens": tokens,
        "plan": graph_time(lambda index: plan_of(ids[index])),
        "route_and_plan": graph_time(lambda index: plan_of(route(logits[index], method)[1])),
    }


def main() -> None:
    """Check everything, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    count = 0
    for case in cases():
        check(*case)
        count += 1
    result = {
        "commit": arguments.commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cases_equal": count,
        "shape": "E 128, K 8, tile 16",
        "times": [time_plan(tokens) for tokens in TIMED_TOKENS],
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
