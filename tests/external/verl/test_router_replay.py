"""verl's router replay, on Megatron-Core's own routers, sends every token to the experts of our traces."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from verl.utils.megatron import router_replay_utils
from verl.utils.megatron.router_replay_patch import (
    RouterReplay,
    RouterReplayAction,
    apply_router_replay_patch,
)
from verl.utils.veomni.router_replay import VeOmniRouterReplay

from external.megatron_routers import Model, moe_config, routed_sets, start_parallel_state
from external.trace_cases import MODELS, random_trace, with_other_id
from routing_replay.trace import RoutingTrace
from routing_replay.trace.export import to_verl

LENGTHS = (8, 5, 11)


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """verl's patch of Megatron-Core, taken back after each test."""
    start_parallel_state()
    for owner, name in (
        (TopKRouter, "__init__"),
        (TopKRouter, "routing"),
        (TransformerConfig, "__init__"),
        (MoEAlltoAllTokenDispatcher, "preprocess"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    marks = (
        (TopKRouter, "_router_replay_patched"),
        (TransformerConfig, "_verl_router_patched"),
        (MoEAlltoAllTokenDispatcher, "_preprocess_patched"),
    )
    monkeypatch.setattr(router_replay_utils, "device_name", "cpu")
    apply_router_replay_patch()
    yield
    for owner, name in marks:
        if name in vars(owner):
            delattr(owner, name)
    RouterReplay.router_instances.clear()


def _routed(traces: list[RoutingTrace], model: str) -> list[list[set[int]]]:
    """Experts of every router and token of the packed batch, in its order."""
    num_experts, top_k, layer_ids, num_layers = MODELS[model]
    config = moe_config(num_layers, layer_ids, num_experts, top_k)
    owner = Model(config, layer_ids)
    rows = [
        torch.from_numpy(to_verl(trace, num_tokens=num_tokens))
        for trace, num_tokens in zip(traces, LENGTHS, strict=True)
    ]
    routes = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    inputs = torch.nested.as_nested_tensor(
        [torch.arange(num_tokens) for num_tokens in LENGTHS], layout=torch.jagged
    )
    responses = torch.ones(len(LENGTHS), 2, dtype=torch.long)
    router_replay_utils.set_router_replay_data(
        router_replay_utils.align_r3_router_replay_data(routes, inputs),
        None,
        config,
        replay_mask=router_replay_utils.build_r3_replay_mask(inputs, responses),
        model=owner,
    )
    router_replay_utils.set_model_router_replay_action(owner, RouterReplayAction.REPLAY_FORWARD)
    logits = torch.randn(sum(LENGTHS), 1, num_experts, generator=torch.manual_seed(3))
    return [
        [position[0] for position in routed_sets(router, logits)]
        for router in owner.decoder.routers
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls(
    "verl.utils.megatron.router_replay_utils.set_router_replay_data",
    "verl.utils.megatron.router_replay_utils.align_r3_router_replay_data",
    "verl.utils.megatron.router_replay_utils.build_r3_replay_mask",
    "verl.utils.megatron.router_replay_utils.set_model_router_replay_action",
    "verl.utils.megatron.router_replay_patch.RouterReplay.get_replay_topk",
    "verl.utils.megatron.router_replay_patch.patched_routing",
)
def test_routers_take_our_experts_but_for_last_tokens(model: str):
    num_experts, top_k, layer_ids, _ = MODELS[model]
    traces = [
        random_trace(model, seed=seed, num_tokens=count) for seed, count in enumerate(LENGTHS)
    ]
    routed = _routed(traces, model)
    logits = torch.randn(sum(LENGTHS), 1, num_experts, generator=torch.manual_seed(3))
    native = logits[:, 0].topk(top_k).indices
    first = 0
    for trace, num_tokens in zip(traces, LENGTHS, strict=True):
        for slot in range(len(layer_ids)):
            for row in range(num_tokens - 1):
                assert routed[slot][first + row] == set(trace.ids[row, slot].tolist())
            last = first + num_tokens - 1
            assert routed[slot][last] == set(native[last].tolist())
        first += num_tokens
    twins = [traces[0], with_other_id(traces[1], row=3, slot=1), traces[2]]
    changed = [
        (slot, position)
        for slot, sets in enumerate(_routed(twins, model))
        for position, experts in enumerate(sets)
        if experts != routed[slot][position]
    ]
    assert changed == [(1, LENGTHS[0] + 3)]


@pytest.mark.parametrize("model", ["8x2_all_moe", "512x10_all_moe"])
@pytest.mark.calls("verl.utils.veomni.router_replay.VeOmniRouterReplay.on_router_forward")
def test_veomni_takes_our_experts_but_for_the_last_token(model: str):
    """Its n-th router to fire takes layer n, so that it fits models without dense layers alone."""
    num_experts, top_k, layer_ids, num_layers = MODELS[model]
    trace = random_trace(model, seed=4, num_tokens=8)
    rows = np.concatenate(
        (to_verl(trace, num_tokens=8), np.zeros((1, num_layers, top_k), np.int16))
    )
    replay = VeOmniRouterReplay()
    replay.begin_replay()
    replay.begin_microbatch(targets=list(torch.from_numpy(rows).long().unbind(1)))
    routers = [torch.nn.Identity() for _ in layer_ids]
    for slot, router in enumerate(routers):
        scores = torch.randn(8, num_experts, generator=torch.manual_seed(slot))
        native = scores.topk(top_k).indices
        taken = replay.on_router_forward(router, scores, native)
        assert np.array_equal(taken[:7].numpy(), trace.ids[:, slot])
        assert torch.equal(taken[7], native[7])
        assert not np.array_equal(native[:7].numpy(), trace.ids[:, slot])
