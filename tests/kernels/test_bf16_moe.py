"""`bf16_moe` against loops that anyone can read, and against its own promises about replay."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels import (
    ActivationType,
    ExpertsChoice,
    GemmTile,
    RoutingMethodType,
    bf16_moe,
    gate_first,
)
from routing_replay.kernels.fused_moe.layer import choice_text

# The others are tested in test_routing.py; what happens after routing does not depend on them.
METHODS = (
    RoutingMethodType.Default,
    RoutingMethodType.Renormalize,
    RoutingMethodType.RenormalizeNaive,
)
SHAPES = [(8, 2), (32, 4), (60, 4), (64, 6), (128, 8), (512, 10)]


@dataclass(frozen=True, slots=True)
class Case:
    logits: Tensor
    hidden: Tensor
    gemm1: Tensor
    gemm2: Tensor
    top_k: int
    method: RoutingMethodType = RoutingMethodType.RenormalizeNaive

    def run(self, **changes: object) -> Tensor:
        experts, rows = self.gemm1.shape[0], self.gemm2.shape[2]
        arguments: dict[str, object] = {
            "routing_logits": self.logits,
            "routing_bias": None,
            "hidden_states": self.hidden,
            "gemm1_weights": self.gemm1,
            "gemm2_weights": self.gemm2,
            "num_experts": self.logits.shape[1],
            "top_k": self.top_k,
            "n_group": None,
            "topk_group": None,
            "intermediate_size": rows,
            "local_expert_offset": 0,
            "local_num_experts": experts,
            "routing_method_type": self.method,
        }
        return bf16_moe(**{**arguments, **changes})  # pyright: ignore[reportArgumentType, reportReturnType]


def _case(
    tokens: int,
    experts: int,
    top_k: int,
    *,
    dtype: torch.dtype = torch.float32,
    method: RoutingMethodType = RoutingMethodType.RenormalizeNaive,
) -> Case:
    return Case(
        torch.randn(tokens, experts).to(dtype),
        torch.randn(tokens, 16).to(dtype),
        (torch.randn(experts, 24, 16) / 4).to(dtype),
        (torch.randn(experts, 16, 12) / 4).to(dtype),
        top_k,
        method,
    )


def _buffer(case: Case, extra: int = 0, fill: int = -1) -> Tensor:
    return torch.full((len(case.hidden) + extra, case.top_k), fill, dtype=torch.int16)


def _slow_ids(case: Case) -> list[list[int]]:
    keys = case.logits.float() if case.method is RoutingMethodType.Renormalize else None
    keys = case.logits.softmax(-1, dtype=torch.float32) if keys is None else keys
    return [
        sorted(range(len(row)), key=lambda e: (-row[e], e))[: case.top_k] for row in keys.tolist()
    ]


def _slow_output(case: Case, ids: list[list[int]]) -> Tensor:
    """One token, one expert at a time, in float64."""
    out = torch.zeros(case.hidden.shape, dtype=torch.float64)
    for token, row in enumerate(ids):
        logits = case.logits[token].double()
        weights = logits.softmax(0)[row]
        if case.method is not RoutingMethodType.Default:
            weights = logits[row].softmax(0)
        for expert, weight in zip(row, weights, strict=True):
            gate, up = (case.gemm1[expert].double() @ case.hidden[token].double()).chunk(2)
            activated = torch.nn.functional.silu(gate) * up
            out[token] += weight * (case.gemm2[expert].double() @ activated)
    return out


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_bf16_moe_matches_the_loops(experts: int, top_k: int, method: RoutingMethodType):
    case = _case(7, experts, top_k, method=method)
    recorded = _buffer(case)
    out = case.run(routing_replay_out=recorded)
    ids = _slow_ids(case)
    assert recorded.tolist() == ids
    torch.testing.assert_close(out.double(), _slow_output(case, ids), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_bf16_moe_records_without_changing_a_bit(tokens: int, dtype: torch.dtype):
    case = _case(tokens, 32, 4, dtype=dtype)
    recorded = _buffer(case, extra=3)
    out = case.run(routing_replay_out=recorded)
    assert out.dtype is dtype
    assert torch.isfinite(out).all()
    assert torch.equal(out, case.run())
    assert (recorded[tokens:] == -1).all()
    assert recorded[:tokens].tolist() == _slow_ids(case)
    assert torch.equal(out, case.run(routing_replay_in=recorded))
    given = torch.full_like(out, float("nan"))
    assert case.run(output=given) is given
    assert torch.equal(out, given)


def test_bf16_moe_bfloat16_error_is_that_of_plain_torch():
    case = _case(200, 32, 4, dtype=torch.bfloat16)
    exact = _slow_output(case, _slow_ids(case))
    weights = case.logits.softmax(-1, dtype=torch.float32)
    ids = torch.tensor(_slow_ids(case))
    chosen = weights.gather(1, ids)
    chosen = (chosen / chosen.sum(-1, keepdim=True)).bfloat16()
    plain = torch.zeros_like(case.hidden)
    for token in range(200):
        for rank in range(4):
            expert = ids[token, rank]
            gate, up = (case.gemm1[expert] @ case.hidden[token]).chunk(2)
            result = case.gemm2[expert] @ (torch.nn.functional.silu(gate) * up)
            plain[token] += chosen[token, rank] * result

    def error(x: Tensor) -> float:
        return float((x.double() - exact).norm() / exact.norm())

    assert error(case.run()) <= 1.5 * error(plain)
    assert error(plain) > 1e-4  # the comparison is not vacuous


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_forced_ids_decide_and_weights_come_from_the_logits(method: RoutingMethodType):
    case = _case(9, 16, 4, method=method)
    forced = torch.stack([torch.randperm(16)[:4] for _ in range(9)]).to(torch.int16)
    recorded = _buffer(case)
    out = case.run(routing_replay_in=forced, routing_replay_out=recorded)
    assert torch.equal(recorded, forced)
    expected = _slow_output(case, forced.tolist())
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-5)
    # The twin: another id in one row changes that row, and no other.
    changed = forced.clone()
    changed[5, 2] = int(next(e for e in range(16) if e not in forced[5].tolist()))
    differs = (case.run(routing_replay_in=changed) - out).abs().amax(1) > 1e-5
    assert differs.tolist() == [row == 5 for row in range(9)]


def test_float32_weights_beside_bfloat16_rows_round_alike():
    case = _case(40, 8, 2, dtype=torch.bfloat16)
    wide = Case(case.logits, case.hidden, case.gemm1.float(), case.gemm2.float(), 2)
    expected, out = case.run(), wide.run()
    assert out.dtype is torch.bfloat16
    # Sums in another order before one rounding: at most a last place of bfloat16 apart.
    torch.testing.assert_close(out.float(), expected.float(), atol=1e-2, rtol=2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_batch_invariant_rows_have_the_same_bits_in_any_company(dtype: torch.dtype):
    case = _case(61, 8, 2, dtype=dtype)
    whole = case.run(batch_invariant=True)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 40), slice(60, 61)):
        part = Case(case.logits[rows], case.hidden[rows], case.gemm1, case.gemm2, 2)
        assert torch.equal(part.run(batch_invariant=True), whole[rows])
    torch.testing.assert_close(whole, case.run(), atol=2e-2, rtol=2e-2)


def test_rows_of_minus_one_route_natively_among_forced_ones():
    case = _case(6, 16, 4)
    forced = _buffer(case)
    forced[1::2] = torch.tensor([3, 2, 1, 0], dtype=torch.int16)
    recorded = _buffer(case)
    out = case.run(routing_replay_in=forced, routing_replay_out=recorded)
    native = _slow_ids(case)
    assert recorded.tolist() == [native[i] if i % 2 == 0 else [3, 2, 1, 0] for i in range(6)]
    torch.testing.assert_close(out[::2], case.run()[::2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("bad", [16, 32767, -2, 5], ids=["E", "max", "negative", "repeated"])
@pytest.mark.usefixtures("poisoned_memory")
def test_invalid_forced_id_gets_weight_zero(bad: int, method: RoutingMethodType):
    case = _case(3, 16, 3, method=method)
    forced = torch.tensor([[5, bad, 7]] * 3, dtype=torch.int16)
    out = case.run(routing_replay_in=forced)
    expected = _slow_output(case, [[5, 7]] * 3)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-5)
    nothing = torch.full((3, 3), 99, dtype=torch.int16)
    assert (case.run(routing_replay_in=nothing) == 0).all()


def test_ties_go_to_the_smaller_id():
    case = _case(3, 8, 3)
    case.logits.copy_(
        torch.tensor([[0.0] * 8, [1, 2, 2, 1, 2, 0, 0, 0], [-500] * 4 + [0, -600, -500, 0]])
    )
    for method in METHODS:
        recorded = _buffer(case)
        case.run(routing_replay_out=recorded, routing_method_type=method)
        assert recorded[:2].tolist() == [[0, 1, 2], [1, 2, 4]]
        # Probabilities of -500 and -600 underflow to the same 0; logits do not, but the ids happen to agree.
        assert recorded[2].tolist() == [4, 7, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_strange_logits_give_distinct_ids_in_range(value: float):
    case = _case(4, 8, 3)
    case.logits[1, 2] = value
    case.logits[2] = value
    recorded = _buffer(case)
    case.run(routing_replay_out=recorded)
    again = _buffer(case)
    case.run(routing_replay_out=again)
    assert torch.equal(recorded, again)
    for row in recorded.tolist():
        assert len(set(row)) == 3
        assert all(0 <= expert < 8 for expert in row)


def test_expert_parallel_ranks_add_up_and_record_global_ids():
    case = _case(40, 16, 4)
    total = torch.zeros_like(case.hidden)
    whole = _buffer(case)
    expected = case.run(routing_replay_out=whole)
    for first in range(0, 16, 4):
        recorded = _buffer(case)
        total += case.run(
            gemm1_weights=case.gemm1[first : first + 4],
            gemm2_weights=case.gemm2[first : first + 4],
            local_expert_offset=first,
            local_num_experts=4,
            routing_replay_out=recorded,
        )
        assert torch.equal(recorded, whole)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)


def test_rank_without_tokens_gives_exact_zeros():
    case = _case(5, 16, 2)
    case.logits[:, 8:] = -100.0
    part = {"gemm1_weights": case.gemm1[8:], "gemm2_weights": case.gemm2[8:]}
    assert (case.run(**part, local_expert_offset=8, local_num_experts=8) == 0).all()


def test_unfinalized_parts_sum_to_the_output():
    case = _case(11, 16, 4)
    gemm2_output, weights, index = case.run(do_finalize=False)
    assert sorted(index.tolist()) == list(range(44))
    rows = gemm2_output[index.long()].reshape(11, 4, -1)
    torch.testing.assert_close((rows * weights[..., None]).sum(1), case.run(), atol=1e-6, rtol=1e-5)


def test_shared_experts_join_every_row_and_no_replay_buffer():
    case = _case(9, 16, 4)
    shared1, shared2 = torch.randn(2, 24, 16) / 4, torch.randn(2, 16, 12) / 4
    recorded = _buffer(case)
    out = case.run(
        gemm1_weights=torch.cat([case.gemm1, shared1]),
        gemm2_weights=torch.cat([case.gemm2, shared2]),
        num_fused_shared_experts=2,
        routing_replay_out=recorded,
    )
    expected = case.run()
    for first, second in zip(shared1, shared2, strict=True):
        gate, up = (case.hidden @ first.t()).chunk(2, dim=-1)
        expected = expected + (torch.nn.functional.silu(gate) * up) @ second.t()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert recorded.tolist() == _slow_ids(case)
    with pytest.raises(ConfigError, match="num_fused_shared_experts=2 with 8 of 16 experts"):
        case.run(num_fused_shared_experts=2, local_num_experts=8)


def test_routing_scales_on_input_are_llama4_s_order():
    case = _case(6, 8, 1, method=RoutingMethodType.Llama4)
    bias = torch.randn(8, 16)
    out = case.run(use_routing_scales_on_input=True, gemm2_bias=bias)
    for token, expert in enumerate(case.logits.argmax(1).tolist()):
        scaled = case.hidden[token] * case.logits[token, expert].sigmoid()
        gate, up = (case.gemm1[expert] @ scaled).chunk(2)
        expected = case.gemm2[expert] @ (torch.nn.functional.silu(gate) * up) + bias[expert]
        torch.testing.assert_close(out[token], expected, atol=1e-5, rtol=1e-4)
    assert (case.run(gemm2_bias=bias) - out).abs().max() > 1e-3  # the order matters
    _, weights, _ = case.run(use_routing_scales_on_input=True, do_finalize=False)
    assert (weights == 1).all()


def test_up_first_weights_are_converted():
    case = _case(4, 8, 2)
    gate, up = case.gemm1.chunk(2, dim=1)
    up_first = torch.cat((up, gate), dim=1)
    assert torch.equal(gate_first(up_first), case.gemm1)
    assert torch.equal(gate_first(gate_first(case.gemm1[:, :, 0])), case.gemm1[:, :, 0])
    assert torch.equal(case.run(gemm1_weights=gate_first(up_first)), case.run())
    assert not torch.allclose(case.run(gemm1_weights=up_first), case.run())


def test_choice_reaches_the_registered_ops_as_its_own_json():
    tile = GemmTile(rows=128, depth=64, stages=4, warps=8)
    parts: list[dict[str, object]] = [{}, {"engine": "hopper"}, {"tile_tokens": 64}, {"gemm1": tile}, {"gemm2": tile}]  # fmt: skip
    parts.append({name: value for part in parts for name, value in part.items()})
    for fields in parts:
        choice = ExpertsChoice(**fields)  # pyright: ignore[reportArgumentType]
        assert choice_text(choice) == choice.to_json()
        assert ExpertsChoice.from_json(choice_text(choice)) == choice
    assert choice_text(None) == ExpertsChoice().to_json()


def _activation_cases() -> dict[str, tuple[ActivationType, Callable[[Tensor, Tensor], Tensor]]]:
    functional = torch.nn.functional
    return {
        "geglu": (ActivationType.Geglu, lambda g, u: functional.gelu(g) * u),
        "relu2": (ActivationType.Relu2, lambda g, u: torch.cat((g, u)).relu().square()),
        "silu": (ActivationType.Silu, lambda g, u: functional.silu(torch.cat((g, u)))),
        "identity": (ActivationType.Identity, lambda g, u: torch.cat((g, u))),
    }


@pytest.mark.parametrize("name", ["geglu", "relu2", "silu", "identity"])
def test_activations_match_their_formula(name: str):
    activation, formula = _activation_cases()[name]
    case = _case(4, 8, 2)
    if not activation.is_gated:
        case = Case(case.logits, case.hidden, case.gemm1, torch.randn(8, 16, 24) / 4, 2)
    ids = _slow_ids(case)
    expected = torch.zeros_like(case.hidden)
    for token, row in enumerate(ids):
        for expert, weight in zip(row, case.logits[token][row].softmax(0), strict=True):
            gate, up = (case.gemm1[expert] @ case.hidden[token]).chunk(2)
            expected[token] += weight * (case.gemm2[expert] @ formula(gate, up))
    torch.testing.assert_close(case.run(activation_type=activation), expected, atol=1e-5, rtol=1e-4)


def test_swiglu_parameters_and_biases_are_per_expert():
    case = _case(4, 8, 2)
    alpha, beta, limit = torch.rand(8) + 1, torch.rand(8), torch.rand(8) / 2
    bias1, bias2 = torch.randn(8, 24), torch.randn(8, 16)
    out = case.run(
        gemm1_alpha=alpha,
        gemm1_beta=beta,
        gemm1_clamp_limit=limit,
        gemm1_bias=bias1,
        gemm2_bias=bias2,
    )
    expected = torch.zeros_like(out)
    for token, row in enumerate(_slow_ids(case)):
        for e, weight in zip(row, case.logits[token][row].softmax(0), strict=True):
            gate, up = (case.gemm1[e] @ case.hidden[token] + bias1[e]).chunk(2)
            gate, up = gate.clamp(max=limit[e]), up.clamp(-limit[e], limit[e])
            activated = gate * torch.sigmoid(alpha[e] * gate) * (up + beta[e])
            expected[token] += weight * (case.gemm2[e] @ activated + bias2[e])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing_replay_out": torch.zeros(4, 2)}, "routing_replay_out must be int16, got torch.float32"),
        ({"routing_replay_out": torch.zeros(8, dtype=torch.int16)}, r"must be 2D .*, got 1D"),
        ({"routing_replay_out": torch.zeros(4, 3, dtype=torch.int16)}, "dim1 must equal top_k=2, got 3"),
        ({"routing_replay_in": torch.zeros(3, 2, dtype=torch.int16)}, "dim0 must be >= num_tokens=4, got 3"),
        ({"routing_replay_in": torch.zeros(2, 4, dtype=torch.int16).t()}, "must be contiguous"),
        ({"routing_replay_in": torch.zeros(4, 2, dtype=torch.int16, device="meta")}, "is on meta"),
        ({"top_k": 9}, r"top_k=9 is outside \[1, num_experts=8\]"),
        ({"num_experts": 40000}, r"num_experts=40000 is outside \[1, 32767\]"),
        ({"local_expert_offset": 1}, r"name experts \[1, 9\)"),
        ({"routing_method_type": 10}, "routing_method_type=10 is not supported; accepted are Default"),
        ({"routing_method_type": 7}, "routing_bias is None but routing method MiniMax2"),
        ({"routing_method_type": 3}, "top_k=2 with routing method Llama4; accepted is 1"),
        ({"routing_method_type": 2, "routing_bias": torch.zeros(7)}, "routing_bias has shape"),
        ({"routing_method_type": 2, "routing_bias": torch.zeros(8, dtype=torch.int32)}, "routing_bias is torch.int32"),
        ({"routing_method_type": 2, "n_group": 3, "topk_group": 1}, "n_group=3 with num_experts=8"),
        ({"routing_method_type": 2, "n_group": 4, "topk_group": 5}, "topk_group=5 with n_group=4"),
        ({"routing_method_type": 2, "n_group": 8, "topk_group": 2}, "leave groups of 1"),
        ({"num_fused_shared_experts": -1}, "num_fused_shared_experts=-1"),
        ({"num_fused_shared_experts": 1}, r"gemm1_weights has shape \(8, 24, 16\), expected \(9, 24, 16\)"),
        ({"activation_type": 5}, "activation_type=5 is not supported; accepted are Silu"),
        ({"routing_bias": torch.zeros(8)}, "takes none; pass None"),
        ({"n_group": 2}, "n_group=2 and topk_group=1 but routing method RenormalizeNaive has no groups"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5"),
        ({"hidden_states": torch.zeros(4, 16, dtype=torch.float16)}, "hidden_states is torch.float16"),
        ({"gemm1_weights": torch.zeros(8, 24, 16, dtype=torch.bfloat16)}, "gemm1_weights is torch.bfloat16.*use one dtype"),
        ({"hidden_states": torch.zeros(5, 16)}, r"routing_logits has shape \(4, 8\), expected \(5, 8\)"),
        ({"gemm1_weights": torch.zeros(8, 23, 16)}, r"gemm1_weights has shape \(8, 23, 16\), expected \(8, 24, 16\)"),
        ({"gemm1_bias": torch.zeros(8, 12)}, "gemm1_bias has shape"),
        ({"output": torch.zeros(4, 17)}, "output has shape"),
        ({"output": torch.zeros(4, 16, dtype=torch.bfloat16)}, "output is torch.bfloat16"),
        ({"use_routing_scales_on_input": True}, "use_routing_scales_on_input with top_k=2"),
        ({"gemm1_alpha": torch.ones(8), "activation_type": 4}, "gemm1_alpha is given but activation Geglu has no such"),
        ({"gemm1_bias": torch.zeros(8, 24, dtype=torch.int32)}, "gemm1_bias is torch.int32"),
        ({"gemm1_weights": torch.zeros(8, 16, 24).mT}, "gemm1_weights has strides"),
        ({"gemm2_weights": torch.zeros(8, 16, 12, dtype=torch.float64)}, "gemm2_weights is torch.float64"),
        ({"workspace": torch.zeros(4, dtype=torch.int32)}, "workspace is torch.int32 of shape"),
        ({"backend": "triton"}, "backend='triton' on cpu"),
        ({"backend": "cuda"}, "backend='cuda'; accepted are 'auto', 'reference'"),
    ],
)  # fmt: skip
def test_bad_argument_is_refused_by_name(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        _case(4, 8, 2).run(**changes)


def test_registered_ops_pass_opcheck():
    case = _case(5, 8, 2)
    recorded = _buffer(case)
    arguments = (
        case.logits,
        None,
        case.hidden,
        case.gemm1,
        case.gemm2,
        2,
        1,
        1,
        1.0,
        True,
        0,
        0,
        4,
        3,
        recorded,
        recorded.clone(),
    )
    tail = (None, None, None, None, None, False, "reference", False, "{}", None)
    ops = torch.ops.routing_replay
    torch.library.opcheck(ops.bf16_moe.default, (torch.empty_like(case.hidden), *arguments, *tail))
    torch.library.opcheck(ops.bf16_moe_unfinalized.default, (*arguments, *tail))


TILE = GemmTile(rows=64, depth=32, stages=3, warps=4)


@pytest.mark.parametrize("config", [None, ExpertsChoice(tile_tokens=32, gemm2=TILE)], ids=str)
def test_compiled_whole_graph_records_the_same(config: ExpertsChoice | None):
    case = _case(5, 8, 2)

    def layer(logits: Tensor, hidden: Tensor, recorded: Tensor) -> Tensor:
        part = Case(logits, hidden, case.gemm1, case.gemm2, 2)
        return part.run(routing_replay_out=recorded, config=config) * 2

    eager, compiled = _buffer(case, 2), _buffer(case, 2)
    expected = layer(case.logits, case.hidden, eager)
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(case.logits, case.hidden, compiled), expected)
    assert torch.equal(eager, compiled)
