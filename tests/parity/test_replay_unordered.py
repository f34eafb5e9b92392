"""Traces whose column order says nothing, as the set codec leaves them."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from routing_replay.replay import attach, observe_expert_ids, routing_mismatch
from routing_replay.trace import RoutingTrace, decode_trace, encode_trace
from unit.replay.tiny_qwen3_moe import build_model, change_one_id, make_batch, random_traces

EXPERTS = ["eager", "batched_mm", "grouped_mm"]
# Four columns summed in another order. Measured: logits up to 7 move by less than 2e-6, gradients by
# less than 1.2e-6 of their parameter's largest; one other expert moves them by 4e-2 and 7e-4.
ROUNDING = 1e-5


def as_set(trace: RoutingTrace) -> RoutingTrace:
    packed = decode_trace(encode_trace(trace, codec="packed"))
    assert packed.equals(dataclasses.replace(trace, ids=np.sort(trace.ids, axis=-1), ordered=False))
    return packed


def gradients(model: nn.Module, logits: Tensor):
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    (logits * weights).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def gradient_error(have: dict[str, Tensor], want: dict[str, Tensor]):
    return max(
        float((have[name] - want[name]).abs().max() / want[name].abs().max()) for name in want
    )


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "non-re", "re"])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_unordered_traces_replay_the_same_sets(kind: str, experts: str, use_reentrant: bool | None):
    model = build_model(16, 4, experts=experts).train()
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    batch = make_batch(kind)
    ordered = random_traces(batch.tokens, 16, 4)
    unordered = [as_set(trace) for trace in ordered]
    changed = [ordered[0], as_set(change_one_id(ordered[1], row=3, slot=1)), ordered[2]]
    assert not np.array_equal(ordered[1].ids, unordered[1].ids)
    logits, grads, ids, stats = [], [], [], []
    for traces in (ordered, unordered, changed):
        with attach(model) as handle, observe_expert_ids(model) as observed:
            with handle.replay(traces, batch.layout, token_ids=batch.tokens):
                logits.append(batch.logits(model))
            grads.append(gradients(model, logits[-1]))
            stats.append(handle.stats())
        for calls in observed.ids_by_layer.values():
            assert all(torch.equal(call, calls[0]) for call in calls)
        ids.append(torch.stack([calls[0] for calls in observed.ids_by_layer.values()], dim=1))
    rows = torch.tensor([row for rows in batch.rows for row in rows[:-1]])
    forced = np.concatenate([trace.ids for trace in unordered])
    np.testing.assert_array_equal(ids[1][rows].numpy(), forced)
    assert routing_mismatch(ids[0][rows], ids[1][rows]).pairs == 0.0
    assert stats[0].mismatch == stats[1].mismatch
    assert (logits[1] - logits[0]).abs().max() < ROUNDING
    assert gradient_error(grads[1], grads[0]) < ROUNDING
    # The twin: one other expert, in one row of one layer.
    assert routing_mismatch(ids[0][rows], ids[2][rows]).pairs > 0.0
    assert (logits[2] - logits[0]).abs().max() > 1000 * ROUNDING
    assert gradient_error(grads[2], grads[0]) > 50 * ROUNDING


def test_a_recorded_set_replays_within_rounding():
    model = build_model(16, 4)
    batch = make_batch("packed")
    with attach(model) as handle, torch.no_grad():
        with handle.record(batch.layout, token_ids=batch.tokens) as recorded:
            native = batch.logits(model)
        sets = [as_set(trace) for trace in recorded.traces]
        with (
            handle.replay(sets, batch.layout),
            handle.record(batch.layout, token_ids=batch.tokens) as again,
        ):
            replayed = batch.logits(model)
        assert handle.stats().mismatch == 0.0
    assert (replayed - native).abs().max() < ROUNDING
    # Not in the order of the live router's keys, and it says so.
    assert [trace.ordered for trace in again.traces] == [False] * 3
    for first, second in zip(sets, again.traces, strict=True):
        np.testing.assert_array_equal(first.ids, second.ids)
