"""Attaching to a model, and the handle that replays in it."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Self

from torch import nn

from routing_replay.errors import ReplayError
from routing_replay.replay._discovery import FoundRouters, find_routers
from routing_replay.replay._forcing import LayerTag, RouterForward
from routing_replay.replay._plan import ModelRouting, OnMissing, ReplayPlan, TokenIds, build_plan
from routing_replay.replay._state import ReplayState
from routing_replay.replay._stats import LayerCounter, ReplayStats
from routing_replay.replay.layout import Layout
from routing_replay.trace import RoutingTrace


def attach(model: nn.Module) -> "ReplayHandle":
    """Prepare a Hugging Face MoE model for replay, without a change of its results.

    Every router instance gets a `forward` of its own that follows the handle; outside a `replay`
    block it calls the model's, bit for bit. Nothing global is patched, and a deep copy of the model
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
    """Replays traces in one model. Made by `attach`.

    Microbatches are kept by `microbatch_id` after their block has closed, because activation
    checkpointing (both `use_reentrant` modes) repeats forward passes inside the backward pass: it
    then takes exactly the experts of the first pass, native rows included, in whatever order the
    backward passes run. `release` them, or replay the next microbatch under the same id.

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
        for forward in self._forwards:
            forward.install()
        self._hooks = [
            router.layer.register_forward_hook(
                LayerTag(router.layer_idx, self._state), with_kwargs=True
            )
            for router in found.routers
        ]

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
            The targets and their mask, on the CPU.

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

        Args:
            traces: One per sequence of the layout; `None` where nothing was captured.
            layout: How the tokens are laid out in the batch that the model is called with.
            token_ids: Token ids of every sequence, without padding; checked against the digests.
            on_missing: What a due row without a captured one becomes: `"error"`, or `"native"` for
                the model's own top-k, counted in `stats`.
            microbatch_id: Name of the microbatch; replaying under the same name again drops the
                ids kept for its backward pass.

        Yields:
            The plan.

        Raises:
            ConfigError: Counts or lengths disagree, or an option is not accepted.
            ReplayError: Another block is open, replay is disabled, or the handle is detached; a
                router was called with another number of rows, or by the end of the block not at all.
            TraceFormatError: A trace holds malformed ids.
            TraceMismatchError: A trace is of another model or other tokens, has too many rows, or
                lacks a due row under `on_missing="error"`.

        Runtime: one host-to-device copy of the targets per device (2 * tokens * L * K bytes), then
            no host sync; a router call adds one top-k and two sorts of `[tokens, K]`; keeps
            2 * tokens * K bytes per router until release; not CUDA-graph safe; deterministic;
            differentiable in the router's weights and inputs.
        """
        self._state.check_openable()
        plan = self.plan(traces, layout, token_ids=token_ids, on_missing=on_missing)
        with self._state.open(plan, microbatch_id):
            yield plan

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
            microbatch_id: As given to `replay`.

        Raises:
            ReplayError: No such microbatch is kept, or it is being replayed.
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
        if not self._state.is_attached:
            return
        if not all(forward.is_installed() for forward in self._forwards):
            raise ReplayError(
                "the forward of a router was replaced after attach(); undo that first, then detach()"
            )
        self._state.detach()
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
