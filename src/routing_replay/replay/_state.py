"""Which microbatch a router call belongs to: in a forward pass, and in a recomputed one."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from routing_replay.errors import ConfigError, ReplayError
from routing_replay.replay._microbatch import MicrobatchRecord
from routing_replay.replay._plan import ReplayPlan, native_plan
from routing_replay.replay._recording import Recorder
from routing_replay.trace import ModelRouting


class ReplayState:
    """What the routers of one attached model share.

    In a forward pass the open `replay` or `record` block decides. Activation checkpointing repeats
    forwards inside backward passes, possibly after the block has closed and while several
    microbatches wait for theirs. So every decoder layer's output is tagged with its microbatch: its
    gradient arrives before the layer is recomputed, and the gradient of the layer's input after. A
    plain attribute and not a context variable, because autograd runs backward passes in threads of
    its own.

    Args:
        routing: The model's layers, experts and top-k.
    """

    def __init__(self, routing: ModelRouting) -> None:
        self._routing = routing
        self._active: MicrobatchRecord | None = None
        self._disabled = 0
        self._kept: dict[int, MicrobatchRecord] = {}
        # Layers between the gradients of their output and input: the backward pass, and the
        # microbatch of their forward pass (None: it routed natively).
        self._in_backward: dict[int, tuple[int, MicrobatchRecord | None]] = {}
        self.is_attached = True

    @contextmanager
    def open(self, plan: ReplayPlan, microbatch_id: int) -> Generator[None]:
        """Make a plan the one that forward passes follow."""
        earlier = self._kept.get(microbatch_id)
        if earlier is not None:
            earlier.release()
        record = MicrobatchRecord(plan, self._routing, microbatch_id=microbatch_id)
        succeeded = False
        try:
            self._kept[microbatch_id] = self._active = record
            yield
            self._check_fired(record)
            succeeded = True
        finally:
            self._active = None
            if not succeeded:
                record.release()
                self._kept.pop(microbatch_id, None)

    @contextmanager
    def record(self, recorder: Recorder, microbatch_id: int) -> Generator[None]:
        """Let a recorder see the forward pass, of the open microbatch or of one of its own."""
        with ExitStack() as stack:
            if self._active is None:
                self.check_openable()
                plan = native_plan(self._routing, recorder.layout)
                stack.enter_context(self.open(plan, microbatch_id))
            record = self._active
            assert record is not None
            self._check_recordable(record, recorder, microbatch_id)
            try:
                record.recorder = recorder
                yield
                recorder.finish()
            finally:
                record.recorder = None

    def check_openable(self) -> None:
        """Refuse a block that could not take effect."""
        if not self.is_attached:
            raise ReplayError("the handle is detached; attach to the model again")
        if self._active is not None:
            raise ReplayError(
                f"microbatch {self._active.mb_id} is still open; leave its block before opening"
                f" another (record() goes inside replay(), not around it)"
            )
        self._check_enabled()

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Route forward passes natively."""
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1

    def release(self, microbatch_id: int) -> None:
        """Drop the ids of a microbatch."""
        record = self._kept.get(microbatch_id)
        if record is None:
            raise ReplayError(f"microbatch {microbatch_id} is not kept; kept: {sorted(self._kept)}")
        if record is self._active:
            raise ReplayError(
                f"microbatch {microbatch_id} is still open; release it after its block"
            )
        record.release()
        del self._kept[microbatch_id]

    def detach(self) -> None:
        """Drop everything; the routers are native again."""
        if self._active is not None:
            raise ReplayError(
                f"microbatch {self._active.mb_id} is still open; detach after its block"
            )
        for microbatch_id in tuple(self._kept):
            self.release(microbatch_id)
        self.is_attached = False

    def resolve(self, layer_idx: int) -> tuple[MicrobatchRecord | None, bool]:
        """Decide what a router call follows.

        Returns:
            The microbatch, or `None` for native routing; and whether the call is a recomputation.

        Raises:
            ReplayError: A recomputation whose microbatch is gone or cannot be told.
        """
        backward_id = _backward_id()
        if backward_id is None:
            return self._current(), False
        # An entry of another backward pass is one that ended early or had no gradient to end it.
        entered_in, record = self._in_backward.get(layer_idx, (None, None))
        if entered_in == backward_id:
            if record is not None and record.is_released:
                raise ReplayError(
                    f"decoder layer {layer_idx} is recomputed for microbatch {record.mb_id}, whose"
                    f" ids were released or replaced; run the backward pass before release() and"
                    f" before the next replay() or record() with the same microbatch_id"
                )
            return record, True
        if not self._kept:
            return None, True
        active = self._active
        if active is not None and len(self._kept) == 1 and active.is_frozen(layer_idx):
            return active, True
        raise ReplayError(
            f"cannot tell which microbatch a recomputation of decoder layer {layer_idx} belongs to"
            f" (kept: {sorted(self._kept)}); checkpoint whole decoder layers, or run the backward"
            f" pass inside its block and release() the other microbatches first"
        )

    def tag_layer(self, layer_idx: int, layer: nn.Module, hidden_in: object, out: object) -> None:
        """Tag a decoder layer's output with the microbatch of the running forward pass."""
        hidden_out = out[0] if isinstance(out, tuple) else out
        if not isinstance(hidden_out, Tensor) or not hidden_out.requires_grad:
            return
        if _backward_id() is not None:
            return
        is_checkpointed = layer.training and bool(getattr(layer, "gradient_checkpointing", False))
        hidden_out.register_hook(
            partial(self._enter_backward, layer_idx, self._current(), is_checkpointed)
        )
        # A hook on a leaf would outlive the graph, on a tensor that belongs to the caller.
        if isinstance(hidden_in, Tensor) and hidden_in.grad_fn is not None:
            hidden_in.register_hook(partial(self._leave_backward, layer_idx))

    def _check_enabled(self) -> None:
        if self._disabled:
            raise ReplayError(
                "replay() and record() take no effect inside disabled(); leave disabled() first"
            )

    def _check_recordable(
        self, record: MicrobatchRecord, recorder: Recorder, microbatch_id: int
    ) -> None:
        self._check_enabled()
        if record.recorder is not None:
            raise ReplayError(
                f"microbatch {record.mb_id} is being recorded already; one record block sees a"
                f" forward pass"
            )
        if (record.mb_id, record.plan.layout) != (microbatch_id, recorder.layout):
            raise ConfigError(
                f"record() has microbatch_id = {microbatch_id} and layout {recorder.layout} inside a"
                f" replay block of microbatch_id = {record.mb_id} and layout {record.plan.layout};"
                f" both must be the same"
            )

    def _current(self) -> MicrobatchRecord | None:
        return None if self._disabled else self._active

    def _check_fired(self, record: MicrobatchRecord) -> None:
        silent = [idx for idx in self._routing.layer_ids if idx not in record.fired]
        if silent:
            raise ReplayError(
                f"microbatch {record.mb_id}: the routers of decoder layers {silent} were not called"
                f" inside the block, of {list(self._routing.layer_ids)}; run the forward pass"
                f" of the attached model inside it"
            )

    def _enter_backward(
        self, layer_idx: int, record: MicrobatchRecord | None, is_checkpointed: bool, _grad: Tensor
    ) -> None:
        # The detached router would recompute natively, and nothing else could notice.
        if is_checkpointed and record is not None and not self.is_attached:
            raise ReplayError(
                f"backward pass of microbatch {record.mb_id} after detach(): decoder layer"
                f" {layer_idx} is checkpointed and would be recomputed with native routing; run the"
                f" backward pass before detach()"
            )
        backward_id = _backward_id()
        assert backward_id is not None
        self._in_backward[layer_idx] = (backward_id, record)

    def _leave_backward(self, layer_idx: int, _grad: Tensor) -> None:
        self._in_backward.pop(layer_idx, None)


def _backward_id() -> int | None:
    """Return the backward pass that this thread executes, asked as torch's checkpointing does."""
    task_id = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
    return None if task_id == -1 else task_id
