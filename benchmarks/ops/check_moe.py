"""Check the Triton fused MoE on a GPU against a float32 loop over the experts, and its promises about replay; write JSON.

python benchmarks/ops/check_moe.py --out docs/results/moe.json --commit "$(git rev-parse HEAD)" [--engine hopper]
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels import (
    ActivationType,
    ExpertsChoice,
    RoutingMethod,
    RoutingMethodType,
    bf16_moe,
    bf16_routed_moe,
    route,
)
from routing_replay.kernels.experts import SwigluParameters, apply_activation
from routing_replay.kernels.experts.config import ENGINES
from routing_replay.kernels.permutation import route_and_plan_workspace

TOKENS = (0, 1, 3, 4, 5, 16, 17, 63, 64, 65, 256, 257, 1000, 4096)
ALLOWED_RATIO = 1.5  # of the relative L2 error to that of the plain torch bfloat16 path
EXTRA_ROWS = 7
KIND = RoutingMethodType


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The sizes of a layer and what is special about it."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    kind: RoutingMethodType = KIND.RenormalizeNaive
    activation: ActivationType = ActivationType.Swiglu
    has_bias: bool = False
    has_swiglu_parameters: bool = False
    shared: int = 0
    on_input: bool = False
    dtype: torch.dtype = torch.bfloat16

    def method(self) -> RoutingMethod:
        """The routing of the layer."""
        return RoutingMethod(type=self.kind, num_experts=self.experts, top_k=self.top_k, num_fused_shared_experts=self.shared)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The weights of a layer, or of one rank of it."""

    model: Model
    gemm1: Tensor
    gemm2: Tensor
    bias1: Tensor | None = None
    bias2: Tensor | None = None
    router_bias: Tensor | None = None
    parameters: SwigluParameters = field(default_factory=SwigluParameters)
    first: int = 0

    def rank(self, first: int, count: int) -> "Layer":
        """The part of the layer with `count` experts from `first` on."""
        here = slice(first, first + count)
        cut = {name: getattr(self, name)[here] for name in ("gemm1", "gemm2")}
        biases = {name: None if getattr(self, name) is None else getattr(self, name)[here] for name in ("bias1", "bias2")}  # fmt: skip
        return replace(self, **cut, **biases, first=first)


SMALL = Model(name="small", hidden=256, intermediate=128, experts=16, top_k=4)
QWEN3 = Model(name="Qwen3-30B-A3B", hidden=2048, intermediate=768, experts=128, top_k=8)
GPT_OSS = Model(name="gpt-oss-20b", hidden=2880, intermediate=2880, experts=32, top_k=4, kind=KIND.Renormalize,
                has_bias=True, has_swiglu_parameters=True)  # fmt: skip
VARIANTS = (
    *(replace(SMALL, name=f"small, {kind.name}", activation=kind, has_bias=True) for kind in ActivationType),
    replace(SMALL, name="small, Swiglu parameters", has_swiglu_parameters=True, has_bias=True),
    replace(SMALL, name="small, shared expert", kind=KIND.DeepSeekV3, shared=1),
    replace(SMALL, name="small, scales on input", kind=KIND.Llama4, top_k=1, on_input=True),
    replace(SMALL, name="odd sizes", hidden=40, intermediate=24),
    replace(SMALL, name="odder sizes", hidden=197, intermediate=75, has_bias=True),
    replace(SMALL, name="float32", dtype=torch.float32),
)  # fmt: skip


