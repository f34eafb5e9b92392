"""Replay in Transformers models: forced experts, logits and gradients, each with its twin."""

import copy
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routing_replay.errors import ReplayError, TraceMismatchError
from routing_replay.replay import Packed, Padded, attach, observe_expert_ids, routing_mismatch
from unit.replay.tiny_qwen3_moe import (
    LENGTHS,
    SHAPES,
    Batch,
    build_model,
    change_one_id,
    make_batch,
    make_trace,
    random_tokens,
    random_traces,
)

KINDS = ["right", "left", "packed"]
EXPERTS = ["eager", "batched_mm", "grouped_mm"]
# An expert's matrix product rounds differently with another number of rows. Measured: below 5e-6 on
# logits up to 5.3.
ROUNDING = 1e-4


def assert_rounding(have: Tensor, want: Tensor):
    assert (have - want).abs().max() < ROUNDING


def observed_ids(model: nn.Module, batch: Batch):
    with observe_expert_ids(model) as observed, torch.no_grad():
        logits = batch.logits(model)
    return observed.stacked(), logits


def native_traces(model: nn.Module, batch: Batch, *, num_experts: int, last_row: bool = False):
    """Traces of the experts that the model picks by itself, as a rollout would have captured."""
    ids, logits = observed_ids(model, batch)
    traces = [
        make_trace(
            tokens,
            ids[batch.rows[idx]][: len(tokens) - 1 + last_row].numpy(),
            num_experts=num_experts,
        )
        for idx, tokens in enumerate(batch.tokens)
    ]
    return traces, logits


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_replay_forces_every_position(num_experts: int, top_k: int, kind: str, experts: str):
    model = build_model(num_experts, top_k, experts=experts)
    batch = make_batch(kind)
    native, _ = observed_ids(model, batch)
    traces = random_traces(batch.tokens, num_experts, top_k)
    with attach(model) as handle:
        with handle.replay(traces, batch.layout, token_ids=batch.tokens):
            seen, _ = observed_ids(model, batch)
        stats = handle.stats()
    forced = torch.zeros(len(seen), dtype=torch.bool)
    for idx, trace in enumerate(traces):
        rows = batch.rows[idx][:-1]
        forced[rows] = True
        assert torch.equal(seen[rows], trace.to_torch().ids)
    # The first router has seen no forced layer: its other rows are native, padding and last tokens.
    assert torch.equal(seen[~forced, 0], native[~forced, 0])
    assert [layer.layer_idx for layer in stats.layers] == [1, 2]
    for slot, layer in enumerate(stats.layers):
        assert (layer.calls, layer.recomputations) == (1, 0)
        assert (layer.rows_replayed, layer.rows_native_last) == (sum(LENGTHS) - 3, 3)
        assert layer.coverage == 1.0
        if slot == 0:
            want = routing_mismatch(seen[forced], native[forced]).per_layer[0]
            assert layer.mismatch == pytest.approx(want)
            assert 0.5 < layer.mismatch <= 1.0


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("last_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_replay_of_native_ids_is_bitwise_native(
    num_experts: int, top_k: int, kind: str, last_row: bool, norm_topk_prob: bool
):
    model = build_model(num_experts, top_k, norm_topk_prob=norm_topk_prob)
    batch = make_batch(kind)
    traces, native = native_traces(model, batch, num_experts=num_experts, last_row=last_row)
    with attach(model) as handle:
        with handle.replay(traces, batch.layout, token_ids=batch.tokens):
            replayed = batch.logits(model)
        assert torch.equal(replayed, native)
        stats = handle.stats()
        assert (stats.coverage, stats.mismatch) == (1.0, 0.0)
        assert stats.rows_native_last == (0 if last_row else 2 * len(traces))
        # The twin: one other expert, in one row of one layer, shows from its token on.
        changed = [traces[0], change_one_id(traces[1], row=3, slot=1), traces[2]]
        with handle.replay(changed, batch.layout):
            perturbed = batch.logits(model)
        layers = handle.stats().layers
        assert [layer.rows_mismatched for layer in layers] == [0, 1]
    have, want = batch.sequence_rows(perturbed, 1), batch.sequence_rows(native, 1)
    assert (have[3] - want[3]).abs().max() > 100 * ROUNDING
    assert_rounding(have[:3], want[:3])
    for idx in (0, 2):
        assert_rounding(batch.sequence_rows(perturbed, idx), batch.sequence_rows(native, idx))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layouts_agree_on_the_same_sequences(attention: str):
    model = build_model(attention=attention)
    traces = random_traces(random_tokens())
    results = {}
    with attach(model) as handle, torch.no_grad():
        for kind in KINDS:
            batch = make_batch(kind)
            with handle.replay(traces, batch.layout, token_ids=batch.tokens):
                logits = batch.logits(model)
            results[kind] = torch.cat([batch.sequence_rows(logits, idx) for idx in range(3)])
    for kind in KINDS:
        assert_rounding(results[kind], results["right"])


