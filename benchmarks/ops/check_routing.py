"""Check the Triton router against plain torch on a GPU, position by position, then time it; write JSON.

python benchmarks/ops/check_routing.py --out docs/results/routing.json --commit "$(git rev-parse HEAD)"

Times are per call of a CUDA graph of 20 calls on 20 inputs: what a launch costs inside a decode step. No time is written
unless every case is equal.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from routing_replay.kernels import RoutingMethod, RoutingMethodType, fused_topk_deepseek, route
from routing_replay.kernels.routing import route_reference
from routing_replay.kernels.routing._triton import QUICK_BITS, quick_reciprocal

Kind = RoutingMethodType
TOKENS = (0, 1, 3, 4, 5, 16, 17, 63, 64, 65, 256, 257, 1000, 4096)
TIMED_TOKENS = (1, 32, 256, 1024, 4096)
INPUTS = ("random", "ties", "negative", "saturated", "strange")
GRAPH_CALLS = 20
WEIGHT_TOLERANCE = 2e-6
ONE_BITS = 127 << 23  # of 1.0, the least denominator of a sigmoid
RECIPROCAL_BLOCK = 1024

METHODS = {
    **{
        kind.name: RoutingMethod(type=kind, num_experts=128, top_k=1 if kind is Kind.Llama4 else 8)
        for kind in Kind
    },
    "grouped": RoutingMethod(
        type=Kind.DeepSeekV3, num_experts=256, top_k=8, n_group=8, topk_group=4, routed_scaling_factor=2.5
    ),
    "grouped, 160 experts": RoutingMethod(
        type=Kind.DeepSeekV3, num_experts=160, top_k=6, n_group=8, topk_group=3, num_fused_shared_experts=2
    ),
    "many": RoutingMethod(type=Kind.RenormalizeNaive, num_experts=1024, top_k=32),
    "odd": RoutingMethod(type=Kind.SigmoidRenorm, num_experts=60, top_k=5, norm_topk_prob=False),
    "all": RoutingMethod(type=Kind.Renormalize, num_experts=8, top_k=8),
}  # fmt: skip
TIMED = {
    "softmax, E 128, K 8": METHODS["RenormalizeNaive"],
    "grouped, E 256, K 8": METHODS["grouped"],
}


def logits_of(kind: str, tokens: int, num_experts: int) -> Tensor:
    """Return float32 logits: ordinary ones, or those on which routers have been wrong."""
    logits = 2 * torch.randn(tokens, num_experts, device="cuda")
    if kind == "ties":
        return torch.randint(-2, 3, logits.shape, device="cuda").float()
    if kind == "negative":
        return -logits.abs() - 50
    if kind == "saturated":
        return 30 * logits
    if kind == "strange":
        logits[::3, num_experts // 2] = float("nan")
        logits[1::4] = -float("inf")
        logits[2::5, 1:] = float("inf")
    return logits


def forced_ids(method: RoutingMethod, tokens: int) -> Tensor:
    """Return rows to replay: most valid, some native, some with an id that repeats or is out of range."""
    ids = torch.rand(tokens, method.num_experts, device="cuda").argsort(-1)[:, : method.top_k]
    ids = ids.short()
    ids[::4] = -1
    if tokens > 2 and method.top_k > 1:
        ids[1, 1] = ids[1, 0]
        ids[2, 1] = method.num_experts
    return ids


def cases() -> Iterator[tuple[str, RoutingMethod, torch.dtype, int, str, bool]]:
    """Every combination that is checked."""
    for name, method in METHODS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in TOKENS:
                for kind in INPUTS:
                    for is_forced in (False, True):
                        yield name, method, dtype, tokens, kind, is_forced


def check(method: RoutingMethod, dtype: torch.dtype, tokens: int, kind: str, *, is_forced: bool) -> float:  # fmt: skip
    """Compare one case with the reference; return the largest relative error of a weight against float64."""
    logits = logits_of(kind, tokens, method.num_experts).to(dtype)
    bias = torch.randn(method.num_experts, device="cuda") / 4 if method.takes_bias else None
    forced = forced_ids(method, tokens) if is_forced else None
    recorded = torch.full((tokens + 3, method.top_k), -1, dtype=torch.int16, device="cuda")
    weights, ids = route(
        logits, method, routing_bias=bias, routing_replay_in=forced, routing_replay_out=recorded, backend="triton"
    )  # fmt: skip
    expected, expected_ids = route_reference(
        logits, method, routing_bias=bias, routing_replay_in=forced
    )
    assert torch.equal(ids.long(), expected_ids), "ids differ"
    assert torch.equal(recorded[:tokens].long(), expected_ids[:, : method.top_k]), "record differs"
    assert (recorded[tokens:] == -1).all(), "a row past the end was written"
    assert torch.equal(weights.isnan(), expected.isnan()), "NaN weights differ"
    if kind != "random":  # sums of float32 probabilities underflow elsewhere, in both alike
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-30, equal_nan=True)
        return 0.0
    # The reference in float64, at the ids that both picked.
    exact, _ = reference_in_float64(logits, method, bias, ids[:, : method.top_k])
    usable = weights.isfinite() & (exact.abs() > 1e-30)
    error = ((weights.double() - exact).abs() / exact.abs())[usable]
    return float(error.max()) if error.numel() else 0.0


def reference_in_float64(
    logits: Tensor, method: RoutingMethod, bias: Tensor | None, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weights of given ids, computed in float64."""
    rows = logits.double()
    if bias is not None and method.has_router_bias:
        rows = (logits.float() + bias).double()
    softmax = method.type in (Kind.Default, Kind.RenormalizeNaive)
    raw = method.type in (Kind.Renormalize, Kind.TopK)
    scores = rows.softmax(-1) if softmax else rows if raw else rows.sigmoid()
    in_range = (ids >= 0) & (ids < method.num_experts)
    repeated = (ids.unsqueeze(2) == ids.unsqueeze(1)).tril(-1).any(2)
    usable = in_range & ~repeated
    picked = scores.gather(1, ids.long().where(usable, 0))
    if method.type is Kind.Renormalize:
        picked = picked.masked_fill(~usable, -torch.inf).softmax(-1)
    picked = picked.masked_fill(~usable, 0.0)
    divides = method.type is Kind.RenormalizeNaive or (
        method.norm_topk_prob and method.type in (Kind.DeepSeekV3, Kind.MiniMax2, Kind.SigmoidRenorm)
    )  # fmt: skip
    if divides:
        picked = picked / (picked.sum(-1, keepdim=True) + 1e-20)
    picked = picked * method.routed_scaling_factor
    shared = picked.new_ones(len(picked), method.num_fused_shared_experts)
    return torch.cat([picked, shared], 1), usable


