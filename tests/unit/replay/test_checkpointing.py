import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from routing_replay.errors import ReplayError
from routing_replay.replay import attach, observe_expert_ids
from routing_replay.trace import RoutingTrace
from unit.replay.tiny_qwen3_moe import (
    Batch,
    build_model,
    make_batch,
    make_trace,
    random_traces,
    turn_routers,
)

MODES = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
BATCH = make_batch("right")
OTHER_TOKENS = make_batch("right", (9, 3, 6))


def build(use_reentrant: bool | None = None):
    model = build_model().train()
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        assert model.is_activation_checkpointing
    return model


def loss_of(batch: Batch, logits: Tensor):
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    return (logits * weights).sum()


def gradients(model: nn.Module):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same(have: dict[str, Tensor], want: dict[str, Tensor]):
    assert have.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.equal(have[name], gradient), name


def differs(have: dict[str, Tensor], want: dict[str, Tensor]):
    return any(not torch.equal(have[name], want[name]) for name in want)


def gradients_of(batch: Batch, traces: list[RoutingTrace | None]):
    """Gradients of one replayed microbatch without checkpointing."""
    model = build()
    with attach(model) as handle:
        with handle.replay(traces, batch.layout, on_missing="native"):
            loss = loss_of(batch, batch.logits(model))
        loss.backward()
    return gradients(model)


@MODES
@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "outside"])
def test_backward_recomputes_with_the_replayed_ids(use_reentrant: bool, is_inside: bool):
    traces = random_traces(BATCH.tokens)
    model = build(use_reentrant)
    with attach(model) as handle, observe_expert_ids(model) as observed:
        with handle.replay(traces, BATCH.layout):
            loss = loss_of(BATCH, BATCH.logits(model))
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        stats = handle.stats()
    for calls in observed.ids_by_layer.values():
        assert len(calls) == 2
        assert torch.equal(calls[0], calls[1])
    assert [layer.calls for layer in stats.layers] == [1, 1]
    assert [layer.recomputations for layer in stats.layers] == [1, 1]
    assert stats.rows_replayed == 2 * (4 + 8 + 1)
    have = gradients(model)
    assert_same(have, gradients_of(BATCH, traces))
    # The twin: other experts give other gradients.
    assert differs(have, gradients_of(BATCH, random_traces(BATCH.tokens, seed=1)))


@MODES
def test_recomputation_repeats_native_rows_after_the_router_changed(use_reentrant: bool):
    model = build(use_reentrant)
    traces = [None, *random_traces(BATCH.tokens)[1:]]
    with attach(model) as handle, observe_expert_ids(model) as observed:
        with handle.replay(traces, BATCH.layout, on_missing="native"):
            loss = loss_of(BATCH, BATCH.logits(model))
        # As a near tie that flips: by itself the router would now pick other experts.
        turn_routers(model)
        loss.backward()
    for calls in observed.ids_by_layer.values():
        assert torch.equal(calls[0], calls[1])


@MODES
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_backward_passes_of_several_microbatches_run_in_any_order(
    use_reentrant: bool, order: tuple[int, ...]
):
    batches = [BATCH, BATCH, OTHER_TOKENS]
    traces = [random_traces(batch.tokens, seed=seed) for seed, batch in enumerate(batches)]
    model = build(use_reentrant)
    with attach(model) as handle:
        losses = []
        for idx, batch in enumerate(batches):
            with handle.replay(traces[idx], batch.layout, microbatch_id=idx):
                losses.append(loss_of(batch, batch.logits(model)))
        for idx in order:
            losses[idx].backward()
            assert_same(gradients(model), gradients_of(batches[idx], traces[idx]))
            handle.release(idx)


