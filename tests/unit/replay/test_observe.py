import pytest
import torch
from torch import nn

from routing_replay.errors import ReplayError, UnsupportedModelError
from routing_replay.replay import observe_expert_ids
from unit.replay.tiny_qwen3_moe import build_model, make_batch


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_observe_sees_the_native_ids_of_every_implementation(experts: str):
    model = build_model(experts=experts)
    batch = make_batch("right")
    with observe_expert_ids(model) as observed:
        output = model(**batch.inputs, output_router_logits=True)
    native = torch.stack([logits.topk(2).indices for logits in output.router_logits], dim=1)
    assert sorted(observed.ids_by_layer) == [1, 2]
    assert observed.stacked().dtype == torch.int64
    assert torch.equal(observed.stacked(), native)


def test_observe_removes_its_hooks():
    model = build_model()
    with pytest.raises(RuntimeError, match="stop"), observe_expert_ids(model) as observed:
        raise RuntimeError("stop")
    make_batch("right").logits(model)
    assert observed.ids_by_layer == {1: [], 2: []}
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("as_keyword", [False, True])
def test_observe_copies_positional_and_keyword_arguments(as_keyword: bool):
    model = build_model()
    experts = model.model.layers[1].mlp.experts
    hidden, ids, weights = torch.randn(3, 32), torch.tensor([[1, 2]] * 3), torch.ones(3, 2)
    with observe_expert_ids(model) as observed:
        if as_keyword:
            experts(top_k_weights=weights, top_k_index=ids, hidden_states=hidden)
        else:
            experts(hidden, ids, weights)
    ids.zero_()
    assert observed.ids_by_layer[1][0].tolist() == [[1, 2]] * 3
    with pytest.raises(ReplayError, match=r"\{1: 3, 2: 0\}"):
        observed.stacked()


def test_stacked_joins_calls_and_refuses_nothing():
    model = build_model()
    batch = make_batch("right")
    with observe_expert_ids(model) as observed:
        with pytest.raises(ReplayError, match=r"\{1: 0, 2: 0\}"):
            observed.stacked()
        batch.logits(model)
        once = observed.stacked()
        batch.logits(model)
    assert torch.equal(observed.stacked(), torch.cat([once, once]))


def test_observe_refuses_models_without_experts():
    with (
        pytest.raises(UnsupportedModelError, match="top_k_index"),
        observe_expert_ids(nn.Linear(1, 1)),
    ):
        pass
    with (
        pytest.raises(UnsupportedModelError, match="top_k_index"),
        observe_expert_ids(build_model(dense=(0, 1, 2))),
    ):
        pass
