"""The host cache: routing rows of running requests and of the KV blocks that prefix hits read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routing_replay.capture.device_cache import RoutingSpec
from routing_replay.capture.request_rows import GrowingRows, RequestRows, RowView
from routing_replay.capture.row_span import BlockRef, RowPiece
from routing_replay.errors import CaptureError, ConfigError

__all__ = ["HostCache"]


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the rows of a step go among the rows of all blocks.

    Attributes:
        block_ids: int64 `[parts]`, a block and the part of it that the step fills.
        epochs: int64 `[parts]`.
        places: int64 `[rows]`, `block_id * block_size + offset` of each row.
        rows: int64 `[rows]`, the row of the step; None for all in their order.
        counts: int64 `[parts]`, rows of each part; None for one each.
    """

    block_ids: NDArray[np.int64]
    epochs: NDArray[np.int64]
    places: NDArray[np.int64]
    rows: NDArray[np.int64]
    counts: NDArray[np.int64] | None


class HostCache:
    """Rows per request, and rows per life of a physical KV block.

    A prefix hit takes the rows of exactly the blocks that it attends to. A request owns copies, so that two requests
    which computed the same prefix keep their own rows, and rows die with their block.

    One thread writes at a time. Another may meanwhile ask `held_rows`, `count_held`, `num_rows` and whether a request runs, and
    `take` or `view` rows that are here.

    Args:
        spec: Layers, experts and K of the model.
        num_blocks: Blocks of the KV cache.
        block_size: Tokens of a block.
    """

    def __init__(self, spec: RoutingSpec, *, num_blocks: int, block_size: int) -> None:
        self._row_shape = (spec.num_moe_layers, spec.top_k)
        self._dtype = np.dtype(np.uint8 if spec.num_experts <= 255 else np.int16)
        self.block_size = block_size
        self._requests: dict[str, GrowingRows] = {}
        self._row_bytes = spec.row_bytes
        self._make_blocks(num_blocks)

    @property
    def num_requests(self) -> int:
        """Requests that hold rows now."""
        return len(self._requests)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows of all running requests; rows of blocks are not in it, they never grow."""
        return sum(rows.ids.nbytes for rows in self._requests.values())

    def held_rows(self, block: BlockRef) -> NDArray[np.bool_]:
        """Return which rows of this life of a block are here; bool `[block_size]`, a copy."""
        is_current = self._block_epoch[block.block_id] == block.epoch
        return self._block_valid[block.block_id] & is_current

    def count_held(self, prefix: Sequence[BlockRef]) -> int:
        """Return how many leading blocks of a prefix are here with every row.

        Args:
            prefix: Full blocks in token order.

        Returns:
            The position of the first block that is not, or the number of blocks.
        """
        block_ids, epochs = _refs(prefix)
        # The epoch first: rows of a new life are marked after its epoch is set.
        is_held = self._block_epoch[block_ids] == epochs
        is_held &= self._block_valid[block_ids].all(axis=1)
        return len(prefix) if is_held.all() else int(is_held.argmin())

    def begin(
        self,
        request_id: str,
        prefix: Sequence[BlockRef] = (),
        *,
        num_rows: int | None = None,
        num_expected: int = 0,
        allow_missing: bool = False,
    ) -> None:
        """Start a request, with the rows of the KV blocks that it did not compute itself.

        Args:
            request_id: A name that no running request has.
            prefix: The blocks that it attends to, in token order.
            num_rows: Rows to take of them; None for all. Only the last block may be taken in part.
            num_expected: Rows that it will have at least, to make room for.
            allow_missing: Mark rows that are not here as not valid instead of refusing them.

        Raises:
            ConfigError: The request is running already.
            CaptureError: A block holds no rows of that epoch, or not all of them, and `allow_missing` is False.
        """
        if request_id in self._requests:
            raise ConfigError(
                f"request {request_id!r} is running already; pass an id that is not in use"
            )
        rows = GrowingRows(self._row_shape, self._dtype)
        rows.reserve(num_expected)
        total = len(prefix) * self.block_size if num_rows is None else num_rows
        if total:
            block_ids, epochs = _refs(prefix)
            is_current = (self._block_epoch[block_ids] == epochs)[:, None]
            held = (self._block_valid[block_ids] & is_current).reshape(-1)[:total]
            if not held.all() and not allow_missing:
                position = int(held.argmin()) // self.block_size
                wanted = min(self.block_size, total - position * self.block_size)
                raise self._refusal(request_id, prefix[position], wanted)
            ids = self._block_ids[block_ids].reshape(-1, *self._row_shape)
            rows.start_with(ids[:total], held, self._block_version[block_ids].reshape(-1)[:total])
        self._requests[request_id] = rows

    def __contains__(self, request_id: str) -> bool:
        """Return whether a request holds rows, as a preempted one does."""
        return request_id in self._requests

    def num_rows(self, request_id: str) -> int:
        """Return one past the last row of a request, 0 for one that does not run."""
        rows = self._requests.get(request_id)
        return 0 if rows is None else rows.end

    def append(
        self, request_id: str, start: int, ids: NDArray[np.integer], *, weights_version: int
    ) -> None:
        """Add checked rows of a request; rows that it has already are kept as they are.

        A preempted request computes its tokens again: the rows of the pass that its tokens were sampled from stay. Rows
        of a request that does not run are dropped: it was freed while they were on their way.

        Args:
            request_id: The request.
            start: Token index of the first row; rows before it that never came stay invalid.
            ids: `[n, L, K]` in the staging dtype.
            weights_version: Version of the weights that computed the rows.
        """
        rows = self._requests.get(request_id)
        if rows is None:
            return
        first = max(start, rows.end)
        if first < start + len(ids):
            rows.add(first, ids[first - start :], weights_version)

    def append_step(
        self, pieces: Sequence[RowPiece], ids: NDArray[np.integer], *, weights_version: int
    ) -> None:
        """Add the rows of a step to their requests, as `append` does for each.

        Args:
            pieces: What each request keeps of the step.
            ids: `[n, L, K]` in the staging dtype, all rows of the step.
            weights_version: Version of the weights that computed the rows.
        """
        requests = self._requests
        for request_id, start, num_rows, first, _ in pieces:
            rows = requests.get(request_id)
            # A request that decodes adds one row at its end; a step has hundreds of them.
            if num_rows == 1 and rows is not None and rows.takes_next(start, weights_version):
                rows.ids[start] = ids[first]
                rows.end = start + 1
            else:
                at = ids[first : first + num_rows]
                self.append(request_id, start, at, weights_version=weights_version)

    def truncate(self, request_id: str, num_rows: int) -> None:
        """Forget a request's rows of token `num_rows` and later: those of drafts that were not accepted.

        Args:
            request_id: The request; one that does not run is ignored.
            num_rows: Rows that stay.
        """
        rows = self._requests.get(request_id)
        if rows is not None:
            rows.truncate(num_rows)

    def write_blocks(
        self, pieces: Sequence[RowPiece], ids: NDArray[np.integer], *, weights_version: int
    ) -> None:
        """Add the rows of a step to the KV blocks that hold their tokens, all of them at once.

        Rows for an earlier life of a block than the one that is here are dropped.

        Args:
            pieces: What each request keeps of the step.
            ids: `[n, L, K]` in the staging dtype, C-contiguous, all rows of the step.
            weights_version: Version of the weights that computed the rows.
        """
        if not pieces:
            return
        where = self._places(pieces)
        places, rows = where.places, where.rows
        is_old = self._claim(where.block_ids, where.epochs)
        if is_old.any():
            is_late = is_old if where.counts is None else np.repeat(is_old, where.counts)
            places, rows = places[~is_late], rows[~is_late]
        packed = ids.reshape(len(ids), -1).view(self._packed.dtype)[:, 0]
        self._packed[places] = packed if len(rows) == len(ids) else packed[rows]
        self._block_version.reshape(-1)[places] = weights_version
        self._block_valid.reshape(-1)[places] = True

    def copy_block(self, source: BlockRef, target: BlockRef) -> None:
        """Copy the rows of a block whose keys and values are copied, as a fork does.

        Args:
            source: The block that the keys and values come from.
            target: Its copy.
        """
        held = self.held_rows(source)
        block_id = target.block_id
        is_old = self._claim(np.array([block_id]), np.array([target.epoch]))
        if is_old[0]:
            return
        self._block_ids[block_id] = self._block_ids[source.block_id]
        self._block_version[block_id] = self._block_version[source.block_id]
        self._block_valid[block_id] = held

    def take(self, request_id: str, num_rows: int) -> RequestRows:
        """Return a request's first rows, which no longer change.

        Args:
            request_id: A running request.
            num_rows: Rows to return; rows that never came are marked invalid.

        Returns:
            Rows of tokens `[0, num_rows)`.

        Raises:
            CaptureError: The request does not run.
        """
        rows = self._running(request_id)
        return rows.take(num_rows)

    def view(self, request_id: str, start: int, stop: int) -> RowView:
        """Return rows of a request without copying them.

        Args:
            request_id: A running request.
            start: Token index of the first row.
            stop: One past the last one; above `start`.

        Returns:
            Rows of tokens `[start, stop)`; those that are not valid came from a prefix.

        Raises:
            CaptureError: The request does not run, or a row never came.
        """
        rows = self._requests.get(request_id) or self._running(request_id)
        if rows.end < stop:
            raise _lost(request_id, max(start, rows.end))
        found = rows.view(start, stop)
        # Hundreds of requests ask for one row each after every step: nothing is missing there.
        if found.missing.size:
            lost = found.missing[found.missing >= rows.num_prefix]
            if lost.size:
                raise _lost(request_id, int(lost[0]))
        return found

    def free(self, request_id: str) -> None:
        """Forget a request, finished or aborted; unknown ids are ignored.

        Args:
            request_id: The request.
        """
        self._requests.pop(request_id, None)

    def forget_blocks(self) -> None:
        """Forget the rows of all blocks and give their memory back; those of requests stay."""
        self._make_blocks(len(self._block_epoch))

    def _running(self, request_id: str) -> GrowingRows:
        rows = self._requests.get(request_id)
        if rows is None:
            raise CaptureError(
                f"request {request_id!r} holds no rows; it was never begun, or it was freed"
            )
        return rows

    def _make_blocks(self, num_blocks: int) -> None:
        size = self.block_size
        # np.empty is lazily backed: memory is taken as blocks are first written.
        self._block_ids = np.empty((num_blocks, size, *self._row_shape), self._dtype)
        # The same memory with a row as one item: a step's rows are then placed by one copy each.
        self._packed = self._block_ids.reshape(num_blocks * size, -1).view(
            np.dtype((np.void, self._row_bytes))
        )[:, 0]
        self._block_valid = np.zeros((num_blocks, size), np.bool_)
        self._block_version = np.zeros((num_blocks, size), np.int64)
        self._block_epoch = np.full(num_blocks, -1, np.int64)

    def _places(self, pieces: Sequence[RowPiece]) -> _Places:
        size = self.block_size
        if all(piece.num_rows == 1 for piece in pieces):
            starts = np.array([piece.start for piece in pieces], np.int64)
            block_ids, epochs = _refs([piece.blocks[0] for piece in pieces])
            rows = np.array([piece.first for piece in pieces], np.int64)
            return _Places(block_ids, epochs, block_ids * size + starts % size, rows, None)
        block_ids, epochs = _refs([block for piece in pieces for block in piece.blocks])
        spans = [(piece.start, piece.num_rows, piece.first) for piece in pieces]
        num_blocks = np.array([len(piece.blocks) for piece in pieces], np.int64)
        starts, num_rows, firsts = np.repeat(np.array(spans, np.int64), num_blocks, axis=0).T
        lows = np.maximum(starts, (starts // size + _within(num_blocks)) * size)
        counts = np.minimum(starts + num_rows, (lows // size + 1) * size) - lows
        places, rows = block_ids * size + lows % size, firsts + lows - starts
        within = _within(counts)
        places, rows = np.repeat(places, counts) + within, np.repeat(rows, counts) + within
        return _Places(block_ids, epochs, places, rows, counts)

    def _refusal(self, request_id: str, block: BlockRef, num_rows: int) -> CaptureError:
        return CaptureError(
            f"request {request_id!r} hit KV block {block.block_id} of epoch {block.epoch}, but the host cache "
            f"holds {int(self._block_valid[block.block_id].sum())} of {num_rows} rows of epoch "
            f"{int(self._block_epoch[block.block_id])}; reset the prefix cache and send the request again"
        )

    def _claim(self, block_ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Forget the rows of earlier lives of blocks; return which blocks have begun a later life already."""
        current = self._block_epoch[block_ids]
        is_new = current < epochs
        if is_new.any():
            renewed = block_ids[is_new]
            # In this order: who asks meanwhile must not take rows of the old life for those of the new one.
            self._block_valid[renewed] = False
            self._block_epoch[renewed] = epochs[is_new]
        return current > epochs


def _lost(request_id: str, token_idx: int) -> CaptureError:
    return CaptureError(
        f"request {request_id!r}: the routing row of token index {token_idx} never arrived; send the request again and "
        "report this"
    )


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions in groups that follow each other: 0 to its count, less one, for each group."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _refs(blocks: Sequence[BlockRef]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Block ids and epochs."""
    block_ids = np.array([block.block_id for block in blocks], np.int64)
    return block_ids, np.array([block.epoch for block in blocks], np.int64)
