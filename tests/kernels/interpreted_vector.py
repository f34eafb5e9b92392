"""Runs of the experts without a plan in the interpreter, by name: `TRITON_INTERPRET=1 python interpreted_vector.py NAME`.

A process of its own, because the interpreter is chosen where a kernel is defined. Prints `same` at the end.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from routing_replay.kernels import ActivationType, RoutingMethod, RoutingMethodType
from routing_replay.kernels.experts import (
    ExpertWeights,
    SwigluParameters,
    _triton_vector,
    combine_reference,
)
from routing_replay.kernels.experts._triton_vector import launch_vector_experts
from routing_replay.kernels.experts.config import ExpertsChoice, ExpertsConfig, GemmTile
from routing_replay.kernels.fused_moe.launches import moe_triton_into, routed_moe_triton_into
from routing_replay.kernels.fused_moe.layer import ExpertsLayer
from routing_replay.kernels.fused_moe.reference import moe_reference, routed_moe_reference

H, I, E, K = 40, 24, 8, 2  # noqa: E741 -- the letters of the shapes
METHOD = RoutingMethod(type=RoutingMethodType.Renormalize, num_experts=E, top_k=K)


def choice(*, ahead: int = 3) -> ExpertsChoice:
    return ExpertsChoice(
        engine="vector",
        tile_tokens=1,
        gemm1=GemmTile(rows=32, depth=32, stages=1, warps=1),
        gemm2=GemmTile(rows=16, depth=32, stages=ahead, warps=1),
    )


def make_layer(
    activation: ActivationType = ActivationType.Swiglu,
    *,
    dtype: torch.dtype = torch.float32,
    num_experts: int = E,
    with_all: bool = False,
) -> ExpertsLayer:
    rows = 2 * I if activation.is_gated else I
    weights = ExpertWeights(
        gemm1_weights=(torch.randn(num_experts, rows, H) * 0.2).to(dtype),
        gemm2_weights=(torch.randn(num_experts, H, I) * 0.2).to(dtype),
        gemm1_bias=torch.randn(num_experts, rows) if with_all else None,
        gemm2_bias=torch.randn(num_experts, H) if with_all else None,
    )
    parameters = SwigluParameters()
    if with_all:
        values = (torch.rand(num_experts) + 0.5 for _ in range(3))
        parameters = SwigluParameters(**dict(zip(("alpha", "beta", "limit"), values, strict=True)))
    return ExpertsLayer(
        weights=weights,
        activation=activation,
        parameters=parameters,
        num_experts=num_experts,
        local_expert_offset=0,
        choice=choice(),
    )


def run(
    logits: Tensor,
    hidden: Tensor,
    layer: ExpertsLayer,
    routing: RoutingMethod = METHOD,
    *,
    recorded: Tensor | None = None,
    forced: Tensor | None = None,
) -> Tensor:
    output = torch.full_like(hidden, float("nan"))
    moe_triton_into(
        output, logits, hidden, routing, layer, routing_bias=None, routing_replay_out=recorded, routing_replay_in=forced
    )  # fmt: skip
    return output


def expected_of(logits: Tensor, hidden: Tensor, layer: ExpertsLayer, routing: RoutingMethod = METHOD, forced: Tensor | None = None) -> Tensor:  # fmt: skip
    parts = moe_reference(logits, hidden, routing, layer, routing_bias=None, routing_replay_out=None, routing_replay_in=forced)  # fmt: skip
    return combine_reference(*parts)


def close(out: Tensor, expected: Tensor) -> None:
    """Sums in another order: last places of float32, or one of bfloat16."""
    atol, rtol = (2e-2, 2**-7) if out.dtype is torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(out, expected, atol=atol, rtol=rtol)


def buffer(tokens: int) -> Tensor:
    return torch.full((tokens + 3, K), -1, dtype=torch.int16)


def activations() -> None:
    logits, hidden = torch.randn(3, E), torch.randn(3, H)
    for activation in ActivationType:
        for with_all in (False, True):
            layer = make_layer(activation, with_all=with_all)
            close(run(logits, hidden, layer), expected_of(logits, hidden, layer))
    rounded = make_layer(dtype=torch.bfloat16, with_all=True)
    out = run(logits, hidden.bfloat16(), rounded)
    close(out, expected_of(logits, hidden.bfloat16(), rounded))


def replay() -> None:
    logits, hidden = torch.randn(4, E), torch.randn(4, H)
    layer = make_layer(with_all=True)
    recorded = buffer(4)
    out = run(logits, hidden, layer, recorded=recorded)
    assert recorded[:4].tolist() == logits.argsort(-1, descending=True)[:, :K].tolist()
    assert (recorded[4:] == -1).all()
    assert torch.equal(out, run(logits, hidden, layer)), "recording changed a bit"
    assert torch.equal(out, run(logits, hidden, layer, forced=recorded)), "forcing changed a bit"
    changed = recorded.clone()
    changed[2, 1] = next(e for e in range(E) if e not in recorded[2].tolist())
    differs = (run(logits, hidden, layer, forced=changed) != out).any(1)
    assert differs.tolist() == [False, False, True, False]
    alone = torch.cat([run(logits[t : t + 1], hidden[t : t + 1], layer) for t in range(4)])
    assert torch.equal(out, alone), "a row's bits depend on the rows beside it"
    for ahead in (1, 2):
        other = replace(layer, choice=choice(ahead=ahead))
        assert torch.equal(out, run(logits, hidden, other)), "what loads early changed a bit"
    # Repeated, unknown and missing ids add nothing, whatever memory holds in their place.
    bad = torch.tensor([[3, 3], [-2, 3], [8, 3], [-1, 0]], dtype=torch.int16)
    poisoned = make_layer()
    poisoned.weights.gemm2_weights[0] = float("nan")
    poisoned.weights.gemm2_weights[7] = float("nan")
    logits[3, 1:3] = 9.0
    close(run(logits, hidden, poisoned, forced=bad), expected_of(logits, hidden, poisoned, forced=bad))  # fmt: skip


def part_of(layer: ExpertsLayer, here: slice) -> ExpertsLayer:
    names = ("gemm1_weights", "gemm2_weights", "gemm1_bias", "gemm2_bias")
    weights = ExpertWeights(**{name: getattr(layer.weights, name)[here] for name in names})
    values = {name: getattr(layer.parameters, name)[here] for name in ("alpha", "beta", "limit")}
    return replace(
        layer, weights=weights, parameters=SwigluParameters(**values), local_expert_offset=here.start
    )  # fmt: skip


def expert_parallel() -> None:
    logits, hidden = torch.randn(4, E), torch.randn(4, H)
    layer = make_layer(with_all=True)
    whole = buffer(4)
    expected = run(logits, hidden, layer, recorded=whole)
    total = torch.zeros_like(expected)
    for first in range(0, E, 2):
        part = part_of(layer, slice(first, first + 2))
        recorded = buffer(4)
        out = run(logits, hidden, part, recorded=recorded)
        assert torch.equal(recorded, whole), "every rank records all ids"
        is_here = ((whole[:4] >= first) & (whole[:4] < first + 2)).any(1)
        assert (out[~is_here] == 0).all()
        total += out
    close(total, expected)


def experts_of(
    ids: list[list[int]], layer: ExpertsLayer, *, are_distinct: bool = False, ahead: int = 3
) -> tuple[Tensor, Tensor]:
    """What both GEMMs write, into memory of NaN; GEMM 2 takes two steps for an expert."""
    topk_ids = torch.tensor(ids, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    hidden, output = torch.randn(3, H, generator=generator), torch.full((3, H), float("nan"))
    topk_weights = torch.rand(3, topk_ids.shape[1], generator=generator)
    activated = torch.full((topk_ids.numel(), I), float("nan"))
    fixed = choice(ahead=ahead)
    tokens = slice(0, len(ids))
    gemm2 = replace(fixed.gemm2, rows=64, depth=16)
    # Where no pair is computed here, none takes a turn: nothing may be divided by their number.
    with np.errstate(divide="raise"):
        launch_vector_experts(
            hidden[tokens],
            topk_ids,
            topk_weights[tokens],
            layer.weights,
            activated,
            output[tokens],
            config=ExpertsConfig(engine="vector", tile_tokens=1, gemm1=fixed.gemm1, gemm2=gemm2),
            activation=layer.activation,
            parameters=layer.parameters,
            num_experts=layer.num_experts,
            local_expert_offset=layer.local_expert_offset,
            are_distinct=are_distinct,
        )
    parts = routed_moe_reference(topk_ids, topk_weights[tokens], hidden[tokens], layer, routing_replay_out=None)  # fmt: skip
    close(output[tokens], combine_reference(*parts))
    return activated, output[tokens]


def part_of_the_experts() -> None:
    """On a part of the experts, both GEMMs write the bits that all experts give where the other ids are missing."""
    whole = make_layer(with_all=True)
    here = slice(3, 6)
    part = part_of(whole, here)
    distinct = (
        [[0, 7, 1]],
        [[3, 4, 5], [5, 3, 4]],
        [[5, 0, 1], [2, 6, 7], [6, 3, 5]],
        [[-1, 8, 3], [70000, -2, 5]],
    )
    repeated = ([[4, 4, 3], [0, 0, 4], [3, 0, 3]], [[-1, -1, -1]])
    for ids in (*distinct, *repeated):
        others_missing = [[e if here.start <= e < here.stop else -1 for e in row] for row in ids]
        expected_activated, expected = experts_of(others_missing, whole)
        activated, out = experts_of(ids, part, are_distinct=ids in distinct)
        torch.testing.assert_close(activated, expected_activated, atol=0, rtol=0, equal_nan=True)  # fmt: skip
        assert torch.equal(out, expected)
    ids = [[5, 0, 1], [6, 3, 5]]
    out = experts_of(ids, part)[1]
    assert torch.equal(experts_of(ids, part, ahead=1)[1], out), "what loads early changed a bit"
    with patch.object(_triton_vector, "_MOST_PAIRS_SEEN", 5):
        assert torch.equal(experts_of(ids, part)[1], out), "many pairs have other bits"
    changed = experts_of([[5, 0, 2], [6, 4, 5]], part)[1]
    assert (changed != out).any(1).tolist() == [False, True]


def shared_and_strided() -> None:
    logits, hidden = torch.randn(3, E), torch.randn(3, H)
    routing = replace(METHOD, num_fused_shared_experts=1)
    layer = make_layer(num_experts=E + 1)
    close(run(logits, hidden, layer, routing), expected_of(logits, hidden, layer, routing))
    assert run(logits[:0], hidden[:0], make_layer()).shape == (0, H)
    wide = torch.full((3, 2 * H), float("nan"))
    strided = torch.empty(3, H + 4)[:, :H].copy_(hidden)
    plain = make_layer()
    moe_triton_into(
        wide[:, :H], logits, strided, METHOD, plain, routing_bias=None, routing_replay_out=None, routing_replay_in=None
    )  # fmt: skip
    assert torch.equal(wide[:, :H], run(logits, hidden, plain))
    assert wide[:, H:].isnan().all()


def routed() -> None:
    hidden, layer = torch.randn(5, H), make_layer(with_all=True)
    ids = torch.tensor([[0, 7], [3, 3], [-1, 2], [8, 1], [70000, -1]]).int()
    weights = torch.rand(5, K)
    recorded, expected_record = buffer(5), buffer(5)
    out = torch.full_like(hidden, float("nan"))
    routed_moe_triton_into(out, ids, weights, hidden, layer, routing_replay_out=recorded)
    parts = routed_moe_reference(ids, weights, hidden, layer, routing_replay_out=expected_record)
    assert torch.equal(recorded, expected_record)
    close(out, combine_reference(*parts))
    assert (out[4] == 0).all()


NAMES: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        activations,
        replay,
        expert_parallel,
        part_of_the_experts,
        shared_and_strided,
        routed,
    )
}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    NAMES[sys.argv[1]]()
    sys.stdout.write("same\n")
