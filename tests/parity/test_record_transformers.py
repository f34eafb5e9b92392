"""Recording in Transformers models: what was recorded, that nothing moved, and its replay."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from routing_replay.errors import ConfigError, ReplayError, TraceFormatError
from routing_replay.replay import Packed, Padded, ReplayHandle, attach, observe_expert_ids
from unit.replay.tiny_qwen3_moe import (
    LENGTHS,
    SHAPES,
    Batch,
    build_model,
    change_one_id,
    make_batch,
    random_traces,
    turn_routers,
)

KINDS = ["right", "left", "packed"]
MODES = pytest.mark.parametrize(
    "use_reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"]
)


def build_trainer(use_reentrant: bool | None):
    model = build_model().train()
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def recorded_pass(handle: ReplayHandle, model: nn.Module, batch: Batch, **options: object):
    with handle.record(batch.layout, token_ids=batch.tokens, **options) as recorded:
        logits = batch.logits(model)
    return recorded.traces, logits


def gradients(model: nn.Module, logits: Tensor):
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    (logits * weights).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same(have: dict[str, Tensor], want: dict[str, Tensor]):
    for name, gradient in want.items():
        assert torch.equal(have[name], gradient), name


def interrupt(*_: object):
    raise KeyboardInterrupt


@pytest.mark.parametrize("last_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_record_returns_what_the_experts_received(
    num_experts: int, top_k: int, kind: str, last_row: bool
):
    model = build_model(num_experts, top_k)
    batch = make_batch(kind, (*LENGTHS, 1))
    native = batch.logits(model)
    with attach(model) as handle, observe_expert_ids(model) as observed:
        traces, logits = recorded_pass(handle, model, batch, weights_version=7, last_row=last_row)
    assert torch.equal(logits, native)
    assert [trace.num_rows for trace in traces] == [
        length - 1 + last_row for length in batch.layout.lengths
    ]
    for idx, trace in enumerate(traces):
        trace.validate(batch.tokens[idx])
        rows = batch.rows[idx][: trace.num_rows]
        assert torch.equal(trace.to_torch().ids, observed.stacked()[rows])
        assert (trace.layer_ids, trace.num_layers) == ((1, 2), 3)
        assert (trace.num_experts, trace.top_k, trace.ordered) == (num_experts, top_k, True)
        assert trace.weights_version == (((0, 7),) if trace.num_rows else ())
        assert trace.is_complete


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_replay_of_a_record_is_bitwise_native(kind: str, use_reentrant: bool | None):
    model = build_trainer(use_reentrant)
    batch = make_batch(kind)
    native = batch.logits(model)
    want = gradients(model, native)
    with attach(model) as handle:
        traces, logits = recorded_pass(handle, model, batch)
        assert torch.equal(logits, native)
        with handle.replay(traces, batch.layout, token_ids=batch.tokens):
            logits = batch.logits(model)
        assert torch.equal(logits, native)
        assert_same(gradients(model, logits), want)
        assert (handle.stats().coverage, handle.stats().mismatch) == (1.0, 0.0)
        # The twin: one other expert, in one row of one layer.
        changed = [traces[0], change_one_id(traces[1], row=3, slot=1), traces[2]]
        with handle.replay(changed, batch.layout):
            perturbed = batch.logits(model)
        gate = "model.layers.2.mlp.gate.weight"
        assert not torch.equal(perturbed, native)
        assert not torch.equal(gradients(model, perturbed)[gate], want[gate])


@MODES
def test_a_recorded_pass_has_native_gradients(use_reentrant: bool | None):
    model = build_trainer(use_reentrant)
    batch = make_batch("packed")
    want = gradients(model, batch.logits(model))
    with attach(model) as handle:
        traces, logits = recorded_pass(handle, model, batch)
        assert_same(gradients(model, logits), want)
        with handle.record(batch.layout, token_ids=batch.tokens, microbatch_id=1) as recorded:
            have = gradients(model, batch.logits(model))
        assert_same(have, want)
        repeats = 2 * (use_reentrant is not None)
        stats = handle.stats()
    assert [layer.recomputations for layer in stats.layers] == [repeats, repeats]
    assert [layer.calls for layer in stats.layers] == [2, 2]
    for first, second in zip(traces, recorded.traces, strict=True):
        assert first.equals(second)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputation_repeats_the_recorded_experts(use_reentrant: bool):
    model = build_trainer(use_reentrant)
    batch = make_batch("right")
    with attach(model) as handle, observe_expert_ids(model) as observed:
        traces, logits = recorded_pass(handle, model, batch)
        turn_routers(model)
        logits.sum().backward()
        recomputed, _ = recorded_pass(handle, model, batch, microbatch_id=1)
    for calls in observed.ids_by_layer.values():
        assert len(calls) == 3
        assert torch.equal(calls[1], calls[0])
        assert not torch.equal(calls[2], calls[0])
    assert not np.array_equal(traces[1].ids, recomputed[1].ids)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_whole_model_checkpoint_is_recorded_once(use_reentrant: bool):
    model = build_model().train()
    batch = make_batch("right")
    want = gradients(model, batch.logits(model))

    def logits_of(embeddings: Tensor):
        masks = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
        return model(inputs_embeds=embeddings, **masks).logits

    with attach(model) as handle:
        traces, _ = recorded_pass(handle, model, batch)
        with handle.record(batch.layout, token_ids=batch.tokens) as recorded:
            embeddings = model.get_input_embeddings()(batch.inputs["input_ids"])
            logits = checkpoint(logits_of, embeddings, use_reentrant=use_reentrant)
            assert_same(gradients(model, logits), want)
    for first, second in zip(traces, recorded.traces, strict=True):
        assert first.equals(second)


def test_a_record_holds_the_old_routing_after_an_update():
    model = build_model()
    batch = make_batch("left")
    with attach(model) as handle, torch.no_grad():
        old, _ = recorded_pass(handle, model, batch, weights_version=3)
        turn_routers(model)
        new, native = recorded_pass(handle, model, batch, weights_version=4)
        assert not np.array_equal(old[1].ids, new[1].ids)
        with (
            observe_expert_ids(model) as observed,
            handle.replay(old, batch.layout, token_ids=batch.tokens),
        ):
            replayed = batch.logits(model)
        for idx, trace in enumerate(old):
            assert torch.equal(trace.to_torch().ids, observed.stacked()[batch.rows[idx][:-1]])
        assert not torch.equal(replayed, native)
        assert handle.stats().mismatch > 0.3


@MODES
def test_record_inside_replay_returns_forced_and_native_rows(use_reentrant: bool | None):
    model = build_trainer(use_reentrant)
    batch = make_batch("right")
    forced = random_traces(batch.tokens)
    given = [None, forced[1].slice(2, 6), forced[2]]
    with attach(model) as handle, observe_expert_ids(model) as observed:
        with (
            handle.replay(given, batch.layout, on_missing="native", microbatch_id=5),
            handle.record(batch.layout, token_ids=batch.tokens, microbatch_id=5) as recorded,
        ):
            logits = batch.logits(model)
        want = gradients(model, logits)
        taken = observed.ids_by_layer
        for idx, trace in enumerate(recorded.traces):
            for slot, layer_idx in enumerate((1, 2)):
                have = trace.to_torch().ids[:, slot]
                assert torch.equal(have, taken[layer_idx][0][batch.rows[idx][:-1]])
        np.testing.assert_array_equal(recorded.traces[1].ids[2:6], forced[1].ids[2:6])
        assert not np.array_equal(recorded.traces[1].ids[:2], forced[1].ids[:2])
        # What was recorded is the whole of it: replayed without a missing row, nothing moves.
        with handle.replay(recorded.traces, batch.layout):
            again = batch.logits(model)
        assert torch.equal(again, logits)
        assert_same(gradients(model, again), want)


def test_a_record_block_sees_nothing_after_its_end():
    model = build_model()
    batch = make_batch("packed")
    with (
        attach(model) as handle,
        torch.no_grad(),
        handle.replay(random_traces(batch.tokens), batch.layout),
    ):
        first, logits = recorded_pass(handle, model, batch)
        assert torch.equal(batch.logits(model), logits)
        second, _ = recorded_pass(handle, model, batch)
    for one, other in zip(first, second, strict=True):
        assert one.equals(other)


def test_recorded_columns_out_of_rank_order_say_so():
    model = build_model()
    batch = make_batch("packed")
    with attach(model) as handle, torch.no_grad():
        native, _ = recorded_pass(handle, model, batch)
        assert [trace.ordered for trace in native] == [True] * 3
        ids = native[1].ids.copy()
        ids[4, 0] = ids[4, 0, ::-1]
        with (
            handle.replay(
                [
                    None,
                    type(native[1]).from_rows(
                        ids,
                        token_ids=batch.tokens[1],
                        layer_ids=(1, 2),
                        num_layers=3,
                        num_experts=8,
                    ),
                    None,
                ],
                batch.layout,
                on_missing="native",
            ),
            handle.record(batch.layout, token_ids=batch.tokens) as recorded,
        ):
            batch.logits(model)
    assert [trace.ordered for trace in recorded.traces] == [True, False, True]
    np.testing.assert_array_equal(recorded.traces[1].ids, ids)


def test_record_counts_no_row_as_due():
    model = build_model()
    batch = make_batch("right")
    with attach(model) as handle, torch.no_grad():
        recorded_pass(handle, model, batch)
        stats = handle.stats()
    assert (stats.rows_replayed, stats.rows_native_missing, stats.rows_native_last) == (0, 0, 0)
    assert [layer.calls for layer in stats.layers] == [1, 1]


def test_traces_outlive_release_detach_and_the_callers_buffers():
    model = build_model()
    batch = make_batch("packed")
    buffers = [torch.tensor(tokens) for tokens in batch.tokens]
    with attach(model) as handle, torch.no_grad():
        want, _ = recorded_pass(handle, model, batch)
        with handle.record(batch.layout, token_ids=buffers) as recorded:
            batch.logits(model)
        handle.release()
        for tokens in buffers:
            tokens.zero_()
    turn_routers(model)
    for first, second in zip(want, recorded.traces, strict=True):
        assert first.equals(second)
    assert recorded.traces is recorded.traces


def test_traces_are_not_readable_early_or_after_an_exception():
    model = build_model()
    batch = make_batch("right")
    with attach(model) as handle, torch.no_grad():
        with handle.record(batch.layout, token_ids=batch.tokens) as recorded:
            batch.logits(model)
            with pytest.raises(ReplayError, match="block is still open"):
                _ = recorded.traces
        assert len(recorded.traces) == 3
        with (
            pytest.raises(KeyboardInterrupt),
            handle.record(batch.layout, token_ids=batch.tokens) as failed,
        ):
            interrupt(batch.logits(model))
        with pytest.raises(ReplayError, match="an exception ended it"):
            _ = failed.traces


def test_record_refuses_a_router_that_fired_twice_or_never():
    model = build_model()
    batch = make_batch("right")
    native = batch.logits(model)
    with attach(model) as handle, torch.no_grad():
        with (
            pytest.raises(ReplayError, match="layer 1 was called a second time"),
            handle.record(batch.layout, token_ids=batch.tokens),
        ):
            [batch.logits(model) for _ in range(2)]
        with (
            pytest.raises(ReplayError, match=r"layers \[1, 2\] were not called inside the record"),
            handle.record(batch.layout, token_ids=batch.tokens),
        ):
            pass
        with (
            pytest.raises(ReplayError, match=r"layers \[2\] were not called inside the record"),
            handle.record(batch.layout, token_ids=batch.tokens),
        ):
            model.model.layers[1].mlp.gate(torch.randn(batch.layout.num_tokens, 32))
        with (
            pytest.raises(ReplayError, match=r"layers \[1, 2\] were not called inside the record"),
            handle.record(batch.layout, token_ids=batch.tokens),
            handle.disabled(),
        ):
            batch.logits(model)
        assert torch.equal(batch.logits(model), native)


@pytest.mark.parametrize(
    "layout", [Packed(lengths=LENGTHS), Padded(lengths=LENGTHS, seq_len=12)], ids=["fewer", "more"]
)
def test_record_refuses_another_number_of_rows(layout: Packed | Padded):
    model = build_model()
    batch = make_batch("right")
    want = rf"layer 1 was called with 33 rows .* has {layout.num_tokens}"
    with (
        attach(model) as handle,
        pytest.raises(ReplayError, match=want),
        handle.record(layout, token_ids=batch.tokens),
    ):
        batch.logits(model)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"token_ids": [[1, 2]]}, ConfigError, r"token_ids has 1 entries .* 3 sequences"),
        ({"token_ids": [[1] * 5, [1] * 8, [1] * 2]}, ConfigError, r"token_ids\[1\] has 8 tokens"),
        ({"token_ids": [[1.5] * 5, [1] * 9, [1] * 2]}, TraceFormatError, "token_ids"),
        ({"token_ids": [[-1] * 5, [1] * 9, [1] * 2]}, TraceFormatError, "-1"),
        ({"weights_version": -1}, ConfigError, "weights_version = -1"),
        ({"weights_version": True}, ConfigError, "weights_version = True"),
    ],
)
def test_record_refuses_bad_arguments_before_the_forward_pass(
    change: dict[str, object], error: type[Exception], named: str
):
    batch = make_batch("packed")
    with (
        attach(build_model()) as handle,
        pytest.raises(error, match=named),
        handle.record(**{"layout": batch.layout, "token_ids": batch.tokens} | change),
    ):
        pytest.fail("the block was entered")


def test_record_refuses_blocks_in_the_wrong_order():
    model = build_model()
    batch = make_batch("packed")
    traces = random_traces(batch.tokens)
    arguments = {"layout": batch.layout, "token_ids": batch.tokens}
    other = make_batch("right")

    def refused(error: type[Exception], named: str, **change: object):
        with pytest.raises(error, match=named), handle.record(**arguments | change):
            pytest.fail("the block was entered")

    handle = attach(model)
    with handle.disabled():
        refused(ReplayError, r"inside disabled\(\)")
    with handle.replay(traces, batch.layout, microbatch_id=2):
        refused(ConfigError, "microbatch_id = 0 .* microbatch_id = 2")
        refused(ConfigError, "both must be the same", layout=other.layout, microbatch_id=2)
        with handle.disabled():
            refused(ReplayError, r"inside disabled\(\)", microbatch_id=2)
        batch.logits(model)
    with handle.record(**arguments) as recorded:
        refused(ReplayError, "recorded already")
        with (
            pytest.raises(ReplayError, match=r"record\(\) goes inside replay\(\)"),
            handle.replay(traces, batch.layout),
        ):
            pytest.fail("the block was entered")
        batch.logits(model)
    assert len(recorded.traces) == 3
    handle.detach()
    refused(ReplayError, "detached")