def graph_time(call: Callable[[int], object], repeats: int = 100) -> dict[str, float]:
    """Time a call inside a CUDA graph, in microseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(GRAPH_CALLS):
            call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(GRAPH_CALLS):
            call(index)
    times: list[float] = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end) / GRAPH_CALLS)
    fifths = statistics.quantiles(times, n=5)
    low, middle, high = fifths[0], statistics.median(times), fifths[-1]
    return {"us": round(middle, 3), "p20": round(low, 3), "p80": round(high, 3)}


def time_route(method: RoutingMethod, tokens: int) -> dict[str, object]:
    """Time the router with and without a replay buffer, and forced."""
    logits = [torch.randn(tokens, method.num_experts, device="cuda") for _ in range(GRAPH_CALLS)]
    bias = torch.randn(method.num_experts, device="cuda") if method.takes_bias else None
    buffer = torch.empty(tokens, method.top_k, dtype=torch.int16, device="cuda")
    forced = torch.rand(tokens, method.num_experts, device="cuda").argsort(-1)
    forced = forced[:, : method.top_k].short().contiguous()
    out = graph_time(lambda i: route(logits[i], method, routing_bias=bias))
    with_replay = graph_time(
        lambda i: route(logits[i], method, routing_bias=bias, routing_replay_out=buffer)
    )
    return {
        "tokens": tokens,
        "without_replay": out,
        "recording": with_replay,
        "recording_over_without": round(with_replay["us"] / out["us"], 4),
        "forced": graph_time(
            lambda i: route(logits[i], method, routing_bias=bias, routing_replay_in=forced)
        ),
    }


def time_fused_topk_deepseek(tokens: int) -> dict[str, object]:
    """Time FlashInfer's form of the op."""
    scores = [torch.randn(tokens, 256, device="cuda") for _ in range(GRAPH_CALLS)]
    bias = torch.randn(256, device="cuda")
    values = torch.empty(tokens, 8, device="cuda")
    indices = torch.empty(tokens, 8, dtype=torch.int32, device="cuda")
    buffer = torch.empty(tokens, 8, dtype=torch.int16, device="cuda")

    def call(index: int) -> None:
        fused_topk_deepseek(
            scores[index], bias, 8, 4, 8, 2.5, values, indices, routing_replay_out=buffer
        )

    return {"tokens": tokens, "recording": graph_time(call)}


@triton.jit
def _count_wrong_reciprocals(wrong_ptr, first, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    bits = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = bits.to(tl.float32, bitcast=True)
    wrong = quick_reciprocal(x) != tl.div_rn(1.0, x)
    tl.atomic_add(wrong_ptr, tl.sum(wrong.to(tl.int64), axis=0))


def check_reciprocals() -> int:
    """Compare the quick reciprocal with the compiler's division on every denominator it is used for; return how many."""
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for first in range(ONE_BITS, QUICK_BITS.value, 1 << 23):
        _count_wrong_reciprocals[((1 << 23) // RECIPROCAL_BLOCK,)](wrong, first, RECIPROCAL_BLOCK)
    if int(wrong):
        raise SystemExit(f"{int(wrong)} quick reciprocals are not correctly rounded")
    return QUICK_BITS.value - ONE_BITS


def main() -> None:
    """Check everything, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    reciprocals = check_reciprocals()
    count, largest = 0, 0.0
    worst = ""
    for name, method, dtype, tokens, kind, is_forced in cases():
        try:
            error = check(method, dtype, tokens, kind, is_forced=is_forced)
        except AssertionError as err:
            raise SystemExit(f"{name} {dtype} T={tokens} {kind} forced={is_forced}: {err}") from err
        if error > WEIGHT_TOLERANCE:
            raise SystemExit(f"{name} {dtype} T={tokens}: a weight is off by {error:.2e}")
        if error > largest:
            largest, worst = error, f"{name} {dtype} T={tokens} {kind} forced={is_forced}"
        count += 1
    print(f"{count} cases equal; largest relative error of a weight {largest:.2e} ({worst})")
    times = {
        name: [time_route(method, tokens) for tokens in TIMED_TOKENS]
        for name, method in TIMED.items()
    }
    result = {
        "commit": arguments.commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "reciprocals_equal": reciprocals,
        "cases_equal": count,
        "largest_relative_error_of_a_weight": largest,
        "of_case": worst,
        "calls_in_a_graph": GRAPH_CALLS,
        "times": times,
        "fused_topk_deepseek": [time_fused_topk_deepseek(tokens) for tokens in TIMED_TOKENS],
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
