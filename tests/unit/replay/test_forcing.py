from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from routing_replay.replay._forcing import ForcedTopK
from routing_replay.trace import ModelRouting

ROUTING = ModelRouting(layer_ids=(0,), num_layers=1, num_experts=8, top_k=2)
IDS = torch.tensor([[7, 0], [3, 4], [5, 1]])

CALLS = {
    "positional": lambda x: torch.topk(x, 2),
    "k": lambda x: torch.topk(x, k=2),
    "input": lambda x: torch.topk(input=x, k=2, dim=-1),
    "dim": lambda x: torch.topk(x, 2, dim=-1),
    "dim-1": lambda x: torch.topk(x, 2, dim=1),
    "positional-dim": lambda x: torch.topk(x, 2, 1),
    "unsorted": lambda x: torch.topk(x, 2, dim=-1, sorted=False),
    "all-positional": lambda x: torch.topk(x, 2, -1, True, False),
    "method": lambda x: x.topk(2),
    "method-keywords": lambda x: x.topk(k=2, dim=-1, largest=True, sorted=True),
}

OTHERS = {
    "other-k": lambda x: torch.topk(x, 3),
    "other-width": lambda x: torch.topk(x[:, :4], 2),
    "grouped": lambda x: torch.topk(x.view(-1, 2, 4), 2),
    "one-row": lambda x: torch.topk(x[0], 2),
    "other-dim": lambda x: torch.topk(x.repeat(3, 1)[:8], 2, dim=0),
    "smallest": lambda x: torch.topk(x, 2, largest=False),
    "sort": torch.sort,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_forced_topk_answers_every_call_form(call: Callable[[Tensor], tuple[Tensor, ...]]):
    scores = torch.randn(3, 8, requires_grad=True)
    with ForcedTopK(ROUTING, lambda *_: IDS) as mode:
        result = call(scores)
    assert mode.num_matches == 1
    assert isinstance(result, torch.return_types.topk)
    assert torch.equal(result.indices, IDS)
    assert torch.equal(result.values, scores.gather(-1, IDS))
    result.values.sum().backward()
    assert torch.equal(scores.grad, torch.zeros(3, 8).scatter(-1, IDS, 1.0))


@pytest.mark.parametrize("is_sorted", [True, False])
def test_forced_topk_offers_the_models_own_call(is_sorted: bool):
    routing = ModelRouting(layer_ids=(0,), num_layers=1, num_experts=64, top_k=8)
    scores = torch.randn(16, 64, requires_grad=True)
    native = torch.topk(scores, 8, sorted=is_sorted)
    # Without `sorted` the columns come in another order, which a sorted top-k would not repeat.
    assert torch.equal(native.indices, torch.topk(scores, 8).indices) == is_sorted
    offered = []

    def choose(selection: Tensor, native_ids: Callable[[], Tensor]):
        assert selection is scores
        offered.append(native_ids())
        return offered[0]

    with ForcedTopK(routing, choose) as mode:
        result = torch.topk(scores, 8, sorted=is_sorted)
    assert mode.num_matches == 1
    assert torch.equal(offered[0], native.indices)
    assert torch.equal(result.indices, native.indices)
    assert torch.equal(result.values, native.values)
    assert not offered[0].requires_grad


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_forced_topk_passes_on_other_calls(call: Callable[[Tensor], tuple[Tensor, ...]]):
    scores = torch.randn(3, 8)
    with ForcedTopK(ROUTING, lambda *_: IDS) as mode:
        result = call(scores)
    assert mode.num_matches == 0
    for forced, native in zip(result, call(scores), strict=True):
        assert torch.equal(forced, native)


def test_forced_topk_leaves_nothing_behind():
    scores = torch.randn(3, 8)
    native = torch.topk(scores, 2).indices
    with pytest.raises(RuntimeError, match="stop"), ForcedTopK(ROUTING, lambda *_: IDS):
        raise RuntimeError("stop")
    assert torch.equal(torch.topk(scores, 2).indices, native)
