"""Attaching to a model, and the handle that replays in it."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from routing_replay.errors import ReplayError
from routing_replay.replay._discovery import FoundRouters, find_routers
from routing_replay.replay._forcing import LayerTag, RouterForward
from routing_replay.replay._plan import OnMissing, ReplayPlan, TokenIds, build_plan
from routing_replay.replay._recording import RecordedRouting, Recorder
from routing_replay.replay._state import ReplayState
from routing_replay.replay._stats import LayerCounter, ReplayStats
from routing_replay.replay.layout import Layout
from routing_replay.trace import ModelRouting, RoutingTrace


def attach(model: nn.Module) -> "ReplayHandle":
    """Prepare a Hugging Face MoE model for replay, without a change of its results.

    Every router instance gets a `forward` of its own that follows the handle; outside `replay` and
    `record` blocks it calls the model's, bit for bit. Nothing global is patched, and a deep copy of the model
    is plain again (and is not attached).

    Args:
        model: A Transformers model of a supported family (`qwen3_moe`), or a wrapper around one.

    Returns:
        The handle, which is also a context manager that detaches at its end.

    Raises:
        ReplayError: The model is attached to already.
        UnsupportedModelError: No supported family, or no router, two in one layer, or one whose
            experts cannot be forced.

    Example::

        handle = attach(model)
        with handle.replay(traces, Packed(lengths=(17, 40))):
            logits = model(input_ids, position_ids=position_ids, use_cache=False).logits
        loss(logits).backward()
        handle.release(0)
    """
    found = find_routers(model)
    for router in found.routers:
        if isinstance(vars(router.router).get("forward"), RouterForward):
            raise ReplayError(
                f"router {router.path!r} is attached to already; use the handle that attach()"
                f" returned, or detach() it first"
            )
    return ReplayHandle(found)


class ReplayHandle:
    """Replays traces in one model, and records them. Made by `attach`.

    Microbatches are kept by `microbatch_id` after their block has closed, because activation
    checkpointing (both `use_reentrant` modes) repeats forward passes inside the backward pass: it
    then takes exactly the experts of the first pass, native rows included, in whatever order the
    backward passes run. `release` them, or open the next microbatch under the same id.

    An exception that leaves a block drops its microbatch, and leaves the model as it was before.

    Args:
        found: The model's routers.
    """

    def __init__(self, found: FoundRouters) -> None:
        self._routing = found.routing
        self._state = ReplayState(found.routing)
        self._counters = {router.layer_idx: LayerCounter() for router in found.routers}
        self._forwards = [
            RouterForward(router, found.routing, self._state, self._counters[router.layer_idx])
            for router in found.routers
        ]
        self._hooks: list[RemovableHandle] = []
        try:
            self._install(found)
        except BaseException:
            self._restore()
            raise

    @property
    def routing(self) -> ModelRouting:
        """The layers, experts and top-k that traces must have."""
        return self._routing

    def plan(
        self,
        traces: Sequence[RoutingTrace | None],
        layout: Layout,
        *,
        token_ids: Sequence[TokenIds] | None = None,
        on_missing: OnMissing = "error",
    ) -> ReplayPlan:
        """Compute which experts every router row is to take, without replaying them.

        Takes and raises the same as `replay`.

        Args:
            traces: One per sequence of the layout; `None` where nothing was captured.
            layout: How the tokens are laid out in the batch.
            token_ids: Token ids of every sequence, without padding; checked against the digests.
            on_missing: What a due row without a captured one becomes.

        Returns:
            The targets, their mask and the mask of the loss, on the CPU.

        Raises:
            ConfigError: See `replay`.
            TraceFormatError: See `replay`.
            TraceMismatchError: See `replay`.

        Runtime: host only; allocates 8 * tokens * L * K bytes; deterministic; no gradients.
        """
        return build_plan(self._routing, traces, layout, token_ids=token_ids, on_missing=on_missing)

    @contextmanager
    def replay(
        self,
        traces: Sequence[RoutingTrace | None],
        layout: Layout,
        *,
        token_ids: Sequence[TokenIds] | None = None,
        on_missing: OnMissing = "error",
        microbatch_id: int = 0,
    ) -> Generator[ReplayPlan]:
        """Force the experts of the forward passes inside the block.

        A sequence of T tokens is due rows for its tokens 0 to T-2. The row of token T-1 is replayed
        where a trace has it and is native otherwise, because no sampled token depends on it. Padding
        is native and not counted. Weights come from the live router at the forced experts, in the
        model's own formula, so that gradients flow into it.

        Columns are forced in the order of the trace. A trace that is not `ordered` (a set codec
        sorts its columns) forces the same experts with the same weights, but where the model adds
        up over its columns (the norm of the weights, the experts' outputs) it does so in another
        order, and low bits may differ.

        Args:
            traces: One per sequence of the layout; `None` where nothing was captured.
            layout: How the tokens are laid out in the batch that the model is called with.
            token_ids: Token ids of every sequence, without padding; checked against the digests.
            on_missing: What a due row without a captured one becomes: `"error"`; the model's own
                top-k, counted in `stats`, for `"native"`, `"mask_loss"` (the prediction of the next
                token is False in the plan's `loss_mask`) and `"drop"` (the whole sequence is).
            microbatch_id: Name of the microbatch; replaying under the same name again drops the
                ids kept for its backward pass.

        Yields:
            The plan; multiply the loss with its `loss_mask`.

        Raises:
            ConfigError: Counts or lengths disagree, or an option is not accepted.
            ReplayError: Another block is open, replay is disabled, or the handle is detached; a
                router was called with another number of rows, or by the end of the block not at all.
            TraceFormatError: A trace holds malformed ids.
            TraceMismatchError: A trace is of another model or other tokens, has too many rows, or
                lacks a due row under `on_missing="error"`.

        Runtime: one host-to-device copy of the targets per device (2 * tokens * L * K bytes), then
            no host sync; a router call adds a gather and two sorts of `[tokens, K]`; keeps
            2 * tokens * K bytes per router until release; not CUDA-graph safe; deterministic;
            differentiable in the router's weights and inputs.
        """
        self._state.check_openable()
        plan = self.plan(traces, layout, token_ids=token_ids, on_missing=on_missing)
        with self._state.open(plan, microbatch_id):
            yield plan

    @contextmanager
    def record(
        self,
        layout: Layout,
        *,
        token_ids: Sequence[TokenIds],
        weights_version: int = 0,
        last_row: bool = False,
        microbatch_id: int = 0,
    ) -> Generator[RecordedRouting]:
        """Record the experts that one forward pass inside the block takes, as traces.

        For replay of the trainer's own routing: record the pass that computes the old
        log-probabilities, and replay the traces in the passes that train on them. The pass itself
        is not changed by a bit, and replaying its traces with the same weights is equal to it bit
        for bit, gradients too. Recomputations are not recorded; they repeat the recorded experts.

        Inside a `replay` block of the same layout and `microbatch_id`, what is recorded is what the
        routers really took: replayed rows and native ones. A recorded trace is `ordered` where all
        its rows are in the order of the live router's keys, equal keys by increasing id.

        Args:
            layout: How the tokens are laid out in the batch that the model is called with.
            token_ids: Token ids of every sequence, without padding.
            weights_version: Version of the weights that the model has now, at least 0.
            last_row: Give the traces a row for each sequence's last token too: T rows and not
                T - 1, for a last token that was an input and is not the last for good.
            microbatch_id: As for `replay`; a recorded pass with gradients can be checkpointed too.

        Yields:
            The recorded routing, whose `traces` are readable after the block.

        Raises:
            ConfigError: Counts or lengths disagree, or an option is not accepted.
            ReplayError: Another block is open (but for `replay` around it), replay is disabled, or
                the handle is detached; a router was called with another number of rows, a second
                time, or by the end of the block not at all.
            TraceFormatError: A token id is not an integer in [0, 2**32).

        Runtime: one host sync per tensor of `token_ids` that is on a device, then none before
            `traces` is read; a router call adds two gathers of `[tokens, K]`; keeps 2 * tokens * K
            bytes per router until release and until the traces are read; not CUDA-graph safe;
            deterministic; differentiable as the model is.
        """
        recorder = Recorder(
            self._routing, layout, token_ids, weights_version=weights_version, last_row=last_row
        )
        with self._state.record(recorder, microbatch_id):
            yield RecordedRouting(recorder)

    def disabled(self) -> AbstractContextManager[None]:
        """Route natively inside the block, as for a reference or teacher pass.

        Only forward passes are concerned: a backward pass inside the block still recomputes with
        the experts of its own forward pass.

        Returns:
            The context manager; it nests.
        """
        return self._state.disabled()

    def release(self, microbatch_id: int = 0) -> None:
        """Drop the ids kept for the backward pass of a microbatch.

        Args:
            microbatch_id: As given to `replay` or `record`.

        Raises:
            ReplayError: No such microbatch is kept, or its block is open.
        """
        self._state.release(microbatch_id)

    def stats(self) -> ReplayStats:
        """Count what was replayed since `attach`.

        Returns:
            Counts per layer.

        Runtime: one host sync per router.
        """
        return ReplayStats(
            layers=tuple(counter.read(idx) for idx, counter in self._counters.items())
        )

    def detach(self) -> None:
        """Restore every router's own forward exactly; detaching again does nothing.

        Run the backward passes of checkpointed microbatches before.

        Raises:
            ReplayError: A block is open, or somebody replaced a router's forward after `attach`.
        """
        if self._state.is_attached and not all(fwd.is_installed() for fwd in self._forwards):
            raise ReplayError(
                "the forward of a router was replaced after attach(); undo that first, then detach()"
            )
        self._state.detach()
        self._restore()

    def _install(self, found: FoundRouters) -> None:
        """Make the routers follow this handle."""
        for forward in self._forwards:
            forward.install()
        for router in found.routers:
            tag = LayerTag(router.layer_idx, self._state)
            self._hooks.append(router.layer.register_forward_hook(tag, with_kwargs=True))

    def _restore(self) -> None:
        """Undo `_install`, or what was done of it; undoing again does nothing."""
        for forward in self._forwards:
            forward.uninstall()
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()
