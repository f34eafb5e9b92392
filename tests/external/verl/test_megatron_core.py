"""Megatron-Core's own routers take our targets: right layer, right token, right order of a batch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from external.megatron_routers import Model, moe_config, routed_sets, start_parallel_state
from external.trace_cases import MODELS, random_trace, with_other_id
from routing_replay.trace import RoutingTrace
from routing_replay.trace.export import MegatronBatch, to_megatron, to_megatron_batch

LENGTHS, SEQ_LEN = (8, 5, 11), 12
CALLS = (
    "megatron.core.transformer.moe.router_replay.RouterReplay.set_target_indices",
    "megatron.core.transformer.moe.router_replay.RouterReplay.get_replay_topk",
    "megatron.core.transformer.moe.router.TopKRouter.routing",
)


@pytest.fixture(autouse=True)
def _no_routers_of_others() -> Iterator[None]:
    start_parallel_state()
    RouterReplay.clear_global_router_replay_instances()
    yield
    RouterReplay.clear_global_router_replay_instances()


def _traces(model: str) -> list[RoutingTrace]:
    return [random_trace(model, seed=seed, num_tokens=count) for seed, count in enumerate(LENGTHS)]


def _routed(model: str, batch: MegatronBatch) -> list[list[list[set[int]]]]:
    """Experts of every router, position and sequence."""
    num_experts, top_k, layer_ids, num_layers = MODELS[model]
    owner = Model(moe_config(num_layers, layer_ids, num_experts, top_k), layer_ids)
    logits = torch.randn(SEQ_LEN, len(LENGTHS), num_experts, generator=torch.manual_seed(5))
    found = []
    for router in owner.decoder.routers:
        router.router_replay.set_target_indices(
            torch.from_numpy(batch.targets[router.layer_number])
        )
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        found.append(routed_sets(router, logits))
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls(*CALLS)
def test_batch_reaches_the_tokens_that_it_was_captured_from(model: str):
    traces = _traces(model)
    batch = to_megatron_batch(traces, num_tokens=LENGTHS, seq_len=SEQ_LEN)
    routed = _routed(model, batch)
    for sequence, trace in enumerate(traces):
        for slot in range(trace.num_moe_layers):
            for position in range(SEQ_LEN):
                experts = routed[slot][position][sequence]
                assert len(experts) == trace.top_k  # dropless dispatch counts on it
                if position < trace.num_rows:
                    assert experts == set(trace.ids[position, slot].tolist())
    twins = [traces[0], traces[1], with_other_id(traces[2], row=9, slot=1)]
    other = _routed(model, to_megatron_batch(twins, num_tokens=LENGTHS, seq_len=SEQ_LEN))
    changed = [
        (slot, position, sequence)
        for slot, positions in enumerate(routed)
        for position, sequences in enumerate(positions)
        for sequence, experts in enumerate(sequences)
        if experts != other[slot][position][sequence]
    ]
    assert changed == [(1, 9, 2)]


@pytest.mark.calls(*CALLS)
def test_batch_that_is_flattened_sequence_first_reaches_other_tokens():
    traces = _traces("64x6_first_dense")
    batch = to_megatron_batch(traces, num_tokens=LENGTHS, seq_len=SEQ_LEN)
    wrong = {
        layer: np.ascontiguousarray(
            target.reshape(SEQ_LEN, len(LENGTHS), -1).transpose(1, 0, 2).reshape(target.shape)
        )
        for layer, target in batch.targets.items()
    }
    routed = _routed(
        "64x6_first_dense", MegatronBatch(targets=wrong, padding_mask=batch.padding_mask)
    )
    right = sum(
        routed[0][row][sequence] == set(trace.ids[row, 0].tolist())
        for sequence, trace in enumerate(traces)
        for row in range(trace.num_rows)
    )
    assert right < sum(trace.num_rows for trace in traces) // 4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls(*CALLS)
def test_one_sequence_is_replayed_by_layer_number(model: str):
    num_experts, top_k, layer_ids, num_layers = MODELS[model]
    trace = random_trace(model, seed=6, num_tokens=9)
    targets = to_megatron(trace, num_tokens=9)
    owner = Model(moe_config(num_layers, layer_ids, num_experts, top_k), layer_ids)
    logits = torch.randn(9, 1, num_experts, generator=torch.manual_seed(5))
    for slot, router in enumerate(owner.decoder.routers):
        router.router_replay.set_target_indices(torch.from_numpy(targets[router.layer_number]))
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        routed = routed_sets(router, logits)
        assert [experts for (experts,) in routed[:8]] == [
            set(row) for row in trace.ids[:, slot].tolist()
        ]


@pytest.mark.calls("megatron.core.transformer.moe.moe_utils.compute_routing_scores_for_aux_loss")
def test_padding_mask_is_true_where_megatron_drops_a_row():
    batch = to_megatron_batch(_traces("8x2_all_moe"), num_tokens=LENGTHS, seq_len=SEQ_LEN)
    # A MoE layer turns the model's [B, S] mask into [S, B] before it reaches the router.
    mask = torch.from_numpy(batch.padding_mask).transpose(0, 1).reshape(-1)
    logits = torch.randn(SEQ_LEN * len(LENGTHS), 8)
    routing_map, _ = compute_routing_scores_for_aux_loss(logits, 2, "softmax", padding_mask=mask)
    counted = routing_map.any(dim=-1).view(SEQ_LEN, len(LENGTHS))
    assert counted.sum(dim=0).tolist() == [num_tokens - 1 for num_tokens in LENGTHS]
    assert not counted[-1].any()


@pytest.mark.calls("megatron.core.transformer.moe.router.TopKRouter._apply_expert_bias")
def test_padding_mask_and_expert_bias_exclude_each_other(monkeypatch: pytest.MonkeyPatch):
    """The router applies a mask `[T]` to a map `[T, E]`; docs/interop.md says so while this passes."""
    # The router allocates its counters on the current CUDA device, whatever the config says.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    num_experts, top_k, layer_ids, num_layers = MODELS["64x6_first_dense"]
    config = moe_config(
        num_layers,
        layer_ids,
        num_experts,
        top_k,
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
        moe_router_pre_softmax=False,
    )
    router = Model(config, layer_ids).decoder.routers[0]
    mask = torch.zeros(SEQ_LEN, len(LENGTHS), dtype=torch.bool)
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        router.routing(torch.randn(SEQ_LEN, len(LENGTHS), num_experts), padding_mask=mask)