@MODES
def test_backward_of_summed_losses_keeps_microbatches_apart(use_reentrant: bool):
    traces = [random_traces(BATCH.tokens, seed=seed) for seed in range(2)]
    model = build(use_reentrant)
    with attach(model) as handle, observe_expert_ids(model) as observed:
        losses = []
        for idx in range(2):
            with handle.replay(traces[idx], BATCH.layout, microbatch_id=idx):
                losses.append(loss_of(BATCH, BATCH.logits(model)))
        sum(losses).backward()
    for calls in observed.ids_by_layer.values():
        assert len(calls) == 4
        assert torch.equal(calls[2], calls[1])
        assert torch.equal(calls[3], calls[0])
        assert not torch.equal(calls[0], calls[1])


@MODES
def test_backward_of_an_earlier_microbatch_inside_the_next_block(use_reentrant: bool):
    traces = [random_traces(BATCH.tokens, seed=seed) for seed in range(2)]
    model = build(use_reentrant)
    with attach(model) as handle:
        with handle.replay(traces[0], BATCH.layout, microbatch_id=0):
            first = loss_of(BATCH, BATCH.logits(model))
        with handle.replay(traces[1], BATCH.layout, microbatch_id=1):
            second = loss_of(BATCH, BATCH.logits(model))
            first.backward()
            have = gradients(model)
        second.backward()
    assert_same(have, gradients_of(BATCH, traces[0]))
    assert_same(gradients(model), gradients_of(BATCH, traces[1]))


@MODES
@pytest.mark.parametrize("is_disabled", [False, True])
def test_backward_of_a_native_pass_stays_native(use_reentrant: bool, is_disabled: bool):
    model = build(use_reentrant)
    loss_of(BATCH, BATCH.logits(model)).backward()
    native = gradients(model)
    with attach(model) as handle:
        with handle.replay(random_traces(BATCH.tokens), BATCH.layout):
            replayed = BATCH.logits(model)
            with handle.disabled():
                inside = loss_of(BATCH, BATCH.logits(model))
            inside.backward()
            assert_same(gradients(model), native)
        loss = loss_of(BATCH, BATCH.logits(model))
        with handle.disabled() if is_disabled else contextlib.nullcontext():
            loss.backward()
            assert_same(gradients(model), native)
            loss_of(BATCH, replayed).backward()
        assert differs(gradients(model), native)


@MODES
def test_backward_in_disabled_recomputes_what_was_replayed(use_reentrant: bool):
    traces = random_traces(BATCH.tokens)
    model = build(use_reentrant)
    with attach(model) as handle:
        with handle.replay(traces, BATCH.layout):
            loss = loss_of(BATCH, BATCH.logits(model))
        with handle.disabled():
            loss.backward()
    assert_same(gradients(model), gradients_of(BATCH, traces))


@MODES
@pytest.mark.parametrize("how", ["released", "replaced"])
def test_backward_refuses_a_microbatch_that_is_gone(use_reentrant: bool, how: str):
    model = build(use_reentrant)
    with attach(model) as handle:
        with handle.replay(random_traces(BATCH.tokens), BATCH.layout, microbatch_id=4):
            loss = loss_of(BATCH, BATCH.logits(model))
        if how == "released":
            handle.release(4)
        else:
            with handle.replay(random_traces(BATCH.tokens, seed=1), BATCH.layout, microbatch_id=4):
                BATCH.logits(model)
        with pytest.raises(ReplayError, match="microbatch 4, whose ids were released or replaced"):
            loss.backward()


@MODES
def test_backward_refuses_after_detach(use_reentrant: bool):
    model = build(use_reentrant)
    with attach(model) as handle, handle.replay(random_traces(BATCH.tokens), BATCH.layout):
        loss = loss_of(BATCH, BATCH.logits(model))
    with pytest.raises(ReplayError, match=r"after detach\(\)"):
        loss.backward()


def test_backward_without_checkpointing_needs_nothing_kept():
    traces = random_traces(BATCH.tokens)
    model = build()
    with attach(model) as handle:
        with handle.replay(traces, BATCH.layout):
            loss = loss_of(BATCH, BATCH.logits(model))
        handle.release()
        loss.backward()
    assert_same(gradients(model), gradients_of(BATCH, traces))