def test_packed_sequences_do_not_see_each_other():
    model = build_model()
    batch = make_batch("packed")
    traces = random_traces(batch.tokens)
    changed = [traces[0], *random_traces(batch.tokens, seed=7)[1:2], traces[2]]
    with attach(model) as handle, torch.no_grad():
        with handle.replay(traces, batch.layout):
            first = batch.logits(model)
        with handle.replay(changed, batch.layout):
            second = batch.logits(model)
    for idx in (0, 2):
        assert_rounding(batch.sequence_rows(first, idx), batch.sequence_rows(second, idx))
    moved = batch.sequence_rows(first, 1) - batch.sequence_rows(second, 1)
    assert moved.abs().max() > 100 * ROUNDING


def test_packed_sequences_see_each_other_with_a_cache():
    # Why `Packed` tells its callers to pass use_cache=False.
    model = build_model()
    batch = make_batch("packed")
    cached = model(**batch.inputs, use_cache=True).logits
    alone = batch.logits(model)
    assert_rounding(batch.sequence_rows(cached, 0), batch.sequence_rows(alone, 0))
    moved = batch.sequence_rows(cached, 1) - batch.sequence_rows(alone, 1)
    assert moved.abs().max() > 100 * ROUNDING


def forced_by_hand(ids: Tensor, norm_topk_prob: bool):
    """A router that is given its experts outright, written without top-k."""

    def forward(self: nn.Module, hidden_states: Tensor):
        router_logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights = F.softmax(router_logits, dtype=torch.float, dim=-1).gather(-1, ids)
        if norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return router_logits, weights, ids

    return forward


def gradients(model: nn.Module, logits: Tensor):
    targets = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    (logits * targets).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_gradients_equal_a_reference_that_gathers(
    num_experts: int, top_k: int, kind: str, norm_topk_prob: bool
):
    model = build_model(num_experts, top_k, norm_topk_prob=norm_topk_prob)
    reference = copy.deepcopy(model)
    batch = make_batch(kind)
    native = gradients(model, batch.logits(model))
    traces = random_traces(batch.tokens, num_experts, top_k)
    with (
        attach(model) as handle,
        observe_expert_ids(model) as observed,
        handle.replay(traces, batch.layout),
    ):
        have = gradients(model, batch.logits(model))
    for slot, layer in enumerate(reference.model.layers[1:]):
        forward = forced_by_hand(observed.stacked()[:, slot], norm_topk_prob)
        layer.mlp.gate.forward = types.MethodType(forward, layer.mlp.gate)
    want = gradients(reference, batch.logits(reference))
    for name, gradient in want.items():
        assert torch.equal(have[name], gradient), name
    for layer_idx in (1, 2):
        name = f"model.layers.{layer_idx}.mlp.gate.weight"
        assert have[name].abs().max() > 0
        assert not torch.equal(have[name], native[name])


def test_replay_in_bfloat16_keeps_the_model_formula():
    model = build_model().to(torch.bfloat16)
    batch = make_batch("left")
    traces, native = native_traces(model, batch, num_experts=8)
    with attach(model) as handle, handle.replay(traces, batch.layout):
        output = model(**batch.inputs)
    assert output.logits.dtype == torch.bfloat16
    assert torch.equal(output.logits, native)