def make_layer(model: Model) -> Layer:
    """Random weights, scaled so that outputs are about 1."""
    count = model.experts + model.shared
    rows = model.intermediate * (2 if model.activation.is_gated else 1)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device="cuda") * scale).to(model.dtype)

    parameters = SwigluParameters()
    if model.has_swiglu_parameters:
        alpha, beta, limit = (torch.full((count,), value, device="cuda") for value in (1.702, 1.0, 7.0))  # fmt: skip
        parameters = SwigluParameters(alpha=alpha, beta=beta, limit=limit)
    return Layer(
        model=model,
        gemm1=random(count, rows, model.hidden, scale=model.hidden**-0.5),
        gemm2=random(count, model.hidden, model.intermediate, scale=model.intermediate**-0.5),
        bias1=random(count, rows) if model.has_bias else None,
        bias2=random(count, model.hidden) if model.has_bias else None,
        router_bias=torch.randn(model.experts, device="cuda") if model.kind is KIND.Renormalize else None,
        parameters=parameters,
    )  # fmt: skip


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the reference, which need not be deterministic
        yield
    torch.use_deterministic_algorithms(False)


def run(layer: Layer, logits: Tensor, hidden: Tensor, choice: ExpertsChoice | None = None, **more: object) -> Tensor:  # fmt: skip
    """One call on Triton, in poisoned memory."""
    model = layer.model
    fields: dict[str, object] = {
        "num_experts": model.experts, "top_k": model.top_k, "n_group": None, "topk_group": None,
        "intermediate_size": model.intermediate, "local_expert_offset": layer.first,
        "local_num_experts": layer.gemm1.shape[0] - model.shared, "activation_type": model.activation,
        "gemm1_alpha": layer.parameters.alpha, "gemm1_beta": layer.parameters.beta,
        "gemm1_clamp_limit": layer.parameters.limit, "gemm1_bias": layer.bias1, "gemm2_bias": layer.bias2,
        "routing_method_type": model.kind, "use_routing_scales_on_input": model.on_input,
        "num_fused_shared_experts": model.shared, "backend": "triton", "config": choice, **more,
    }  # fmt: skip
    with poisoned():
        return bf16_moe(logits, layer.router_bias, hidden, layer.gemm1, layer.gemm2, **fields)  # pyright: ignore[reportArgumentType, reportReturnType]


