"""Whatever ends a block, the model is what it was before."""

import contextlib
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from routing_replay.errors import ReplayError
from routing_replay.replay import ReplayHandle, attach
from unit.replay.tiny_qwen3_moe import Batch, build_model, make_batch, random_traces, snapshot

BATCH = make_batch("packed")
TRACES = random_traces(BATCH.tokens)
ERRORS = [RuntimeError, KeyboardInterrupt]


class Tripwire:
    """Raises at one call of the last router, in the middle of its forward."""

    def __init__(self, model: nn.Module) -> None:
        self.calls = 0
        self.trip_at: int | None = None
        self.error: type[BaseException] = RuntimeError
        router = model.model.layers[2].mlp.gate
        wire = self

        def forward(self: nn.Module, hidden_states: Tensor):
            output = type(self).forward(self, hidden_states)
            wire.calls += 1
            if wire.calls == wire.trip_at:
                raise wire.error("tripped")
            return output

        router.forward = types.MethodType(forward, router)

    def arm(self, error: type[BaseException], call: int):
        self.calls, self.trip_at, self.error = 0, call, error

    def disarm(self):
        self.trip_at = None


def build(use_reentrant: bool | None):
    model = build_model().train()
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    return model, Tripwire(model)


def outputs(model: nn.Module, batch: Batch = BATCH):
    """Logits and gradients of a plain step."""
    model.zero_grad()
    logits = batch.logits(model)
    logits.square().sum().backward()
    found = [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
    model.zero_grad()
    return found


def assert_same(have: list[Tensor], want: list[Tensor]):
    assert all(torch.equal(first, second) for first, second in zip(have, want, strict=True))


@contextlib.contextmanager
def replaying(handle: ReplayHandle):
    with handle.replay(TRACES, BATCH.layout):
        yield


@contextlib.contextmanager
def recording(handle: ReplayHandle):
    with handle.record(BATCH.layout, token_ids=BATCH.tokens):
        yield


@contextlib.contextmanager
def recording_a_replay(handle: ReplayHandle):
    given = [None, TRACES[1].slice(2, 6), TRACES[2]]
    with handle.replay(given, BATCH.layout, on_missing="native"), recording(handle):
        yield


BLOCKS = [replaying, recording, recording_a_replay]


def fail_in_forward(model: nn.Module, tripwire: Tripwire, error: type[BaseException]):
    tripwire.arm(error, call=1)
    BATCH.logits(model)


def fail_in_the_block(model: nn.Module, tripwire: Tripwire, error: type[BaseException]):
    BATCH.logits(model)
    raise error("tripped")


def fail_in_backward(model: nn.Module, tripwire: Tripwire, error: type[BaseException]):
    def fail(_grad: Tensor):
        raise error("tripped")

    def watch(_layer: nn.Module, _args: object, output: Tensor):
        output.register_hook(fail)

    hook = model.model.layers[1].register_forward_hook(watch)
    logits = BATCH.logits(model)
    hook.remove()
    logits.sum().backward()


def fail_in_recomputation(model: nn.Module, tripwire: Tripwire, error: type[BaseException]):
    tripwire.arm(error, call=2)
    BATCH.logits(model).sum().backward()


PLACES = [
    (fail_in_forward, None),
    (fail_in_forward, False),
    (fail_in_forward, True),
    (fail_in_the_block, None),
    (fail_in_backward, None),
    (fail_in_backward, False),
    (fail_in_backward, True),
    (fail_in_recomputation, False),
    (fail_in_recomputation, True),
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("fail", "use_reentrant"), PLACES)
def test_an_exception_leaves_the_model_as_it_was(
    fail: Callable[..., None],
    use_reentrant: bool | None,
    block: Callable[..., contextlib.AbstractContextManager[None]],
    error: type[BaseException],
):
    model, tripwire = build(use_reentrant)
    want, before = outputs(model), snapshot(model)
    with attach(model) as handle:
        with block(handle):
            replayed = BATCH.logits(model).detach()
        attached = snapshot(model)
        with pytest.raises(error, match="tripped"), block(handle):
            fail(model, tripwire, error)
        tripwire.disarm()
        assert snapshot(model) == attached
        assert_same(outputs(model), want)
        with pytest.raises(ReplayError, match="microbatch 0 is not kept"):
            handle.release()
        # The handle still works.
        with block(handle):
            assert torch.equal(BATCH.logits(model), replayed)
        assert torch.equal(replayed, want[0]) == (block is recording)
    assert snapshot(model) == before
    assert_same(outputs(model), want)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_exception_in_a_backward_pass_after_the_block(
    use_reentrant: bool, error: type[BaseException]
):
    model, tripwire = build(use_reentrant)
    want, before = outputs(model), snapshot(model)
    with attach(model) as handle:
        with handle.replay(TRACES, BATCH.layout):
            logits = BATCH.logits(model)
        tripwire.arm(error, call=1)
        with pytest.raises(error, match="tripped"):
            logits.sum().backward()
        tripwire.disarm()
        assert_same(outputs(model), want)
    assert snapshot(model) == before
    assert_same(outputs(model), want)


def test_an_exception_in_disabled_ends_it():
    model, _ = build(None)
    native = BATCH.logits(model)
    with attach(model) as handle, handle.replay(TRACES, BATCH.layout):
        with pytest.raises(KeyboardInterrupt), handle.disabled():
            raise KeyboardInterrupt
        assert not torch.equal(BATCH.logits(model), native)


@pytest.mark.parametrize("error", ERRORS)
def test_an_interrupted_attach_leaves_no_trace(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
):
    model, _ = build(None)
    before = snapshot(model)

    def fail(*_: object, **__: object):
        raise error("tripped")

    with monkeypatch.context() as patched:
        patched.setattr(type(model.model.layers[2]), "register_forward_hook", fail)
        with pytest.raises(error, match="tripped"):
            attach(model)
    assert snapshot(model) == before
    with attach(model):
        assert snapshot(model) != before
    assert snapshot(model) == before


def test_an_interrupted_detach_can_be_repeated(monkeypatch: pytest.MonkeyPatch):
    model, _ = build(None)
    before = snapshot(model)
    handle = attach(model)

    def fail(_: RemovableHandle):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RemovableHandle, "remove", fail)
        with pytest.raises(KeyboardInterrupt):
            handle.detach()
    assert snapshot(model) != before
    handle.detach()
    assert snapshot(model) == before
