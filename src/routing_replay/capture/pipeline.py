"""From the device cache to the host cache: gather a step's rows, check them, hand them to their requests."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import numpy as np

from routing_replay.capture.captured_rows import CapturedRows
from routing_replay.capture.device_cache import DeviceCache
from routing_replay.capture.executor import Executor, InlineExecutor, ThreadExecutor
from routing_replay.capture.host_cache import HostCache
from routing_replay.capture.host_side import HostSide
from routing_replay.capture.pending import PendingWork, StepTicket
from routing_replay.capture.request_rows import RowView
from routing_replay.capture.row_span import BlockRef, RowSpan, pieces_of
from routing_replay.capture.staging import Staging, make_staging
from routing_replay.errors import CaptureError, ConfigError

__all__ = ["CapturePipeline", "CaptureStats", "UncachedPrefix"]

# From so many rows on, a step's requests do not wait for its rows to be copied to KV blocks as well.
_MANY_ROWS = 256


class UncachedPrefix(StrEnum):
    """What happens when a prompt hits KV blocks whose rows are not here."""

    RECOMPUTE = "recompute"
    """Use only the part of the prefix whose rows are here, and compute the rest."""

    MISSING = "missing"
    """Use all of it; the trace marks the rows that are not here as not valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureStats:
    """What capture has done so far.

    Attributes:
        steps: Steps submitted.
        rows: Their live rows.
        bytes_copied: Bytes of rows and flags brought to the host.
        full_ring_waits: How often a step had to wait for a slot.
        full_ring_seconds: How long, in all.
        host_seconds: CPU time of the host's work on steps, waiting not counted.
    """

    steps: int
    rows: int
    bytes_copied: int
    full_ring_waits: int
    full_ring_seconds: float
    host_seconds: float