def true_output(layer: Layer, hidden: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
    """One expert at a time in float32: `[T, H]`."""
    model = layer.model
    out = torch.zeros(hidden.shape, device="cuda")
    for local in range(layer.gemm1.shape[0]):
        token, rank = (ids == layer.first + local).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        scale = scales[token, rank, None]
        x = hidden[token].float()
        if model.on_input:
            x, scale = x * scale, torch.ones_like(scale)
        x = x @ layer.gemm1[local].float().t()
        if layer.bias1 is not None:
            x = x + layer.bias1[local].float()
        x = apply_activation(x, model.activation, layer.parameters, torch.full_like(token, local))
        x = x @ layer.gemm2[local].float().t()
        if layer.bias2 is not None:
            x = x + layer.bias2[local].float()
        out.index_add_(0, token, x * scale)
    return out


def relative_error(out: Tensor, exact: Tensor) -> float:
    """L2 norm of the difference over that of the exact output; 0 for no tokens."""
    if exact.numel() == 0:
        return 0.0
    return float((out.float() - exact).norm() / exact.norm().clamp_min(1e-30))


def require(condition: bool, what: str) -> None:
    """Stop at the first thing that is wrong."""
    if not condition:
        raise SystemExit(what)


def inputs(model: Model, tokens: int, kind: str = "even") -> tuple[Tensor, Tensor]:
    """Logits and hidden states; `skewed` sends nearly all tokens to the same experts."""
    logits = torch.randn(tokens, model.experts, device="cuda")
    if kind == "skewed":
        logits += torch.linspace(12.0, 0.0, model.experts, device="cuda")
    return logits, torch.randn(tokens, model.hidden, device="cuda").to(model.dtype)


def buffer(model: Model, tokens: int) -> Tensor:
    """A replay buffer with rows to spare."""
    return torch.full((tokens + EXTRA_ROWS, model.top_k), -1, dtype=torch.int16, device="cuda")


def check_accuracy(layer: Layer, tokens: int, choice: ExpertsChoice, kind: str = "even") -> dict[str, object]:  # fmt: skip
    """Compare one call with the float32 loop and with plain torch in bfloat16."""
    model = layer.model
    label = f"{model.name}, T={tokens}, {kind}"
    logits, hidden = inputs(model, tokens, kind)
    scales, ids = route(logits, model.method(), routing_bias=layer.router_bias, backend="reference")
    recorded = buffer(model, tokens)
    out = run(layer, logits, hidden, choice, routing_replay_out=recorded)
    require(out.shape == hidden.shape and bool(out.isfinite().all()), f"{label}: not finite")
    require(torch.equal(recorded[:tokens].int(), ids[:, : model.top_k]), f"{label}: ids differ")
    require(bool((recorded[tokens:] == -1).all()), f"{label}: rows past T were written")
    exact = true_output(layer, hidden, ids, scales)
    error = relative_error(out, exact)
    if model.dtype is torch.float32:
        require(error < 1e-5, f"{label}: error {error:.2e}")
        return {"model": model.name, "tokens": tokens, "load": kind, "error": error}
    plain = relative_error(run(layer, logits, hidden, backend="reference"), exact)
    require(error <= ALLOWED_RATIO * plain, f"{label}: error {error:.2e}, plain torch {plain:.2e}")
    return {"model": model.name, "tokens": tokens, "load": kind, "error": error, "plain_error": plain}  # fmt: skip


def check_replay(layer: Layer, tokens: int, choice: ExpertsChoice) -> None:
    """Bits: from run to run, with and without recording, forced with its own ids, with the plan in the router's launch."""
    model = layer.model
    label = f"{model.name}, T={tokens}"
    logits, hidden = inputs(model, tokens)
    recorded = buffer(model, tokens)
    out = run(layer, logits, hidden, choice, routing_replay_out=recorded)
    for _ in range(3):
        require(torch.equal(out, run(layer, logits, hidden, choice)), f"{label}: a run differs")
    again = buffer(model, tokens)
    forced = run(layer, logits, hidden, choice, routing_replay_in=recorded, routing_replay_out=again)  # fmt: skip
    require(torch.equal(out, forced), f"{label}: forcing its own ids changed a bit")
    require(torch.equal(recorded, again), f"{label}: forced ids were not recorded as given")
    given = torch.full_like(out, float("nan"))
    require(run(layer, logits, hidden, choice, output=given) is given, f"{label}: not the output given")  # fmt: skip
    require(torch.equal(out, given), f"{label}: another output")
    workspace = route_and_plan_workspace(layer.gemm1.shape[0], device="cuda")
    fused = run(layer, logits, hidden, choice, workspace=workspace)
    require(torch.equal(out, fused), f"{label}: the workspace changed a bit")
    if model.shared == 0:
        _, scales, _ = run(layer, logits, hidden, unsummed(choice), do_finalize=False)
        if model.on_input:
            scales, _ = route(logits, model.method(), backend="triton")
        ids = recorded[:tokens].int()
        again = buffer(model, tokens)
        routed = run_routed(layer, (ids, scales), hidden, choice, routing_replay_out=again)
        require(torch.equal(out, routed), f"{label}: given routing changed a bit")
        require(torch.equal(recorded, again), f"{label}: given ids were not recorded as given")
    changed = recorded.clone()
    row = changed[tokens // 2]
    unused = set(range(model.experts)) - set(row.tolist())
    row[-1] = min(unused)
    differs = (run(layer, logits, hidden, choice, routing_replay_in=changed) != out).any(1)
    require(differs.nonzero().flatten().tolist() == [tokens // 2], f"{label}: the twin")


def run_routed(layer: Layer, routing: tuple[Tensor, Tensor], hidden: Tensor, choice: ExpertsChoice, **more: object) -> Tensor:  # fmt: skip
    """One call of the form that is given its routing."""
    model = layer.model
    with poisoned():
        return bf16_routed_moe(
            routing, hidden, layer.gemm1, layer.gemm2, model.experts, model.top_k, None, None, model.intermediate,
            layer.first, layer.gemm1.shape[0], activation_type=model.activation, gemm1_alpha=layer.parameters.alpha,
            gemm1_beta=layer.parameters.beta, gemm1_clamp_limit=layer.parameters.limit, gemm1_bias=layer.bias1,
            gemm2_bias=layer.bias2, use_routing_scales_on_input=model.on_input, backend="triton", config=choice, **more,
        )  # fmt: skip  # pyright: ignore[reportArgumentType, reportReturnType]


def unsummed(choice: ExpertsChoice) -> ExpertsChoice:
    """A choice for a call without the sum, which the engine `vector` has no form of."""
    return ExpertsChoice() if choice.engine == "vector" else choice


def check_expert_parallel(layer: Layer, tokens: int, ranks: int, choice: ExpertsChoice) -> None:
    """Ranks add up, record the same ids, and give exact zeros where they have no expert."""
    model = layer.model
    logits, hidden = inputs(model, tokens)
    count = model.experts // ranks
    logits[:, -count:] = -100.0  # the last rank gets nothing
    whole = buffer(model, tokens)
    expected = run(layer, logits, hidden, choice, routing_replay_out=whole).float()
    total = torch.zeros_like(expected)
    for first in range(0, model.experts, count):
        recorded = buffer(model, tokens)
        out = run(layer.rank(first, count), logits, hidden, choice, routing_replay_out=recorded)
        require(torch.equal(recorded, whole), f"{model.name}: rank {first // count} recorded other ids")  # fmt: skip
        absent = ~((whole[:tokens] >= first) & (whole[:tokens] < first + count)).any(1)
        require(bool((out[absent] == 0).all()), f"{model.name}: rank {first // count} gave more than zeros")  # fmt: skip
        total += out.float()
    error = relative_error(total, expected)
    require(error < 1e-2, f"{model.name}: {ranks} ranks add up with an error of {error:.2e}")


def check_graph(layer: Layer, tokens: int, choice: ExpertsChoice) -> None:
    """Capture once with a larger replay buffer, replay on other inputs; rows past T stay -1."""
    model = layer.model
    logits, hidden = inputs(model, tokens)
    recorded = buffer(model, tokens)
    forced = torch.full_like(recorded, -1)
    output = torch.empty_like(hidden)

    def call() -> None:
        run(layer, logits, hidden, choice, routing_replay_out=recorded, routing_replay_in=forced, output=output)  # fmt: skip

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for attempt in range(3):
        new_logits, new_hidden = inputs(model, tokens)
        logits.copy_(new_logits)
        hidden.copy_(new_hidden)
        forced.fill_(-1)
        if attempt == 2:
            forced[:tokens:2] = torch.arange(model.top_k, device="cuda", dtype=torch.int16)
        recorded.fill_(-1)
        graph.replay()
        expected_ids = buffer(model, tokens)
        expected = run(layer, logits, hidden, choice, routing_replay_out=expected_ids, routing_replay_in=forced)  # fmt: skip
        require(torch.equal(output, expected), f"{model.name}, T={tokens}: the graph's output differs")  # fmt: skip
        require(torch.equal(recorded, expected_ids), f"{model.name}, T={tokens}: the graph's ids differ")  # fmt: skip
        require(bool((recorded[tokens:] == -1).all()), f"{model.name}: rows past T were written")


def check_batch_invariant(layer: Layer, choice: ExpertsChoice) -> None:
    """Rows have the same bits in any company."""
    logits, hidden = inputs(layer.model, 700)
    whole = run(layer, logits, hidden, choice, batch_invariant=True)
    for rows in (slice(0, 1), slice(13, 14), slice(5, 40), slice(100, 400)):
        part = run(layer, logits[rows].contiguous(), hidden[rows].contiguous(), choice, batch_invariant=True)  # fmt: skip
        require(torch.equal(part, whole[rows]), f"{layer.model.name}: rows {rows} differ in other company")  # fmt: skip


def check_compiled(layer: Layer, choice: ExpertsChoice) -> None:
    """The whole graph compiles, with two numbers of tokens, and records the same."""
    model = layer.model

    def call(logits: Tensor, hidden: Tensor, recorded: Tensor) -> Tensor:
        fields = {"routing_method_type": model.kind, "backend": "triton", "config": choice}
        out = bf16_moe(logits, None, hidden, layer.gemm1, layer.gemm2, model.experts, model.top_k, None, None,
                       model.intermediate, 0, model.experts, routing_replay_out=recorded, **fields)  # fmt: skip  # pyright: ignore[reportArgumentType]
        assert isinstance(out, Tensor)
        return out * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for tokens in (5, 64):
        logits, hidden = inputs(model, tokens)
        first, second = buffer(model, tokens), buffer(model, tokens)
        same = torch.equal(compiled(logits, hidden, first), call(logits, hidden, second))
        require(same and torch.equal(first, second), f"compiled, T={tokens}")


def checks(choice: ExpertsChoice) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything, by name."""
    small, qwen3, gpt_oss = (make_layer(model) for model in (SMALL, QWEN3, GPT_OSS))
    for tokens in TOKENS:
        yield "accuracy", lambda t=tokens: check_accuracy(small, t, choice)
        if tokens:
            yield "replay", lambda t=tokens: check_replay(small, t, choice)
    for tokens in (1, 4, 16, 64, 257, 4096):
        yield "accuracy", lambda t=tokens: check_accuracy(qwen3, t, choice)
    for tokens in (16, 1000):
        yield "accuracy", lambda t=tokens: check_accuracy(qwen3, t, choice, "skewed")
        yield "replay", lambda t=tokens: check_replay(qwen3, t, choice)
    for tokens in (1, 33, 300):
        yield "accuracy", lambda t=tokens: check_accuracy(gpt_oss, t, choice)
    for model in VARIANTS:
        layer = make_layer(model)
        for tokens in (2, 5, 300):
            yield "accuracy", lambda t=tokens, x=layer: check_accuracy(x, t, choice)
            yield "replay", lambda t=tokens, x=layer: check_replay(x, t, choice)
    yield "expert parallel", lambda: check_expert_parallel(small, 65, 4, choice)
    yield "expert parallel", lambda: check_expert_parallel(qwen3, 300, 8, choice)
    for layer, tokens in ((small, 5), (small, 300), (qwen3, 16), (qwen3, 256)):
        yield "graph", lambda x=layer, t=tokens: check_graph(x, t, choice)
    yield "batch invariant", lambda: check_batch_invariant(small, choice)
    yield "batch invariant", lambda: check_batch_invariant(qwen3, choice)
    yield "compiled", lambda: check_compiled(small, choice)


def main() -> None:
    """Check everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--engine", choices=ENGINES, help="default: what the tables choose")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    counts: dict[str, int] = {}
    accuracy: list[object] = []
    refused: list[str] = []
    for name, check in checks(ExpertsChoice(engine=arguments.engine)):
        try:
            found = check()
        except ConfigError as refusal:
            # An engine that is named and cannot run a layer says so; what is chosen always runs.
            require(arguments.engine is not None, str(refusal))
            refused.append(f"{name}: {refusal}")
            continue
        counts[name] = counts.get(name, 0) + 1
        if found is not None:
            accuracy.append(found)
            print(json.dumps(found), flush=True)
    result = {
        "commit": arguments.commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "engine": arguments.engine or "chosen",
        "checks_passed": counts,
        "refused": refused,
        "seconds": round(time.perf_counter() - started, 1),
        "accuracy": accuracy,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "accuracy"}))


if __name__ == "__main__":
    main()
