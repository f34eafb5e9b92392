"""Missing rows in Transformers models: forced and native rows side by side, and the loss mask."""

import copy
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routing_replay.replay import attach, observe_expert_ids
from routing_replay.trace import RoutingTrace
from unit.replay.tiny_qwen3_moe import (
    Batch,
    build_model,
    change_one_id,
    make_batch,
    make_trace,
    random_ids,
    random_traces,
    turn_routers,
)

KINDS = ["right", "left", "packed"]
MODES = pytest.mark.parametrize(
    "use_reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"]
)
# Sequences of 5, 9 and 2 tokens: two rows missing, five missing, and complete.
VALID = [[False, True, True, False], [True, False, False, True, False, True, False, False], [True]]


def partial_traces(batch: Batch) -> list[RoutingTrace]:
    return [
        make_trace(
            tokens,
            random_ids(len(tokens) - 1, 8, 2, seed=40 + idx),
            num_experts=8,
            valid=VALID[idx],
        )
        for idx, tokens in enumerate(batch.tokens)
    ]


def by_hand(model: nn.Module, batch: Batch, traces: list[RoutingTrace]):
    """A copy of the model whose routers are told their experts in the rows that were captured."""
    reference = copy.deepcopy(model)
    for slot, layer in enumerate(reference.model.layers[1:]):
        ids = torch.full((batch.layout.num_tokens, 2), -1)
        for rows, trace in zip(batch.rows, traces, strict=True):
            for row, given in zip(rows[:-1], trace.ids[:, slot].tolist(), strict=True):
                ids[row] = torch.tensor(given)
            for row, is_valid in zip(rows[:-1], trace.valid, strict=True):
                ids[row] = ids[row] if is_valid else -1

        def forward(self: nn.Module, hidden_states: Tensor, ids: Tensor = ids):
            router_logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
            scores = F.softmax(router_logits, dtype=torch.float, dim=-1)
            own = scores.sort(dim=-1, descending=True, stable=True).indices[:, :2]
            taken = torch.where(ids >= 0, ids, own)
            weights = scores.gather(-1, taken)
            return router_logits, weights / weights.sum(dim=-1, keepdim=True), taken

        layer.mlp.gate.forward = types.MethodType(forward, layer.mlp.gate)
    return reference


def gradients(model: nn.Module, logits: Tensor, loss_mask: Tensor):
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    ((logits * weights) * loss_mask[..., None]).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@MODES
@pytest.mark.parametrize("policy", ["native", "mask_loss", "drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_forced_and_native_rows_mix_exactly(kind: str, policy: str, use_reentrant: bool | None):
    model = build_model().train()
    batch = make_batch(kind)
    traces = partial_traces(batch)
    reference = by_hand(model, batch, traces)
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    with attach(model) as handle, observe_expert_ids(model) as observed:
        with handle.replay(traces, batch.layout, on_missing=policy) as plan:
            logits = batch.logits(model)
        have = gradients(model, logits, plan.loss_mask)
        stats = handle.stats()
    with observe_expert_ids(reference) as wanted:
        want_logits = batch.logits(reference)
    want = gradients(reference, want_logits, plan.loss_mask)
    for layer_idx, calls in observed.ids_by_layer.items():
        assert len(calls) == (1 if use_reentrant is None else 2)
        for ids in calls:
            assert torch.equal(ids, wanted.ids_by_layer[layer_idx][0])
    assert torch.equal(logits, want_logits)
    for name, gradient in want.items():
        assert torch.equal(have[name], gradient), name
    assert (stats.rows_replayed, stats.rows_native_missing) == (2 * 6, 2 * 7)
    # The twin: another expert in one captured row of one layer.
    changed = [traces[0], change_one_id(traces[1], row=3, slot=0), traces[2]]
    with attach(model) as handle, handle.replay(changed, batch.layout, on_missing=policy):
        assert not torch.equal(batch.logits(model), want_logits)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("policy", ["native", "mask_loss", "drop"])
def test_recomputation_repeats_missing_rows(policy: str, use_reentrant: bool):
    model = build_model().train()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    batch = make_batch("packed")
    traces = partial_traces(batch)
    with attach(model) as handle, observe_expert_ids(model) as observed:
        with handle.replay(traces, batch.layout, on_missing=policy):
            logits = batch.logits(model)
        turn_routers(model)
        logits.sum().backward()
        with handle.replay(traces, batch.layout, on_missing=policy):
            batch.logits(model)
    for calls in observed.ids_by_layer.values():
        first, recomputed, turned = calls
        assert torch.equal(recomputed, first)
        assert not torch.equal(turned, first)


def gradient_of_masked_loss(policy: str, traces: list[RoutingTrace | None], batch: Batch):
    """Gradient of the next-token loss with respect to every row's logits, `[tokens, vocab]`."""
    model = build_model()
    with attach(model) as handle:
        with handle.replay(traces, batch.layout, on_missing=policy) as plan:
            logits = batch.logits(model)
        logits.retain_grad()
        labels = batch.inputs["input_ids"][:, 1:]
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        (losses * plan.loss_mask[:, :-1]).sum().backward()
    return logits.grad.flatten(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["native", "mask_loss", "drop"])
def test_the_loss_of_a_masked_token_has_no_gradient(policy: str, kind: str):
    batch = make_batch(kind)
    grad = gradient_of_masked_loss(policy, partial_traces(batch), batch)
    kept = {
        "native": [[True] * len(valid) for valid in VALID],
        "mask_loss": VALID,
        "drop": [[False] * 4, [False] * 8, [True]],
    }[policy]
    want = torch.zeros(batch.layout.num_tokens, dtype=torch.bool)
    for rows, flags in zip(batch.rows, kept, strict=True):
        want[rows[:-1]] = torch.tensor(flags)
    assert torch.equal(grad.abs().sum(dim=-1) > 0, want)


def test_later_tokens_attend_to_what_a_native_row_made():
    """What `mask_loss` leaves in the loss, and `drop` does not."""
    batch = make_batch("packed")
    full = random_traces(batch.tokens)
    gap = make_trace(
        batch.tokens[1],
        np.array(full[1].ids),
        num_experts=8,
        valid=[True, True, False, *[True] * 5],
    )
    model = build_model()
    results = []
    with attach(model) as handle, torch.no_grad():
        for trace in (full[1], gap):
            with handle.replay(
                [full[0], trace, full[2]], batch.layout, on_missing="mask_loss"
            ) as plan:
                results.append(batch.sequence_rows(batch.logits(model), 1))
    moved = (results[0] - results[1]).abs().amax(dim=-1) > 1e-3
    assert moved.tolist() == [False, False, *[True] * 7]
    kept = plan.loss_mask.flatten()[batch.rows[1]]
    assert kept.tolist() == [True, True, False, *[True] * 5, False]