def test_replay_leaves_the_auxiliary_loss_native():
    model = build_model()
    batch = make_batch("right")
    arguments = {**batch.inputs, "output_router_logits": True}
    traces, _ = native_traces(model, batch, num_experts=8)
    native = model(**arguments)
    changed = [traces[0], change_one_id(traces[1], row=3, slot=1), traces[2]]
    with attach(model) as handle, handle.replay(changed, batch.layout):
        replayed = model(**arguments)
    # The last router's logits do not depend on what that router was forced to.
    assert not torch.equal(replayed.logits, native.logits)
    assert torch.equal(replayed.aux_loss, native.aux_loss)


def test_missing_rows_route_natively_where_the_caller_says_so():
    model = build_model()
    batch = make_batch("right")
    full, native = native_traces(model, batch, num_experts=8)
    traces = [None, full[1].slice(2, 6), full[2]]
    with attach(model) as handle:
        with (
            pytest.raises(TraceMismatchError, match=r"sequence 0 .*on_missing='native'"),
            handle.replay(traces, batch.layout),
        ):
            pass
        with handle.replay(traces, batch.layout, on_missing="native") as plan:
            replayed = batch.logits(model)
        stats = handle.stats()
    assert torch.equal(replayed, native)
    assert (plan.rows_replayed, plan.rows_native_missing, plan.rows_native_last) == (5, 8, 3)
    assert (stats.rows_replayed, stats.rows_native_missing, stats.rows_native_last) == (10, 16, 6)
    assert stats.coverage == pytest.approx(5 / 13)


def test_disabled_is_bitwise_native():
    model = build_model()
    batch = make_batch("right")
    native = batch.logits(model)
    traces = random_traces(batch.tokens)
    with attach(model) as handle:
        with handle.replay(traces, batch.layout):
            forced = batch.logits(model)
            with handle.disabled(), handle.disabled():
                assert torch.equal(batch.logits(model), native)
            assert torch.equal(batch.logits(model), forced)
        assert not torch.equal(forced, native)
        with handle.disabled():
            assert torch.equal(batch.logits(model), native)
            with (
                pytest.raises(ReplayError, match=r"inside disabled\(\)"),
                handle.replay(traces, batch.layout),
            ):
                pass


@pytest.mark.parametrize("is_inside_forward", [True, False])
def test_an_exception_leaves_the_model_native_and_usable(is_inside_forward: bool):
    model = build_model()
    batch = make_batch("right")
    native = batch.logits(model)
    traces = random_traces(batch.tokens)

    def fail(*_: object):
        raise RuntimeError("stop")

    with attach(model) as handle:
        hook = model.model.layers[2].mlp.experts.register_forward_pre_hook(fail)
        if not is_inside_forward:
            hook.remove()
        with pytest.raises(RuntimeError, match="stop"), handle.replay(traces, batch.layout):
            fail(batch.logits(model))
        hook.remove()
        assert torch.equal(batch.logits(model), native)
        with pytest.raises(ReplayError, match="microbatch 0 is not kept; kept: \\[\\]"):
            handle.release(0)
        with handle.replay(traces, batch.layout):
            assert not torch.equal(batch.logits(model), native)
    assert torch.equal(batch.logits(model), native)


def test_replay_refuses_routers_that_did_not_fire():
    model = build_model()
    batch = make_batch("right")
    traces = random_traces(batch.tokens)
    with attach(model) as handle:
        with (
            pytest.raises(ReplayError, match=r"layers \[1, 2\] were not called"),
            handle.replay(traces, batch.layout),
        ):
            pass
        with (
            pytest.raises(ReplayError, match=r"layers \[2\] were not called"),
            handle.replay(traces, batch.layout),
        ):
            model.model.layers[1].mlp.gate(torch.randn(batch.layout.num_tokens, 32))
        with (
            pytest.raises(ReplayError, match=r"layers \[1, 2\] were not called"),
            handle.replay(traces, batch.layout),
            handle.disabled(),
        ):
            batch.logits(model)


