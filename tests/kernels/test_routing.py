"""Every routing method against scalar code in float64, position by position, and against Transformers' own routers."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels import RoutingMethod, RoutingMethodType, fused_topk_deepseek, route
from routing_replay.kernels.routing import route_reference

Kind = RoutingMethodType


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [power / sum(powers) for power in powers]


def _top(keys: list[float], count: int, among: list[int] | None = None) -> list[int]:
    ids = range(len(keys)) if among is None else among
    return sorted(ids, key=lambda e: (-keys[e], e))[:count]


def _select(scores: list[float], bias: list[float], m: RoutingMethod) -> list[int]:
    keys = [s + b for s, b in zip(scores, bias, strict=True)]
    if m.n_group == 1:
        return _top(keys, m.top_k)
    size = m.num_experts // m.n_group
    groups = [sum(sorted(keys[g * size : (g + 1) * size])[-2:]) for g in range(m.n_group)]
    chosen = _top(groups, m.topk_group)
    return _top(keys, m.top_k, [e for g in chosen for e in range(g * size, (g + 1) * size)])


def _scalar_route(
    row: list[float], bias: list[float], m: RoutingMethod, forced: list[int] | None
) -> tuple[list[int], list[float]]:
    """One token in float64: ids and weights."""
    if m.has_router_bias:
        row, bias = [x + b for x, b in zip(row, bias, strict=True)], [0.0] * len(row)
    if m.type in (Kind.Default, Kind.RenormalizeNaive):
        scores = _softmax(row)
    elif m.type in (Kind.DeepSeekV3, Kind.SigmoidRenorm, Kind.MiniMax2, Kind.Sigmoid):
        scores = [_sigmoid(x) for x in row]
    else:
        scores = row
    ids = _select(scores, bias, m) if forced is None else forced
    weights = [scores[e] for e in ids]
    if m.type is Kind.Renormalize:
        weights = _softmax(weights)
    elif m.type in (Kind.Llama4, Kind.TopKSigmoid):
        weights = [_sigmoid(x) for x in weights]
    elif m.type is Kind.RenormalizeNaive or (
        m.type in (Kind.DeepSeekV3, Kind.MiniMax2, Kind.SigmoidRenorm) and m.norm_topk_prob
    ):
        total = sum(weights) + (0 if m.type is Kind.RenormalizeNaive else 1e-20)
        weights = [weight / total for weight in weights]
    return ids, [weight * m.routed_scaling_factor for weight in weights]


def _method(kind: Kind, experts: int = 32, top_k: int = 4, **more: object) -> RoutingMethod:
    top_k = 1 if kind is Kind.Llama4 else top_k
    return RoutingMethod(type=kind, num_experts=experts, top_k=top_k, **more)  # pyright: ignore[reportArgumentType]


METHODS = {
    **{kind.name: _method(kind) for kind in Kind},
    "grouped": _method(Kind.DeepSeekV3, 32, 4, n_group=8, topk_group=4, routed_scaling_factor=2.5),
    "grouped, not normalised": _method(Kind.DeepSeekV3, 48, 6, n_group=4, topk_group=2, norm_topk_prob=False),
    "grouped like DeepSeek-V3": _method(Kind.DeepSeekV3, 256, 8, n_group=8, topk_group=4, routed_scaling_factor=2.5),
    "scaled": _method(Kind.MiniMax2, 60, 5, routed_scaling_factor=1.75),
    "sigmoid not normalised": _method(Kind.SigmoidRenorm, norm_topk_prob=False),
    "many": _method(Kind.RenormalizeNaive, 1024, 32),
    "one": _method(Kind.Default, 16, 1),
    "all": _method(Kind.Renormalize, 8, 8),
}  # fmt: skip


def _inputs(m: RoutingMethod, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, m.num_experts, generator=generator) * 2
    bias = torch.randn(m.num_experts, generator=generator) / 4 if m.takes_bias else None
    return logits, bias


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_forced", [False, True])
def test_ids_and_weights_are_those_of_scalar_code(name: str, dtype: torch.dtype, is_forced: bool):
    method = METHODS[name]
    logits, bias = _inputs(method, 65)
    logits = logits.to(dtype)
    forced = None
    if is_forced:
        forced = torch.rand(65, method.num_experts).argsort(-1)[:, : method.top_k].short()
    weights, ids = route_reference(logits, method, routing_bias=bias, routing_replay_in=forced)
    assert (weights.dtype, ids.shape) == (torch.float32, (65, method.top_k))
    offsets = [0.0] * method.num_experts if bias is None else bias.double().tolist()
    for token, row in enumerate(logits.double().tolist()):
        given = None if forced is None else forced[token].tolist()
        expected_ids, expected = _scalar_route(row, offsets, method, given)
        assert ids[token].tolist() == expected_ids
        np.testing.assert_allclose(weights[token].numpy(), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_one_changed_logit_changes_the_ids(name: str):
    """The twin of the comparison: it can fail."""
    method = METHODS[name]
    if method.top_k == method.num_experts:
        pytest.skip("every expert is picked whatever the logits are")
    logits, bias = _inputs(method, 5)
    _, ids = route_reference(logits, method, routing_bias=bias)
    changed = logits.clone()
    changed[3, ids[3, 0]] = -100.0
    _, again = route_reference(changed, method, routing_bias=bias)
    assert (again != ids).any(dim=1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_ties_go_to_the_smaller_id_and_columns_fall(name: str):
    method = METHODS[name]
    logits = torch.zeros(3, method.num_experts)
    logits[1] = -0.0
    logits[2, ::2] = -0.0
    _, ids = route_reference(logits, method)
    assert ids.tolist() == [list(range(method.top_k))] * 3
    tied = torch.randint(-2, 3, (64, method.num_experts)).float()
    _, ids = route_reference(tied, method)
    for token, row in enumerate(tied.tolist()):
        assert ids[token].tolist() == _scalar_route(row, [0.0] * len(row), method, None)[0]


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize(
    "value", [float("nan"), -float("nan"), float("inf"), -float("inf"), 3e38, -3e38]
)
def test_strange_logits_give_distinct_ids_in_range(name: str, value: float):
    method = METHODS[name]
    logits, bias = _inputs(method, 4)
    logits[1, method.num_experts // 2] = value
    logits[2] = value
    logits[3, 1:] = value
    _, ids = route_reference(logits, method, routing_bias=bias)
    _, again = route_reference(logits, method, routing_bias=bias)
    assert torch.equal(ids, again)
    for row in ids.tolist():
        assert len(set(row)) == method.top_k
        assert all(0 <= expert < method.num_experts for expert in row)
    if (
        math.isnan(value)
        and method.type not in (Kind.Default, Kind.RenormalizeNaive)
        and method.n_group == 1
    ):
        assert ids[1, 0] == method.num_experts // 2  # NaN is above every number


def test_saturated_sigmoids_tie_and_raw_logits_do_not():
    logits = torch.tensor([[20.0, 40.0, 30.0, -200.0, -300.0, -120.0]])
    for kind, expected in (
        (Kind.Sigmoid, [0, 1, 2, 3, 4, 5]),
        (Kind.TopKSigmoid, [1, 2, 0, 5, 3, 4]),
    ):
        _, ids = route_reference(logits, _method(kind, 6, 6))
        assert ids.tolist() == [expected]


def test_all_selected_sigmoids_may_underflow():
    logits = torch.full((2, 8), -1000.0)
    for kind in (Kind.SigmoidRenorm, Kind.MiniMax2, Kind.DeepSeekV3):
        weights, ids = route_reference(logits, _method(kind, 8, 2), routing_bias=torch.zeros(8))
        assert (weights == 0).all()
        assert ids.tolist() == [[0, 1]] * 2


def test_negative_biases_do_not_let_other_groups_in():
    method = _method(Kind.DeepSeekV3, 8, 4, n_group=4, topk_group=2)
    bias = torch.tensor([-5.0, -5, -6, -6, -1, -1, -7, -7])
    _, ids = route_reference(torch.zeros(1, 8), method, routing_bias=bias)
    assert ids.tolist() == [[4, 5, 0, 1]]


def test_small_weights_are_not_taken_back_from_biased_keys():
    method = _method(Kind.MiniMax2, 4, 2)
    bias = torch.tensor([1e4, 1e4, 0.0, 0.0])
    weights, _ = route_reference(torch.tensor([[-9.0, -8.0, 5.0, 5.0]]), method, routing_bias=bias)
    first, second = _sigmoid(-9.0), _sigmoid(-8.0)
    np.testing.assert_allclose(sorted(weights[0].tolist()), [first / (first + second), second / (first + second)], rtol=2e-6)  # fmt: skip


def test_bias_of_the_routers_gemm_changes_weights_and_a_selection_bias_does_not():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    bias = torch.tensor([0.0, 1.0, 0.0, 2.0])
    weights, ids = route_reference(logits, _method(Kind.Renormalize, 4, 2), routing_bias=bias)
    assert ids.tolist() == [[3, 1]]
    np.testing.assert_allclose(weights[0].tolist(), _softmax([2.0, 1.0]), rtol=1e-6)
    weights, ids = route_reference(logits, _method(Kind.DeepSeekV3, 4, 2), routing_bias=bias)
    assert ids.tolist() == [[3, 1]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_shared_experts_come_last_with_weight_one():
    method = _method(Kind.DeepSeekV3, 16, 2, n_group=4, topk_group=2, num_fused_shared_experts=2)
    logits, bias = _inputs(method, 3)
    weights, ids = route_reference(logits, method, routing_bias=bias)
    alone = RoutingMethod(type=Kind.DeepSeekV3, num_experts=16, top_k=2, n_group=4, topk_group=2)
    expected_weights, expected_ids = route_reference(logits, alone, routing_bias=bias)
    assert torch.equal(weights[:, :2], expected_weights)
    assert torch.equal(ids[:, :2], expected_ids)
    assert ids[:, 2:].tolist() == [[16, 17]] * 3
    assert (weights[:, 2:] == 1).all()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_forced_rows_mix_with_native_ones_and_bad_ids_weigh_nothing(name: str):
    method = METHODS[name]
    if method.top_k < 3:
        pytest.skip("needs a row of three")
    logits, bias = _inputs(method, 4)
    native_weights, native = route_reference(logits, method, routing_bias=bias)
    forced = native.flip(1).short()
    forced[0] = -1
    forced[2, 1] = forced[2, 0]
    forced[3, 1] = method.num_experts
    weights, ids = route_reference(logits, method, routing_bias=bias, routing_replay_in=forced)
    assert torch.equal(ids[0], native[0])
    assert torch.equal(weights[0], native_weights[0])
    assert torch.equal(ids[1:], forced[1:].long())
    torch.testing.assert_close(weights[1], native_weights[1].flip(0), rtol=2e-6, atol=0)
    assert weights[2, 1] == weights[3, 1] == 0
    assert (weights[2:, 0] != 0).all()


def test_gradients_reach_the_router_through_forced_ids():
    for name, method in METHODS.items():
        logits, bias = _inputs(method, 3)
        logits.requires_grad_()
        forced = torch.rand(3, method.num_experts).argsort(-1)[:, : method.top_k].short()
        weights, _ = route_reference(logits, method, routing_bias=bias, routing_replay_in=forced)
        (weights * torch.rand_like(weights)).sum().backward()
        assert logits.grad is not None
        touched = logits.grad.gather(1, forced.long())
        is_constant = method.top_k == 1 and method.type in (
            Kind.Renormalize, Kind.RenormalizeNaive, Kind.DeepSeekV3, Kind.MiniMax2, Kind.SigmoidRenorm)  # fmt: skip
        assert is_constant or (touched != 0).any(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts=0; accepted is 1 to 2048"),
        ({"num_experts": 4096}, "num_experts=4096"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 33}, "top_k=33; accepted is 1 to 32"),
        ({"num_fused_shared_experts": -1}, "num_fused_shared_experts=-1"),
        ({"routed_scaling_factor": 2.0}, "routed_scaling_factor=2.0 but routing method Default"),
        ({"n_group": 2, "topk_group": 1}, "Default has no groups"),
        ({"type": Kind.DeepSeekV3, "n_group": 0}, "n_group=0"),
        ({"type": Kind.DeepSeekV3, "n_group": 64, "topk_group": 2}, "n_group=64"),
        ({"type": Kind.DeepSeekV3, "n_group": 8, "topk_group": 0}, "topk_group=0"),
        ({"type": Kind.DeepSeekV3, "n_group": 16, "topk_group": 1, "top_k": 5}, "4 candidates"),
        ({"type": Kind.Llama4}, "top_k=4 with routing method Llama4"),
    ],
)
def test_methods_that_cannot_be_are_refused(changes: dict[str, object], message: str):
    fields = {"type": Kind.Default, "num_experts": 64, "top_k": 4, **changes}
    with pytest.raises(ConfigError, match=message):
        RoutingMethod(**fields)  # pyright: ignore[reportArgumentType]


def _op_arguments(
    m: RoutingMethod, bias: Tensor | None, buffer: Tensor | None
) -> tuple[object, ...]:
    fields = (
        m.n_group,
        m.topk_group,
        m.routed_scaling_factor,
        m.norm_topk_prob,
        m.num_fused_shared_experts,
    )
    return (bias, buffer, None, int(m.type), m.top_k, *fields, "reference")


@pytest.mark.parametrize("name", ["RenormalizeNaive", "grouped"])
def test_the_op_is_registered_properly(name: str):
    method = METHODS[name]
    logits, bias = _inputs(method, 5)
    buffer = torch.full((7, method.top_k), -1, dtype=torch.int16)
    op = torch.ops.routing_replay.route.default
    torch.library.opcheck(op, (logits, *_op_arguments(method, bias, buffer)))
    torch.library.opcheck(op, (logits, *_op_arguments(method, bias, None)))

    def layer(logits: Tensor, buffer: Tensor) -> Tensor:
        weights, ids = route(logits, method, routing_bias=bias, routing_replay_out=buffer)
        return weights.sum(1) + ids.sum(1)

    eager, compiled = buffer.clone(), buffer.clone()
    expected = layer(logits, eager)
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(logits, compiled), expected)
    assert torch.equal(compiled, eager)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_the_op_records_what_it_returns_and_nothing_else(name: str, tokens: int):
    method = METHODS[name]
    logits, bias = _inputs(method, tokens)
    buffer = torch.full((tokens + 2, method.top_k), -1, dtype=torch.int16)
    weights, ids = route(logits, method, routing_bias=bias, routing_replay_out=buffer)
    assert ids.dtype is torch.int32
    assert torch.equal(buffer[:tokens].int(), ids[:, : method.top_k])
    assert (buffer[tokens:] == -1).all()
    without = route(logits, method, routing_bias=bias)
    assert torch.equal(without[0], weights)
    again = route(logits, method, routing_bias=bias, routing_replay_in=buffer)
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_logits": torch.zeros(4, 31)}, r"shape \(4, 31\), expected \[num_tokens, num_experts=32\]"),
        ({"router_logits": torch.zeros(4, 32, dtype=torch.float64)}, "router_logits is torch.float64"),
        ({"router_logits": torch.zeros(32, 4).t()}, "rows of consecutive elements"),
        ({"routing_bias": torch.zeros(31)}, "routing_bias has shape"),
        ({"routing_bias": torch.zeros(32, dtype=torch.int32)}, "routing_bias is torch.int32"),
        ({"routing_bias": torch.zeros(32, device="meta")}, "routing_bias is on meta"),
        ({"routing_replay_out": torch.zeros(4, 4)}, "routing_replay_out must be int16"),
        ({"routing_replay_in": torch.zeros(3, 4, dtype=torch.int16)}, "dim0 must be >= num_tokens=4, got 3"),
        ({"backend": "cuda"}, "backend='cuda'; accepted are 'auto', 'reference', 'triton'"),
        ({"backend": "triton"}, "backend='triton' on cpu"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(changes: dict[str, object], message: str):
    arguments = {
        "router_logits": torch.zeros(4, 32),
        "method": METHODS["MiniMax2"],
        "routing_bias": torch.zeros(32),
    }
    with pytest.raises(ConfigError, match=message):
        route(**{**arguments, **changes})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="MiniMax2 selects with one"):
        route(torch.zeros(4, 32), METHODS["MiniMax2"])
    with pytest.raises(ConfigError, match="Default takes none"):
        route(torch.zeros(4, 32), METHODS["Default"], routing_bias=torch.zeros(32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("experts", "groups", "picked"), [(256, 8, 4), (64, 1, 1), (384, 1, 1)])
def test_fused_topk_deepseek_divides_in_float64(dtype: torch.dtype, experts: int, groups: int, picked: int):  # fmt: skip
    scores, bias = torch.randn(9, experts).to(dtype), torch.randn(experts)
    values = torch.full((9, 8), float("nan"), dtype=dtype)
    indices = torch.full((9, 8), -1, dtype=torch.int32)
    buffer = torch.full((11, 8), -1, dtype=torch.int16)
    fused_topk_deepseek(scores, bias, groups, picked, 8, 2.5, values, indices, routing_replay_out=buffer)  # fmt: skip
    method = RoutingMethod(type=Kind.DeepSeekV3, num_experts=experts, top_k=8, n_group=groups, topk_group=picked,
                           routed_scaling_factor=2.5)  # fmt: skip
    for token, row in enumerate(scores.double().tolist()):
        ids, weights = _scalar_route(row, bias.double().tolist(), method, None)
        assert indices[token].tolist() == ids
        expected = torch.tensor(weights, dtype=torch.float64).to(dtype)
        torch.testing.assert_close(values[token], expected, rtol=2e-6 if dtype is torch.float32 else None, atol=None if dtype is not torch.float32 else 0)  # fmt: skip
    assert torch.equal(buffer[:9].int(), indices)
    assert (buffer[9:] == -1).all()


def _deepseek(**changes: object) -> dict[str, object]:
    return {
        "scores": torch.zeros(4, 64), "bias": torch.zeros(64), "n_group": 4, "topk_group": 2, "topk": 8,
        "routed_scaling_factor": 1.0, "topk_values": torch.zeros(4, 8), "topk_indices": torch.zeros(4, 8, dtype=torch.int32),
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(64, 4).t()}, "contiguous"),
        ({"scores": torch.zeros(4, 64, dtype=torch.int32)}, "scores is torch.int32"),
        ({"bias": torch.zeros(63)}, "bias has shape"),
        ({"scores": torch.zeros(4, 512), "bias": torch.zeros(512)}, "num_experts=512 with n_group=4; accepted is up to 256"),
        ({"scores": torch.zeros(4, 512), "bias": torch.zeros(512), "n_group": 1, "topk_group": 1}, "up to 384"),
        ({"topk": 9}, "topk=9"),
        ({"topk_group": 5}, "topk_group=5 with n_group=4"),
        ({"scores": torch.zeros(4, 256), "bias": torch.zeros(256)}, "groups of 64 experts"),
        ({"scores": torch.zeros(4, 256), "bias": torch.zeros(256), "n_group": 8, "topk_group": 5}, "128 candidates"),
        ({"topk_values": torch.zeros(4, 8, dtype=torch.bfloat16)}, "topk_values is torch.bfloat16"),
        ({"topk_indices": torch.zeros(4, 7, dtype=torch.int32)}, "topk_indices is torch.int32 of shape"),
        ({"routing_replay_out": torch.zeros(4, 8, dtype=torch.int32)}, "routing_replay_out is torch.int32"),
        ({"routing_replay_out": torch.zeros(3, 8, dtype=torch.int16)}, r"shape\[0\] must be >= 4"),
        ({"routing_replay_out": torch.zeros(8, 4, dtype=torch.int16).t()}, "contiguous"),
    ],
)  # fmt: skip
def test_fused_topk_deepseek_refuses_what_flashinfer_refuses(changes: dict[str, object], message: str):  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fused_topk_deepseek(**_deepseek(**changes))  # pyright: ignore[reportArgumentType]


_INTERPRETED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from kernels.test_routing import METHODS, _inputs
from routing_replay.kernels.routing import route_reference
from routing_replay.kernels.routing._triton import launch_route

def check(method, tokens, dtype, forced):
    logits, bias = _inputs(method, tokens, seed=tokens)
    if tokens > 3:
        logits[1] = torch.randint(-2, 3, logits[1].shape).float()
        logits[2, ::3] = float("nan")
        logits[3] = -logits[3].abs() * 30
    logits = logits.to(dtype)
    given = None
    if forced:
        given = torch.rand(tokens, method.num_experts).argsort(-1)[:, : method.top_k].short()
        given[::3] = -1
        if method.top_k > 1 and tokens > 1:
            given[1, 1] = given[1, 0]
    weights = torch.full((tokens, method.num_columns), float("nan"))
    ids = torch.full((tokens, method.num_columns), -7, dtype=torch.int32)
    recorded = torch.full((tokens + 2, method.top_k), -1, dtype=torch.int16)
    launch_route(logits, method, weights, ids, routing_bias=bias, routing_replay_in=given, routing_replay_out=recorded)
    expected_weights, expected = route_reference(logits, method, routing_bias=bias, routing_replay_in=given)
    assert ids.tolist() == expected.tolist(), (method, tokens)
    assert recorded[:tokens].tolist() == expected[:, : method.top_k].tolist()
    assert (recorded[tokens:] == -1).all()
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0, equal_nan=True)

for name, method in METHODS.items():
    if method.num_experts <= 256:
        for tokens in (1, 5):
            check(method, tokens, torch.float32, forced=tokens == 5)
check(METHODS["grouped"], 17, torch.bfloat16, True)
check(METHODS["RenormalizeNaive"], 65, torch.float32, False)
check(METHODS["grouped"], 257, torch.float32, False)
print("same")
"""


def test_interpreted_kernel_is_the_reference(tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, str(Path(__file__).parents[1])],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]