def checkpointed_logits(model: nn.Module, use_reentrant: bool):
    inputs = BATCH.inputs
    embeddings = model.get_input_embeddings()(inputs["input_ids"])

    def run(hidden: Tensor):
        masks = {name: value for name, value in inputs.items() if name != "input_ids"}
        return model(inputs_embeds=hidden, **masks).logits

    return checkpoint(run, embeddings, use_reentrant=use_reentrant)


@MODES
def test_a_whole_model_checkpoint_needs_its_block(use_reentrant: bool):
    traces = random_traces(BATCH.tokens)
    model = build()
    with attach(model) as handle:
        with handle.replay(traces, BATCH.layout):
            loss_of(BATCH, checkpointed_logits(model, use_reentrant)).backward()
        assert_same(gradients(model), gradients_of(BATCH, traces))
        with handle.replay(traces, BATCH.layout):
            loss = loss_of(BATCH, checkpointed_logits(model, use_reentrant))
        with pytest.raises(ReplayError, match="cannot tell which microbatch"):
            loss.backward()
        with handle.replay(traces, BATCH.layout):
            BATCH.logits(model)
        with handle.replay(traces, BATCH.layout, microbatch_id=1):
            loss = loss_of(BATCH, checkpointed_logits(model, use_reentrant))
            with pytest.raises(ReplayError, match=r"cannot tell .*kept: \[0, 1\]"):
                loss.backward()


def test_an_earlier_backward_pass_cannot_claim_a_recomputation():
    model = build_model(dense=(0, 1)).train()
    # The only router's layer has no input gradient, which would end its part of a backward pass.
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers[:2]:
        layer.requires_grad_(False)
    traces = [
        make_trace(tokens, trace.ids[:, :1], num_experts=8, layer_ids=(2,))
        for tokens, trace in zip(
            BATCH.tokens, random_traces(BATCH.tokens, last_row=True), strict=True
        )
    ]
    with attach(model) as handle:
        with handle.replay(traces, BATCH.layout, microbatch_id=0):
            loss_of(BATCH, BATCH.logits(model)).backward()
        with handle.replay(traces, BATCH.layout, microbatch_id=1):
            loss = loss_of(BATCH, checkpointed_logits(model, False))
            with pytest.raises(ReplayError, match=r"cannot tell .*kept: \[0, 1\]"):
                loss.backward()


@MODES
def test_a_later_microbatch_cannot_claim_a_recomputation(use_reentrant: bool):
    traces = [random_traces(BATCH.tokens, seed=seed) for seed in range(2)]
    model = build()
    with attach(model) as handle:
        with handle.replay(traces[0], BATCH.layout, microbatch_id=0):
            whole = loss_of(BATCH, checkpointed_logits(model, use_reentrant))
        with handle.replay(traces[1], BATCH.layout, microbatch_id=1):
            plain = loss_of(BATCH, BATCH.logits(model))
        # The later microbatch's backward pass runs first, through every layer.
        with pytest.raises(ReplayError, match=r"cannot tell .*kept: \[0, 1\]"):
            (whole + plain).backward()


def test_layers_checkpointed_by_a_wrapper_recompute_the_same_ids():
    class Checkpointed(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: object, **kwargs: object):
            return checkpoint(self.layer, *args, use_reentrant=False, **kwargs)

    traces = random_traces(BATCH.tokens)
    model = build()
    for idx, layer in enumerate(model.model.layers):
        model.model.layers[idx] = Checkpointed(layer)
    with attach(model) as handle:
        with handle.replay(traces, BATCH.layout):
            loss = loss_of(BATCH, BATCH.logits(model))
        loss.backward()
    have = {name.replace(".layer.", "."): grad for name, grad in gradients(model).items()}
    assert_same(have, gradients_of(BATCH, traces))
