"""SkyRL's replay, on Megatron-Core's own routers, sends every token to the experts of our traces."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from skyrl.backends.skyrl_train.distributed.megatron.token_metadata import (
    build_token_metadata_layout,
)
from skyrl.backends.skyrl_train.utils.replay_utils import (
    clear_router_replay,
    patch_topk_router_layer_number,
    setup_per_microbatch_replay_forward,
)
from skyrl.train.dataset.preprocess import (
    convert_prompts_responses_to_batch_tensors,
    make_router_padding_mask,
)

from external.megatron_routers import Model, moe_config, routed_sets, start_parallel_state
from external.trace_cases import MODELS, random_trace, token_ids, with_other_id
from routing_replay.trace import RoutingTrace
from routing_replay.trace.export import to_skyrl

LENGTHS = ((3, 8), (6, 15), (1, 4))  # prompt tokens, all tokens


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SkyRL's patch of Megatron-Core, taken back after each test."""
    start_parallel_state()
    RouterReplay.clear_global_router_replay_instances()
    monkeypatch.setattr(TopKRouter, "set_layer_number", TopKRouter.set_layer_number)
    patch_topk_router_layer_number()
    yield
    clear_router_replay()
    RouterReplay.clear_global_router_replay_instances()
    del TopKRouter._set_layer_number_patched


def _routed(traces: list[RoutingTrace], model: str) -> list[list[set[int]]]:
    """Experts of every router and token of the packed microbatch, in its order."""
    num_experts, top_k, layer_ids, num_layers = MODELS[model]
    tokens = [token_ids(seed, num_tokens) for seed, (_, num_tokens) in enumerate(LENGTHS)]
    routes = [to_skyrl(trace, num_tokens=trace.num_rows + 1) for trace in traces]
    batch = convert_prompts_responses_to_batch_tensors(
        0,
        [ids[:count] for ids, (count, _) in zip(tokens, LENGTHS, strict=True)],
        [ids[count:] for ids, (count, _) in zip(tokens, LENGTHS, strict=True)],
        [[0.0] * (total - count) for count, total in LENGTHS],
        [[1] * (total - count) for count, total in LENGTHS],
        rollout_expert_indices=routes,
    )
    attention_mask, packed = batch[1], batch[6]
    config = moe_config(num_layers, layer_ids, num_experts, top_k)
    owner = Model(config, layer_ids)
    layout = build_token_metadata_layout(
        attention_mask, torch.device("cpu"), packed=True, fp8_enabled=False
    )
    setup_per_microbatch_replay_forward(
        packed,
        make_router_padding_mask(attention_mask, [len(item) for item in routes]),
        attention_mask,
        owner,
        config,
        layout,
        remove_microbatch_padding=True,
    )
    total = sum(num_tokens for _, num_tokens in LENGTHS)
    logits = torch.randn(total, 1, num_experts, generator=torch.manual_seed(7))
    return [
        [position[0] for position in routed_sets(router, logits)]
        for router in owner.decoder.routers
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls(
    "skyrl.backends.skyrl_train.utils.replay_utils.setup_per_microbatch_replay_forward",
    "skyrl.backends.skyrl_train.distributed.megatron.token_metadata.build_token_metadata_layout",
    "skyrl.train.dataset.preprocess.convert_prompts_responses_to_batch_tensors",
    "megatron.core.transformer.moe.router_replay.RouterReplay.set_replay_data",
    "megatron.core.transformer.moe.router.TopKRouter.routing",
)
def test_routers_take_our_experts(model: str):
    traces = [
        random_trace(model, seed=seed, num_tokens=num_tokens)
        for seed, (_, num_tokens) in enumerate(LENGTHS)
    ]
    routed = _routed(traces, model)
    first = 0
    for trace, (_, num_tokens) in zip(traces, LENGTHS, strict=True):
        for slot in range(trace.num_moe_layers):
            for row in range(trace.num_rows):
                assert routed[slot][first + row] == set(trace.ids[row, slot].tolist())
            assert routed[slot][first + num_tokens - 1] == set(range(trace.top_k))
        first += num_tokens
    clear_router_replay()
    RouterReplay.clear_global_router_replay_instances()
    twins = [traces[0], with_other_id(traces[1], row=9, slot=1), traces[2]]
    changed = [
        (slot, position)
        for slot, sets in enumerate(_routed(twins, model))
        for position, experts in enumerate(sets)
        if experts != routed[slot][position]
    ]
    assert changed == [(1, 8 + 9)]
