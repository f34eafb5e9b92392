"""The `flashinfer` backend against a stand-in that checks what it is given and computes from the shuffled weights."""

import inspect
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from routing_replay.errors import ConfigError, IntegrationError
from routing_replay.kernels import (
    ActivationType,
    Backend,
    RoutingMethod,
    RoutingMethodType,
    bf16_moe,
)
from routing_replay.kernels.backend import choose_backend
from routing_replay.kernels.experts import SwigluParameters
from routing_replay.kernels.fused_moe.checks import MoEShape
from routing_replay.kernels.fused_moe.flashinfer import (
    FlashInferApi,
    FlashInferWeights,
    launch,
    load_flashinfer,
    prepare_weights,
)

Kind = RoutingMethodType
E, K, H, INNER, T = 8, 2, 128, 128, 5
BLOCK_MAJOR_K = 2
bfloat16 = torch.bfloat16


def _interleaved(rows: Tensor) -> Tensor:
    """Rows of the two halves in turn: r0, r(N/2), r1, ..."""
    half = len(rows) // 2
    return torch.stack((rows[:half], rows[half:]), dim=1).flatten(0, 1)


def _order_of_epilogue(rows: int) -> Tensor:
    """Some fixed order inside blocks of 32 rows; which one is the kernels' business."""
    inside = torch.arange(32).view(4, 8).t().flatten()
    return (torch.arange(rows // 32)[:, None] * 32 + inside).flatten()


def _unprepared(weights: Tensor, *, is_gated: bool) -> Tensor:
    """Rows `[gate; up]` back out of the layout."""
    rows = weights.permute(0, 2, 1, 3).flatten(2)  # [E, rows, columns]
    plain = torch.empty_like(rows)
    plain[:, _order_of_epilogue(rows.shape[1])] = rows
    if not is_gated:
        return plain
    return torch.cat((plain[:, 1::2], plain[:, 0::2]), dim=1)


@dataclass
class StandIn:
    """FlashInfer's functions, with the names, order and types of its documentation."""

    calls: list[dict[str, object]] = field(default_factory=list)
    returns_list: bool = False

    def trtllm_bf16_moe(
        self, *, routing_logits: Tensor, routing_bias: Tensor | None, hidden_states: Tensor, gemm1_weights: Tensor,
        gemm2_weights: Tensor, num_experts: int, top_k: int, n_group: int | None, topk_group: int | None,
        intermediate_size: int, local_expert_offset: int, local_num_experts: int,
        routed_scaling_factor: float | None = None, routing_method_type: int = 0, use_shuffled_weight: bool = True,
        weight_layout: int = BLOCK_MAJOR_K, do_finalize: bool = True, enable_pdl: bool = True,
        tune_max_num_tokens: int = 8192, activation_type: int = 3, norm_topk_prob: bool = True,
        routing_replay_out: Tensor | None = None, gemm1_alpha: Tensor | None = None, gemm1_beta: Tensor | None = None,
        gemm1_clamp_limit: Tensor | None = None, output: Tensor | None = None,
    ) -> object:  # fmt: skip
        given = dict(locals())
        self.calls.append(given)
        assert hidden_states.dtype is gemm1_weights.dtype is gemm2_weights.dtype is bfloat16
        assert hidden_states.is_contiguous()
        assert use_shuffled_weight is True
        assert weight_layout == BLOCK_MAJOR_K
        assert type(routing_method_type) is type(activation_type) is int
        rows = intermediate_size * (2 if activation_type == 3 else 1)
        hidden = hidden_states.shape[1]
        assert gemm1_weights.shape == (local_num_experts, hidden // 64, rows, 64)
        assert gemm2_weights.shape == (local_num_experts, intermediate_size // 64, hidden, 64)
        assert gemm1_weights.is_contiguous()
        assert gemm2_weights.is_contiguous()
        if routing_replay_out is not None:
            assert routing_replay_out.dtype is torch.int16
        result = bf16_moe(
            routing_logits, routing_bias, hidden_states, _unprepared(gemm1_weights, is_gated=activation_type == 3),
            _unprepared(gemm2_weights, is_gated=False), num_experts, top_k, n_group, topk_group, intermediate_size,
            local_expert_offset, local_num_experts, routed_scaling_factor, routing_method_type, do_finalize,
            activation_type, norm_topk_prob, routing_replay_out, gemm1_alpha, gemm1_beta, gemm1_clamp_limit, output,
        )  # fmt: skip
        if not do_finalize:
            gemm2_output, weights, index = result
            return [gemm2_output, weights.to(bfloat16), index]
        return [result] if self.returns_list else result

    def reorder_rows_for_gated_act_gemm(self, x: Tensor) -> Tensor:
        assert x.ndim == 2
        return _interleaved(x)

    def shuffle_matrix_a(self, input_tensor: Tensor, epilogue_tile_m: int) -> Tensor:
        assert input_tensor.dtype is torch.uint8
        assert input_tensor.shape[0] % epilogue_tile_m == 0
        assert epilogue_tile_m == 128
        return input_tensor[_order_of_epilogue(len(input_tensor))]

    def convert_to_block_layout(self, input_tensor: Tensor, block_k: int) -> Tensor:
        assert input_tensor.dtype is torch.uint8
        assert block_k == 128
        rows, columns = input_tensor.shape
        return input_tensor.view(rows, columns // block_k, block_k).permute(1, 0, 2).contiguous()

    def api(self) -> FlashInferApi:
        return FlashInferApi(
            trtllm_bf16_moe=self.trtllm_bf16_moe,
            reorder_rows_for_gated_act_gemm=self.reorder_rows_for_gated_act_gemm,
            convert_to_block_layout=self.convert_to_block_layout,
            shuffle_matrix_a=self.shuffle_matrix_a,
            block_major_k=BLOCK_MAJOR_K,
        )


def _weights(*, is_gated: bool = True, experts: int = E) -> tuple[Tensor, Tensor]:
    rows = 2 * INNER if is_gated else INNER
    return (torch.randn(experts, rows, H) / 8).to(bfloat16), (torch.randn(experts, H, INNER) / 8).to(bfloat16)  # fmt: skip


def _shape(**changes: int) -> MoEShape:
    fields = {"num_tokens": T, "num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": INNER,
              "local_expert_offset": 0, "local_num_experts": E, **changes}  # fmt: skip
    return MoEShape(**fields)


def _method(**changes: object) -> RoutingMethod:
    fields = {"type": Kind.RenormalizeNaive, "num_experts": E, "top_k": K, **changes}
    return RoutingMethod(**fields)  # pyright: ignore[reportArgumentType]


def _launch(stand_in: StandIn, prepared: FlashInferWeights, **changes: object) -> object:
    arguments: dict[str, object] = {
        "routing_logits": torch.randn(T, E, generator=torch.Generator().manual_seed(3)),
        "routing_bias": None,
        "hidden_states": torch.randn(T, H, generator=torch.Generator().manual_seed(4)).to(bfloat16),
        "weights": (prepared.gemm1_weights, prepared.gemm2_weights),
        "activation_type": prepared.activation_type,
        "shape": _shape(),
        "routing": _method(),
        "parameters": SwigluParameters(),
        "unsupported": {"routing_replay_in": None, "num_fused_shared_experts": 0, "batch_invariant": False},
        "api": stand_in.api(),
        **changes,
    }  # fmt: skip
    return launch(**arguments)  # pyright: ignore[reportArgumentType]


def _plain(gemm1: Tensor, gemm2: Tensor, **changes: object) -> object:
    return bf16_moe(
        torch.randn(T, E, generator=torch.Generator().manual_seed(3)), None,
        torch.randn(T, H, generator=torch.Generator().manual_seed(4)).to(bfloat16), gemm1, gemm2, E, K, None, None, INNER,
        0, E, routing_method_type=Kind.RenormalizeNaive, **changes,
    )  # fmt: skip  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("activation", [ActivationType.Swiglu, ActivationType.Relu2])
@pytest.mark.parametrize("returns_list", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_prepared_weights_give_the_plain_output(activation: ActivationType, returns_list: bool):
    stand_in = StandIn(returns_list=returns_list)
    gemm1, gemm2 = _weights(is_gated=activation.is_gated)
    weights = prepare_weights(gemm1, gemm2, activation_type=activation, api=stand_in.api())
    assert weights.gemm1_weights.shape == (E, H // 64, gemm1.shape[1], 64)
    assert weights.gemm2_weights.shape == (E, INNER // 64, H, 64)
    out = _launch(stand_in, weights)
    expected = _plain(gemm1, gemm2, activation_type=activation)
    assert torch.equal(out, expected)  # pyright: ignore[reportArgumentType]
    # The twin: gate and up exchanged give something else.
    if activation.is_gated:
        gate, up = gemm1.chunk(2, dim=1)
        other = prepare_weights(torch.cat((up, gate), 1), gemm2, api=stand_in.api())
        assert not torch.equal(_launch(stand_in, other), expected)  # pyright: ignore[reportArgumentType]


def test_arguments_go_by_their_documented_names():
    stand_in = StandIn()
    weights = prepare_weights(*_weights(experts=4), api=stand_in.api())
    bias = torch.randn(E)
    method = _method(type=Kind.DeepSeekV3, n_group=2, topk_group=1, routed_scaling_factor=2.5)
    buffer = torch.full((T + 3, K), -1, dtype=torch.int16)
    output = torch.zeros(T, H, dtype=bfloat16)
    limit = torch.full((4,), 7.0)
    shape = _shape(local_expert_offset=4, local_num_experts=4)
    parameters = SwigluParameters(limit=limit)
    _launch(stand_in, weights, routing_bias=bias, routing=method, routing_replay_out=buffer, output=output,
            parameters=parameters, shape=shape)  # fmt: skip
    (call,) = stand_in.calls
    assert call["routing_bias"] is bias
    assert call["routing_replay_out"] is buffer
    assert call["output"] is output
    assert call["gemm1_clamp_limit"] is limit
    assert call["gemm1_alpha"] is None
    expected = {
        "num_experts": E, "top_k": K, "n_group": 2, "topk_group": 1, "intermediate_size": INNER, "local_expert_offset": 4,
        "local_num_experts": 4, "routed_scaling_factor": 2.5, "routing_method_type": 2, "do_finalize": True,
        "activation_type": 3, "norm_topk_prob": True, "weight_layout": BLOCK_MAJOR_K,
    }  # fmt: skip
    assert {name: call[name] for name in expected} == expected
    assert (buffer[:T] >= 0).all()
    assert (buffer[T:] == -1).all()


def test_what_an_older_version_has_not_is_left_out_where_it_is_not_given():
    class Older(StandIn):
        def trtllm_bf16_moe(
            self, *, use_shuffled_weight: bool, weight_layout: int, **given: object
        ) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
            assert not {"routing_replay_out", "gemm1_alpha", "output"} & set(given)
            return torch.zeros(T, H)

    stand_in = Older()
    weights = prepare_weights(*_weights(), api=stand_in.api())
    assert isinstance(_launch(stand_in, weights), Tensor)
    with pytest.raises(AssertionError):
        _launch(stand_in, weights, output=torch.zeros(T, H, dtype=bfloat16))


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.Llama4, Kind.DeepSeekV3)])  # fmt: skip
def test_methods_without_groups_or_scale_pass_none(kind: Kind):
    stand_in = StandIn()
    weights = prepare_weights(*_weights(), api=stand_in.api())
    bias = torch.zeros(E) if kind is Kind.MiniMax2 else None
    _launch(stand_in, weights, routing=_method(type=kind), routing_bias=bias)
    (call,) = stand_in.calls
    scale = 1.0 if kind is Kind.MiniMax2 else None
    assert (call["n_group"], call["topk_group"], call["routed_scaling_factor"]) == (None, None, scale)  # fmt: skip


def test_unfinalized_parts_are_ours():
    stand_in = StandIn()
    weights = prepare_weights(*_weights(), api=stand_in.api())
    parts = _launch(stand_in, weights, do_finalize=False)
    assert isinstance(parts, tuple)
    assert (parts[0].dtype, parts[1].dtype, parts[2].dtype) == (bfloat16, torch.float32, torch.int32)  # fmt: skip


GROUPED = {"type": Kind.DeepSeekV3, "num_experts": 256, "top_k": 8, "n_group": 8, "topk_group": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unsupported": {"routing_replay_in": torch.zeros(T, K)}}, "routing_replay_in is given but FlashInfer's trtllm_bf16_moe has no such argument"),
        ({"unsupported": {"gemm1_bias": torch.zeros(E, 2 * INNER)}}, "gemm1_bias is given"),
        ({"unsupported": {"num_fused_shared_experts": 2}}, "num_fused_shared_experts is 2"),
        ({"unsupported": {"batch_invariant": True}}, "batch_invariant is True"),
        ({"hidden_states": torch.zeros(T, H)}, "hidden_states is torch.float32"),
        ({"hidden_states": torch.zeros(H, T, dtype=bfloat16).t()}, r"strides \(1, 5\)"),
        ({"shape": _shape(intermediate_size=256)}, r"gemm1_weights is torch.bfloat16 of shape .*make it with prepare_weights"),
        ({"shape": _shape(local_num_experts=4)}, "gemm1_weights is .* of shape"),
        ({"weights": _weights()}, r"of shape \(8, 256, 128\), expected .* make it with prepare_weights, once"),
        ({"activation_type": ActivationType.Geglu}, "activation_type=4 with backend='flashinfer'"),
        ({"routing": _method(type=Kind.DeepSeekV3, norm_topk_prob=False), "routing_bias": torch.zeros(E)}, "norm_topk_prob=False with routing method DeepSeekV3"),
        ({"routing": _method(type=Kind.DeepSeekV3)}, "routing_bias is None with routing method DeepSeekV3 without groups"),
        ({"routing": _method(type=Kind.Renormalize), "routing_bias": torch.zeros(E)}, "a bias of the router's GEMM"),
        ({"routing": _method(top_k=8)}, "num_experts=8 and top_k=8 with routing method RenormalizeNaive"),
        ({"routing": _method(num_experts=10)}, "multiples of 4 up to 2048"),
        ({"routing": _method(type=Kind.Default, num_experts=512)}, "multiples of 4 up to 256 and fewer than all of them, up to 8"),
        ({"routing": _method(type=Kind.Sigmoid, num_experts=64, top_k=9)}, "top_k=9 with routing method Sigmoid"),
        ({"routing": _method(type=Kind.Llama4, num_experts=256, top_k=1)}, "with routing method Llama4"),
        ({"routing": _method(**{**GROUPED, "n_group": 16})}, "n_group=16 and topk_group=4"),
        ({"routing": _method(**{**GROUPED, "n_group": 4})}, "groups of up to 32"),
        ({"routing": _method(**{**GROUPED, "topk_group": 5})}, "topk_group=5"),
        ({"routing": _method(**{**GROUPED, "top_k": 9})}, "up to 8 experts a token"),
        ({"routing": _method(**{**GROUPED, "num_experts": 32, "topk_group": 2})}, "more than top_k experts in all"),
        ({"routing_replay_out": torch.zeros(T, K)}, "routing_replay_out must be int16"),
        ({"routing_logits": torch.zeros(T, E, dtype=torch.float16)}, "router_logits is torch.float16"),
    ],
)  # fmt: skip
def test_what_flashinfer_has_not_is_refused_before_the_call(changes: dict[str, object], message: str):  # fmt: skip
    stand_in = StandIn()
    weights = prepare_weights(*_weights(), api=stand_in.api())
    routing = changes.get("routing")
    if isinstance(routing, RoutingMethod) and routing.num_experts != E:
        changes = {"routing_logits": torch.zeros(T, routing.num_experts), **changes}
    with pytest.raises(ConfigError, match=message):
        _launch(stand_in, weights, **changes)
    assert stand_in.calls == []


@pytest.mark.parametrize(
    ("gemm1", "gemm2", "activation", "message"),
    [
        ((E, 256, H), (E, H, INNER), 4, "activation_type=4 with backend='flashinfer'; accepted are Swiglu"),
        ((E, 255, H), (E, H, INNER), 3, r"gemm1_weights has shape \(8, 255, 128\), expected \(8, 256, 128\)"),
        ((E, 2, 256, H), (E, H, INNER), 3, "plain weights of 3 dimensions"),
        ((E, 256, 96), (E, 96, INNER), 3, "hidden_size=96 with backend='flashinfer'; accepted are multiples of 128"),
        ((E, 192, H), (E, H, 96), 3, "intermediate_size=96"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_laid_out_are_refused(gemm1: tuple[int, ...], gemm2: tuple[int, ...], activation: int, message: str):  # fmt: skip
    first, second = torch.zeros(gemm1, dtype=bfloat16), torch.zeros(gemm2, dtype=bfloat16)
    with pytest.raises(ConfigError, match=message):
        prepare_weights(first, second, activation_type=activation, api=StandIn().api())
    with pytest.raises(ConfigError, match=r"gemm1_weights is torch\.float32"):
        prepare_weights(first.float(), second, api=StandIn().api())


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="backend='flashinfer' on cpu; accepted are CUDA devices"):
        prepare_weights(*_weights())
    available = (Backend.REFERENCE, Backend.TRITON, Backend.FLASHINFER)
    device = torch.device("cuda", 0)
    for capability in ((9, 0), (8, 0), (11, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, value=capability: value)
        message = f"cuda:0 of compute capability {capability[0]}.{capability[1]}"
        with pytest.raises(ConfigError, match=message):
            choose_backend("flashinfer", device, available=available)
    for capability in ((10, 0), (10, 3), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, value=capability: value)
        assert choose_backend("flashinfer", device, available=available) is Backend.FLASHINFER
        assert choose_backend("auto", device, available=available) is Backend.TRITON
        with pytest.raises(IntegrationError, match=r"needs flashinfer-python 0\.7 or newer"):
            load_flashinfer(device)


def test_prepared_weights_choose_the_backend_and_plain_ones_are_refused_by_it():
    weights = prepare_weights(*_weights(), api=StandIn().api())
    with pytest.raises(ConfigError, match="backend='flashinfer' on cpu"):
        _plain(weights.gemm1_weights, weights.gemm2_weights)
    with pytest.raises(ConfigError, match="make it with prepare_weights, once"):
        _plain(*_weights(), backend="flashinfer")
    with pytest.raises(ConfigError, match="batch_invariant is True"):
        _plain(weights.gemm1_weights, weights.gemm2_weights, batch_invariant=True)


def test_the_stand_in_has_every_name_that_is_used():
    names = set(inspect.signature(StandIn.trtllm_bf16_moe).parameters) - {"self"}
    assert len(names) == 26
    assert replace(StandIn().api(), block_major_k=0).block_major_k == 0