@pytest.mark.parametrize(
    "layout", [Packed(lengths=LENGTHS), Padded(lengths=LENGTHS, seq_len=12)], ids=["fewer", "more"]
)
def test_replay_refuses_another_number_of_rows(layout: Packed | Padded):
    model = build_model()
    batch = make_batch("right")
    native = batch.logits(model)
    with attach(model) as handle:
        want = rf"layer 1 was called with 33 rows .* microbatch 0 has {layout.num_tokens}"
        with (
            pytest.raises(ReplayError, match=want),
            handle.replay(random_traces(batch.tokens), layout),
        ):
            batch.logits(model)
        assert torch.equal(batch.logits(model), native)


@pytest.mark.parametrize(("calls", "forward"), [(0, torch.sort), (2, torch.topk)])
def test_replay_refuses_a_router_without_exactly_one_topk(
    calls: int, forward: Callable[..., tuple[Tensor, ...]]
):
    model = build_model()
    batch = make_batch("right")
    router = model.model.layers[2].mlp.gate

    def odd(self: nn.Module, hidden_states: Tensor):
        probs = F.softmax(F.linear(hidden_states, self.weight), dim=-1)
        if calls == 0:
            values, ids = (part[:, :2] for part in probs.sort(dim=-1, descending=True))
        for _ in range(calls):
            values, ids = forward(probs, 2)
        return probs, values, ids

    router.forward = types.MethodType(odd, router)
    with (
        attach(model) as handle,
        pytest.raises(ReplayError, match=rf"layer 2 \(.*gate\) picked experts in {calls} top-k"),
        handle.replay(random_traces(batch.tokens), batch.layout),
    ):
        batch.logits(model)


def test_replay_refuses_nested_blocks_and_early_release():
    model = build_model()
    batch = make_batch("right")
    traces = random_traces(batch.tokens)
    with attach(model) as handle, handle.replay(traces, batch.layout, microbatch_id=3):
        with (
            pytest.raises(ReplayError, match="microbatch 3 is still open"),
            handle.replay(traces, batch.layout, microbatch_id=4),
        ):
            pass
        with pytest.raises(ReplayError, match="microbatch 3 is still open"):
            handle.release(3)
        batch.logits(model)


def test_a_second_forward_in_a_block_takes_the_same_experts():
    model = build_model()
    batch = make_batch("right")
    traces = random_traces(batch.tokens)
    with attach(model) as handle, observe_expert_ids(model) as observed:
        with handle.replay(traces, batch.layout):
            batch.logits(model)
            with torch.no_grad():
                model.model.layers[1].mlp.gate.weight.neg_()
            batch.logits(model)
        assert [layer.calls for layer in handle.stats().layers] == [2, 2]
    for calls in observed.ids_by_layer.values():
        assert torch.equal(calls[0], calls[1])


def test_native_rows_never_count_as_mismatched():
    model = build_model()
    batch = make_batch("right")
    with attach(model) as handle:
        with handle.replay([None] * 3, batch.layout, on_missing="native"):
            batch.logits(model)
            with torch.no_grad():
                model.model.layers[1].mlp.gate.weight.neg_()
            batch.logits(model)
        assert [layer.rows_mismatched for layer in handle.stats().layers] == [0, 0]


def test_two_models_are_replayed_independently():
    policy, other = build_model(), build_model()
    batch = make_batch("right")
    native = batch.logits(other)
    first, second = random_traces(batch.tokens), random_traces(batch.tokens, seed=1)
    with attach(policy) as policy_handle, attach(other) as other_handle:
        with policy_handle.replay(first, batch.layout):
            assert torch.equal(batch.logits(other), native)
            with other_handle.replay(second, batch.layout):
                assert not torch.equal(batch.logits(policy), batch.logits(other))
        assert [layer.calls for layer in other_handle.stats().layers] == [1, 1]


def test_stats_are_empty_before_the_first_replay():
    with attach(build_model()) as handle:
        stats = handle.stats()
    assert stats.rows_replayed == stats.rows_native_missing == 0
    assert stats.coverage != stats.coverage
    assert stats.layers[0].mismatch != stats.layers[0].mismatch
