import copy
import functools
import types

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from routing_replay.errors import ReplayError, UnsupportedModelError
from routing_replay.replay import attach
from routing_replay.trace import ModelRouting
from unit.replay.tiny_qwen3_moe import build_model, make_batch, random_traces, snapshot


def routers_of(model: nn.Module):
    return [layer.mlp.gate for layer in model.model.layers[1:]]


def test_attach_finds_the_layers_of_the_model():
    model = build_model(num_experts=16, top_k=4, dense=(1,))
    with attach(model) as handle:
        want = ModelRouting(layer_ids=(0, 2), num_layers=3, num_experts=16, top_k=4)
        assert handle.routing == want
    with attach(model.model) as handle:
        assert handle.routing == want


def test_attach_finds_routers_by_name_where_none_are_declared():
    model = build_model()
    declared = type(model.model)._can_record_outputs
    for module in (model, model.model):
        module._can_record_outputs = {
            name: declared[name] for name in declared if "logits" not in name
        }
    with attach(model) as handle:
        assert handle.routing.layer_ids == (1, 2)


def test_attach_works_through_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with attach(Wrapper(build_model())) as handle:
        assert handle.routing.layer_ids == (1, 2)


def test_detach_restores_every_module_exactly():
    model = build_model()
    batch = make_batch("right")
    before = snapshot(model)
    handle = attach(model)
    assert snapshot(model) != before
    with handle.replay(random_traces(batch.tokens), batch.layout):
        batch.logits(model)
    handle.detach()
    assert snapshot(model) == before
    assert all("forward" not in vars(router) for router in routers_of(model))
    handle.detach()
    with attach(model):
        pass
    assert snapshot(model) == before


def test_detach_restores_a_forward_that_was_on_the_instance():
    model = build_model()
    router = routers_of(model)[0]
    calls = []

    def forward(self: nn.Module, hidden_states: Tensor):
        calls.append(len(hidden_states))
        return type(self).forward(self, hidden_states)

    router.forward = types.MethodType(forward, router)
    before = dict(vars(router))
    batch = make_batch("right")
    with attach(model) as handle, handle.replay(random_traces(batch.tokens), batch.layout):
        batch.logits(model)
    assert vars(router) == before
    assert calls == [batch.layout.num_tokens]


def test_attach_is_native_outside_of_replay():
    model = build_model()
    batch = make_batch("right")
    native = batch.logits(model)
    with attach(model):
        assert torch.equal(batch.logits(model), native)


def test_attach_refuses_a_second_time():
    model = build_model()
    handle = attach(model)
    with pytest.raises(ReplayError, match=r"layers\.1\.mlp\.gate.* already"):
        attach(model)
    with pytest.raises(ReplayError, match="already"):
        attach(model.model)
    handle.detach()
    attach(model).detach()


def test_a_deep_copy_is_plain_and_independent():
    model = build_model()
    batch = make_batch("right")
    with attach(model) as handle:
        reference = copy.deepcopy(model)
        native = batch.logits(reference)
        with handle.replay(random_traces(batch.tokens), batch.layout):
            forced = batch.logits(model)
            assert torch.equal(batch.logits(reference), native)
        assert not torch.equal(forced, native)
        with torch.no_grad():
            routers_of(model)[0].weight.zero_()
        assert torch.equal(batch.logits(reference), native)
        with attach(reference) as other, other.replay(random_traces(batch.tokens), batch.layout):
            assert torch.equal(batch.logits(reference), forced)


def test_detach_refuses_a_forward_that_was_replaced():
    model = build_model()
    handle = attach(model)
    router = routers_of(model)[1]
    ours = router.forward
    router.forward = functools.partial(ours)
    with pytest.raises(ReplayError, match="replaced after attach"):
        handle.detach()
    router.forward = ours
    handle.detach()


def test_detach_refuses_inside_a_block_and_ends_the_handle():
    model = build_model()
    batch = make_batch("right")
    handle = attach(model)
    traces = random_traces(batch.tokens)
    with handle.replay(traces, batch.layout):
        batch.logits(model)
        with pytest.raises(ReplayError, match="microbatch 0 is still open"):
            handle.detach()
    handle.detach()
    with pytest.raises(ReplayError, match="detached"), handle.replay(traces, batch.layout):
        pass


def test_attach_refuses_other_families():
    config = MixtralConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    with pytest.raises(UnsupportedModelError, match=r"'mixtral'.*supported: qwen3_moe"):
        attach(MixtralForCausalLM(config))
    with pytest.raises(
        UnsupportedModelError, match=r"Linear has no Hugging Face config.*qwen3_moe"
    ):
        attach(nn.Linear(2, 2))


def test_attach_refuses_a_model_without_routers():
    with pytest.raises(
        UnsupportedModelError, match=r"no router \(Qwen3MoeTopKRouter\).* 3 decoder"
    ):
        attach(build_model(dense=(0, 1, 2)))


def test_attach_refuses_two_routers_in_a_layer():
    model = build_model()
    model.model.layers[2].mlp.second = copy.deepcopy(model.model.layers[2].mlp.gate)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 2 has two routers, .*gate and .*second"
    ):
        attach(model)


def test_attach_refuses_a_router_outside_of_the_layers():
    model = build_model()
    model.extra = copy.deepcopy(model.model.layers[2].mlp.gate)
    with pytest.raises(UnsupportedModelError, match="'extra' does not lie inside"):
        attach(model)


@pytest.mark.parametrize("name", ["top_k", "num_experts"])
def test_attach_refuses_a_router_of_unknown_shape(name: str):
    model = build_model()
    delattr(routers_of(model)[1], name)
    with pytest.raises(UnsupportedModelError, match=rf"layers\.2\.mlp\.gate.*{name} = None"):
        attach(model)
    setattr(routers_of(model)[1], name, 1)
    with pytest.raises(UnsupportedModelError, match="routers differ"):
        attach(model)
    assert not any("forward" in vars(router) for router in routers_of(model))