class CapturePipeline:
    """Carries the rows of every step to the requests that they belong to.

    On a GPU the rows of a step leave by a stream of their own into a ring of pinned slots, and a thread takes them from
    there; on a CPU all is done before a call returns. Either way the calls take effect in their order, and one thread
    makes them. If the thread that collects ends, every later call but `close` and `stats` raises `CaptureError`.

    Args:
        device_cache: Where the layers write.
        host_cache: Where rows of requests and blocks are kept.
        uncached_prefix: What happens when a prompt hits KV blocks whose rows are not here.
        num_slots: Steps that may be on their way at once on a GPU; 2 suffice for an engine that is one step ahead.
        staging: How rows come to the host; None for the ring or, on a CPU, the slot of `device_cache`.

    Raises:
        ConfigError: `num_slots` is not positive.
    """

    def __init__(
        self,
        device_cache: DeviceCache,
        host_cache: HostCache,
        *,
        uncached_prefix: UncachedPrefix = UncachedPrefix.RECOMPUTE,
        num_slots: int = 4,
        staging: Staging | None = None,
    ) -> None:
        if num_slots < 1:
            raise ConfigError(f"num_slots={num_slots}; accepted is 1 or more")
        self.device_cache = device_cache
        self.host_cache = host_cache
        self._allow_missing = uncached_prefix is UncachedPrefix.MISSING
        self.staging = make_staging(device_cache, num_slots) if staging is None else staging
        self._executor: Executor = (
            ThreadExecutor() if self.staging.is_asynchronous else InlineExecutor()
        )
        self._host_side = HostSide(
            device_cache.spec, host_cache, self.staging, allow_missing=self._allow_missing
        )
        self._pending = PendingWork()
        self._last_of_slot = [0] * self.staging.num_slots
        self._num_steps = self._num_rows = self._num_bytes = self._num_waits = 0
        self._waited_seconds = 0.0

    @property
    def stats(self) -> CaptureStats:
        """What capture has done so far."""
        return CaptureStats(
            steps=self._num_steps,
            rows=self._num_rows,
            bytes_copied=self._num_bytes,
            full_ring_waits=self._num_waits,
            full_ring_seconds=self._waited_seconds,
            host_seconds=self._host_side.seconds,
        )

    def claim_step(self) -> int:
        """Wait until the slot of the next step is free.

        Returns:
            The step's number, for the input of a recorded `staging.gather`; `submit` is for the same one.

        Raises:
            CaptureError: The thread that collects has ended.

        Runtime: waits on the host, and counts it, only while every slot is on its way.
        """
        self._wait_for(self._num_steps % self.staging.num_slots)
        return self._num_steps

    def submit(
        self,
        spans: Sequence[RowSpan],
        *,
        num_reset: int,
        weights_version: int,
        is_gathered: bool = False,
    ) -> StepTicket:
        """Take the rows of a step whose launch has just been made, on the stream of its launch.

        A request with a bad row gets none of its rows of the step, nor of later ones: it has failed. Rows of a request
        that was freed meanwhile are dropped.

        Args:
            spans: The requests of the step; their rows lie one after another from cache row 0 on. What they hold may
                change as soon as this returns.
            num_reset: Rows of the step's bucket, padding rows included.
            weights_version: Version of the weights that ran the step.
            is_gathered: The step is a graph with `staging.gather` in it, given the number of `claim_step`; that it did gather is
                checked when the rows arrive.

        Returns:
            The step, for `errors`.

        Raises:
            CaptureOverflowError: The bucket is larger than the device cache.
            ConfigError: More live rows than the bucket has, or blocks that do not hold a span's tokens.
            CaptureError: The thread that collects has ended.

        Runtime: the forward stream gets one kernel and one event and never waits; no allocation on the GPU. Waits on
            the host, and counts it, only while every slot is on its way.
        """
        pieces, num_rows = pieces_of(spans, self.host_cache.block_size)
        number = self.claim_step()
        slot = number % self.staging.num_slots
        if is_gathered:
            self.staging.send(slot, num_rows, num_reset)
        else:
            self.staging.launch(slot, num_rows, num_reset)
        ticket = StepTicket(num_rows, pieces, weights_version, number if is_gathered else None)
        self._hand_over(ticket, slot)
        self._last_of_slot[slot] = ticket.placed
        if not self._executor.is_inline:
            self._pending.forget(self._executor.num_done)
            self._pending.add_step(ticket)
        self._num_steps += 1
        self._num_rows += num_rows
        self._num_bytes += num_rows and num_rows * self.device_cache.spec.row_bytes + num_reset
        return ticket

    def errors(self, ticket: StepTicket) -> dict[str, CaptureError]:
        """Wait for a step's rows, and say which requests have failed.

        Args:
            ticket: From `submit`.

        Returns:
            An error for every request of the step that has a bad row, in this step or an earlier one, or that began
            with rows of its prefix not here.

        Raises:
            CaptureError: The thread that collects has ended.
        """
        self._executor.wait(ticket.number)
        return ticket.errors

    def num_usable_blocks(self, prefix: Sequence[BlockRef]) -> int:
        """Return how many leading blocks of a prefix hit may be used.

        Args:
            prefix: Full blocks in token order.

        Returns:
            All of them, or under `UncachedPrefix.RECOMPUTE` those before the first whose rows are neither here nor on
            their way.
        """
        if self._allow_missing or not prefix:
            return len(prefix)
        if self._executor.is_inline:
            return self.host_cache.count_held(prefix)
        num_done = self._executor.num_done
        count = self.host_cache.count_held(prefix)
        while count < len(prefix) and self._pending.will_hold(
            prefix[count], self.host_cache, num_done
        ):
            count += 1
        return count

    def begin(
        self,
        request_id: str,
        prefix: Sequence[BlockRef],
        num_rows: int,
        *,
        num_expected: int = 0,
    ) -> None:
        """Start a request with the rows that it did not compute itself; a preempted one keeps those it has.

        A prefix whose rows are not here fails the request: `errors` of its first step, and `finish`, say so.

        Args:
            request_id: The request.
            prefix: The KV blocks that it attends to without having computed them, in token order.
            num_rows: Their tokens.
            num_expected: Rows that it will have at least: room is made while the device computes them.

        Raises:
            CaptureError: The thread that collects has ended.
        """
        if not self._is_running(request_id):
            work = partial(self._host_side.begin, request_id, tuple(prefix), num_rows, num_expected)
            self._change(request_id, self._executor.run(work), is_running=True)

    def truncate(self, request_id: str, num_rows: int) -> None:
        """Forget a request's rows from `num_rows` on: drafts that were not accepted are computed again as other tokens.

        Args:
            request_id: The request.
            num_rows: Rows that stay.

        Raises:
            CaptureError: The thread that collects has ended.
        """
        work = partial(self._host_side.truncate, request_id, num_rows)
        self._change(request_id, self._executor.run(work), is_running=self._is_running(request_id))

    def copy_block(self, source: BlockRef, target: BlockRef) -> None:
        """Copy the rows of a block whose keys and values are copied, as a fork does.

        Args:
            source: The block that the keys and values come from.
            target: Its copy.

        Raises:
            CaptureError: The thread that collects has ended.
        """
        number = self._executor.run(partial(self._host_side.copy_block, source, target))
        if not self._executor.is_inline:
            self._pending.add_copy(number, source, target)

    def num_rows(self, request_id: str) -> int:
        """Wait for a request's rows that are on their way, and return how many it has.

        Args:
            request_id: The request.

        Returns:
            One past its last row, 0 for one that never began.

        Raises:
            CaptureError: The thread that collects has ended.
        """
        self._executor.wait(self._pending.last_number(request_id))
        return self.host_cache.num_rows(request_id)

    def finish(self, request_id: str, token_ids: Sequence[int]) -> CapturedRows:
        """Take the rows of a request that has ended; waits for its own rows, not for later steps.

        Args:
            request_id: The request; call `free` afterwards.
            token_ids: All its tokens; the last one was never an input and has no row. Rows past them are not returned.

        Returns:
            `len(token_ids) - 1` rows, whose `trace` has for each the version of the weights that computed it. It
            is complete except, under `UncachedPrefix.MISSING`, for rows of a prefix hit that were not here.

        Raises:
            CaptureError: The request has failed, a row never arrived, or the thread that collects has ended.
        """
        num_rows = len(token_ids) - 1
        self._executor.wait(self._pending.last_number(request_id, num_rows))
        failure = self._host_side.failed.get(request_id)
        if failure is not None:
            raise failure
        rows = self.host_cache.take(request_id, num_rows)
        missing = np.flatnonzero(~rows.valid)
        lost = missing[missing >= rows.num_prefix]
        if lost.size:
            raise CaptureError(
                f"request {request_id!r}: {len(lost)} of {len(rows.valid)} routing rows never arrived, the first "
                f"for token index {lost[0]}; send the request again and report this"
            )
        return CapturedRows(self.device_cache.spec, token_ids, rows)

    def view(self, request_id: str, start: int, stop: int) -> RowView:
        """Look at rows of a running request, without waiting and without a copy.

        Args:
            request_id: The request.
            start: Token index of the first row.
            stop: One past the last one; every step up to it must have been asked for its `errors`.

        Returns:
            Rows of tokens `[start, stop)`; those that are not valid are of a prefix hit under `UncachedPrefix.MISSING`.

        Raises:
            CaptureError: The request has failed before these rows, or one never arrived.
        """
        failed = self._host_side.failed
        if request_id in failed and self.host_cache.num_rows(request_id) < stop:
            raise failed[request_id]
        return self.host_cache.view(request_id, start, stop)

    def free(self, request_id: str) -> None:
        """Forget a request, finished, failed or aborted; rows that are still on their way are dropped.

        Args:
            request_id: The request; one that does not run is ignored.

        Raises:
            CaptureError: The thread that collects has ended.
        """
        number = self._executor.run(partial(self._host_side.free, request_id))
        self._change(request_id, number, is_running=False)

    def forget_blocks(self) -> None:
        """Wait for all rows that are on their way, and forget those of all KV blocks; those of requests stay.

        Raises:
            CaptureError: The thread that collects has ended.
        """
        self._executor.wait(self._executor.run(self._host_side.forget_blocks))
        self._pending.forget(self._executor.num_done)

    def drain(self) -> None:
        """Wait until all rows are where they belong.

        Raises:
            CaptureError: The thread that collects has ended.
        """
        self._executor.wait(self._executor.run(_nothing))

    def close(self) -> None:
        """Do what was asked for, and end the thread."""
        self._executor.close()

    def _is_running(self, request_id: str) -> bool:
        will_run = self._pending.is_running(request_id)
        return self._host_side.is_known(request_id) if will_run is None else will_run

    def _hand_over(self, ticket: StepTicket, slot: int) -> None:
        """Let the host take a step's rows from a slot."""
        host_side = self._host_side
        if ticket.num_rows < _MANY_ROWS:
            work = partial(host_side.collect_and_place, ticket, slot)
            ticket.number = ticket.placed = self._executor.run(work)
        else:
            ticket.number = self._executor.run(partial(host_side.collect, ticket, slot))
            ticket.placed = self._executor.run(partial(host_side.place, ticket, slot))

    def _change(self, request_id: str, number: int, *, is_running: bool) -> None:
        if not self._executor.is_inline:
            self._pending.forget(self._executor.num_done)
            self._pending.add_change(number, request_id, is_running=is_running)

    def _wait_for(self, slot: int) -> None:
        """Wait until the rows that a slot held last are where they belong."""
        number = self._last_of_slot[slot]
        if self._executor.num_done >= number:
            return
        started = time.perf_counter()
        self._executor.wait(number)
        self._num_waits += 1
        self._waited_seconds += time.perf_counter() - started


def _nothing() -> None:
    """Take a place in the order."""
