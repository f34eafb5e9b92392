"""What was asked of the host cache and is not done yet, as far as the engine must see through it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from routing_replay.capture.host_cache import HostCache
from routing_replay.capture.row_span import BlockRef, RowPiece
from routing_replay.errors import CaptureError

__all__ = ["PendingWork", "StepTicket"]


@dataclass(slots=True, eq=False)
class StepTicket:
    """A step whose rows are on their way.

    Attributes:
        num_rows: Live rows of the step.
        pieces: What each request keeps of them; without those of failed requests once it is collected.
        weights_version: Version of the weights that ran the step.
        stamp: What its rows must be stamped with; None for those that no graph gathered.
        number: Of the work that gives rows to requests; 0 before it is handed over.
        placed: Of the work that gives them to KV blocks; the same where one does both.
        errors: What `CapturePipeline.errors` returns, once the work is done.
    """

    num_rows: int
    pieces: Sequence[RowPiece]
    weights_version: int
    stamp: int | None = None
    number: int = 0
    placed: int = 0
    errors: dict[str, CaptureError] = field(default_factory=dict[str, CaptureError])


@dataclass(frozen=True, slots=True)
class _Copy:
    number: int
    source: BlockRef
    target: BlockRef

    @property
    def placed(self) -> int:
        return self.number


class PendingWork:
    """The engine's view through work that is not done.

    Only the engine's thread uses it. It holds what is in flight and no more: what is done is dropped at the next call.
    """

    def __init__(self) -> None:
        self._blocks: deque[StepTicket | _Copy] = deque()
        self._requests: dict[str, tuple[int, bool]] = {}
        self._order: deque[tuple[int, str]] = deque()

    def forget(self, num_done: int) -> None:
        """Drop what is done.

        Args:
            num_done: The number of the last work that is done.
        """
        while self._blocks and self._blocks[0].placed <= num_done:
            self._blocks.popleft()
        while self._order and self._order[0][0] <= num_done:
            number, request_id = self._order.popleft()
            if self._requests[request_id][0] == number:
                del self._requests[request_id]

    def add_step(self, ticket: StepTicket) -> None:
        """Note a step.

        Args:
            ticket: The step.
        """
        self._blocks.append(ticket)

    def add_copy(self, number: int, source: BlockRef, target: BlockRef) -> None:
        """Note a copy of a block's rows.

        Args:
            number: Of the work.
            source: Where the rows are.
            target: Where they will be.
        """
        self._blocks.append(_Copy(number, source, target))

    def add_change(self, number: int, request_id: str, *, is_running: bool) -> None:
        """Note a request's begin, free or truncation.

        Args:
            number: Of the work.
            request_id: The request.
            is_running: Whether it holds rows afterwards.
        """
        self._requests[request_id] = (number, is_running)
        self._order.append((number, request_id))

    def is_running(self, request_id: str) -> bool | None:
        """Return whether a request will hold rows, None if nothing changes that.

        Args:
            request_id: The request.

        Returns:
            The state after all work.
        """
        change = self._requests.get(request_id)
        return None if change is None else change[1]

    def last_number(self, request_id: str, num_rows: int | None = None) -> int:
        """Return the last work that a request's rows depend on.

        Args:
            request_id: The request.
            num_rows: Only its first rows count; None for all.

        Returns:
            The number, 0 if there is none.
        """
        number = self._requests.get(request_id, (0, False))[0]
        for item in reversed(self._blocks):
            if item.number <= number:
                break
            if isinstance(item, StepTicket) and any(
                piece.request_id == request_id and (num_rows is None or piece.start < num_rows)
                for piece in item.pieces
            ):
                return item.number
        return number

    def will_hold(self, block: BlockRef, host_cache: HostCache, num_done: int) -> bool:
        """Return whether every row of a block is here or on its way.

        Args:
            block: A full block.
            host_cache: What is here.
            num_done: The number of the last work that is done, read before this call.

        Returns:
            Whether a request that begins now will find them, if the steps in flight are good.
        """
        todo = [item for item in self._blocks if item.placed > num_done]
        return bool(_rows_after(block, todo, len(todo), host_cache).all())


def _rows_after(
    block: BlockRef, todo: Sequence[StepTicket | _Copy], count: int, host_cache: HostCache
) -> NDArray[np.bool_]:
    """Which rows of a block are here once the first `count` things to do are done."""
    size = host_cache.block_size
    held = host_cache.held_rows(block)
    for index, item in enumerate(todo[:count]):
        if isinstance(item, _Copy):
            if item.target == block:
                held = _rows_after(item.source, todo, index, host_cache)
            continue
        for piece in item.pieces:
            for position, target in enumerate(piece.blocks):
                if target == block:
                    base = (piece.start // size + position) * size
                    end = piece.start + piece.num_rows - base
                    held[max(piece.start - base, 0) : end] = True
    return held
