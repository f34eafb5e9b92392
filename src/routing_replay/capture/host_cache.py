"""The host cache: routing rows of running requests and of the KV blocks that prefix hits read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routing_replay.capture.device_cache import RoutingSpec
from routing_replay.errors import CaptureError, ConfigError

__all__ = ["BlockRef", "HostCache", "RequestRows"]

_FIRST_CAPACITY = 64


@dataclass(frozen=True, slots=True)
class BlockRef:
    """One life of a physical KV block.

    Attributes:
        block_id: Index of the block in the KV cache.
        epoch: Advances whenever the block is given to new tokens.
    """

    block_id: int
    epoch: int


@dataclass(frozen=True, slots=True)
class RequestRows:
    """The rows of one request, from token 0 on.

    Attributes:
        ids: `[rows, L, K]`, a copy in the staging dtype.
        valid: bool `[rows]`; False where no layer's ids arrived.
        weights_version: int64 `[rows]`, the version of the weights that computed each row; 0 where not valid.
        num_prefix: How many rows came from the KV blocks of a prefix hit.
    """

    ids: NDArray[np.integer]
    valid: NDArray[np.bool_]
    weights_version: NDArray[np.int64]
    num_prefix: int


class _Rows:
    """A growing `[rows, L, K]` array with a validity mask; capacity doubles, so appending is linear in total."""

    def __init__(self, row_shape: tuple[int, int], dtype: np.dtype) -> None:
        self.ids = np.empty((_FIRST_CAPACITY, *row_shape), dtype)
        self.valid = np.zeros(_FIRST_CAPACITY, np.bool_)
        self.versions = np.zeros(_FIRST_CAPACITY, np.int64)
        self.end = 0
        self.num_prefix = 0

    def write(
        self,
        start: int,
        ids: NDArray[np.integer],
        valid: NDArray[np.bool_] | bool,
        version: NDArray[np.int64] | int,
    ) -> None:
        end = start + len(ids)
        if end > len(self.ids):
            self._grow(max(end, 2 * len(self.ids)))
        self.ids[start:end] = ids
        self.valid[start:end] = valid
        self.versions[start:end] = version
        self.end = max(self.end, end)

    def _grow(self, capacity: int) -> None:
        ids = np.empty((capacity, *self.ids.shape[1:]), self.ids.dtype)
        valid, versions = np.zeros(capacity, np.bool_), np.zeros(capacity, np.int64)
        count = self.end
        ids[:count], valid[:count] = self.ids[:count], self.valid[:count]
        versions[:count] = self.versions[:count]
        self.ids, self.valid, self.versions = ids, valid, versions


class HostCache:
    """Rows per request, and rows per life of a physical KV block.

    A prefix hit takes the rows of exactly the blocks that it attends to. A request owns copies, so that two requests
    which computed the same prefix keep their own rows, and rows die with their block.

    Args:
        spec: Layers, experts and K of the model.
        num_blocks: Blocks of the KV cache.
        block_size: Tokens of a block.
    """

    def __init__(self, spec: RoutingSpec, *, num_blocks: int, block_size: int) -> None:
        self._row_shape = (spec.num_moe_layers, spec.top_k)
        self._dtype = np.dtype(np.uint8 if spec.num_experts <= 255 else np.int16)
        self._block_size = block_size
        self._requests: dict[str, _Rows] = {}
        # np.empty is lazily backed: memory is taken as blocks are first written.
        self._block_ids = np.empty((num_blocks, block_size, *self._row_shape), self._dtype)
        self._block_valid = np.zeros((num_blocks, block_size), np.bool_)
        self._block_version = np.zeros((num_blocks, block_size), np.int64)
        self._block_epoch = np.full(num_blocks, -1, np.int64)

    @property
    def num_requests(self) -> int:
        """Requests that hold rows now."""
        return len(self._requests)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows of all running requests; rows of blocks are not in it, they never grow."""
        return sum(rows.ids.nbytes for rows in self._requests.values())

    def holds(self, block: BlockRef) -> bool:
        """Return whether every row of a full block is here, for this life of the block."""
        return bool(self._held(block).all())

    def begin(
        self,
        request_id: str,
        prefix: Sequence[BlockRef] = (),
        *,
        num_rows: int | None = None,
        allow_missing: bool = False,
    ) -> None:
        """Start a request, with the rows of the KV blocks that it did not compute itself.

        Args:
            request_id: A name that no running request has.
            prefix: The blocks that it attends to, in token order.
            num_rows: Rows to take of them; None for all. Only the last block may be taken in part.
            allow_missing: Mark rows that are not here as not valid instead of refusing them.

        Raises:
            ConfigError: The request is running already.
            CaptureError: A block holds no rows of that epoch, or not all of them, and `allow_missing` is False.
        """
        if request_id in self._requests:
            raise ConfigError(
                f"request {request_id!r} is running already; pass an id that is not in use"
            )
        rows = _Rows(self._row_shape, self._dtype)
        total = len(prefix) * self._block_size if num_rows is None else num_rows
        for position, block in enumerate(prefix):
            start = position * self._block_size
            count = min(self._block_size, total - start)
            held = self._held(block)[:count]
            if not held.all() and not allow_missing:
                raise CaptureError(
                    f"request {request_id!r} hit KV block {block.block_id} of epoch {block.epoch}, but the host cache "
                    f"holds {int(self._block_valid[block.block_id].sum())} of {count} rows of epoch "
                    f"{int(self._block_epoch[block.block_id])}; reset the prefix cache and send the request again"
                )
            where = (block.block_id, slice(count))
            rows.write(start, self._block_ids[where], held, self._block_version[where])
        rows.num_prefix = rows.end
        self._requests[request_id] = rows

    def is_running(self, request_id: str) -> bool:
        """Return whether a request holds rows, as a preempted one does."""
        return request_id in self._requests

    def num_rows(self, request_id: str) -> int:
        """Return one past the last row of a request, 0 for one that does not run."""
        return self._requests[request_id].end if request_id in self._requests else 0

    def append(
        self, request_id: str, start: int, ids: NDArray[np.integer], *, weights_version: int
    ) -> None:
        """Add checked rows of a running request; rows that it has already are kept as they are.

        A preempted request computes its tokens again: the rows of the pass that its tokens were sampled from stay.

        Args:
            request_id: A running request.
            start: Token index of the first row; rows before it that never came stay invalid.
            ids: `[n, L, K]` in the staging dtype.
            weights_version: Version of the weights that computed the rows.
        """
        rows = self._requests[request_id]
        first = max(start, rows.end)
        if first < start + len(ids):
            rows.write(first, ids[first - start :], True, weights_version)

    def write_blocks(
        self,
        pieces: Sequence[tuple[Sequence[BlockRef], int, int]],
        ids: NDArray[np.integer],
        *,
        weights_version: int,
    ) -> None:
        """Add the rows of a step to the KV blocks that hold their tokens, all of them at once.

        Args:
            pieces: For each request its blocks, in token order, the token index of its first row, and its rows.
            ids: `[n, L, K]` in the staging dtype, the pieces' rows one after another.
            weights_version: Version of the weights that computed the rows.
        """
        size = self._block_size
        parts: list[tuple[int, int, int, int]] = []  # block, epoch, first row in the block, rows
        for blocks, start, num_rows in pieces:
            end = start + num_rows
            for index in range(start // size, -(-end // size)):
                low, high = max(index * size, start), min((index + 1) * size, end)
                block = blocks[index]
                parts.append((block.block_id, block.epoch, low - index * size, high - low))
        if not parts:
            return
        block_ids, epochs, firsts, counts = np.array(parts, np.int64).T
        self._claim(block_ids, epochs)
        rows_before = np.cumsum(counts) - counts
        offsets = np.arange(len(ids)) + np.repeat(firsts - rows_before, counts)
        where = (np.repeat(block_ids, counts), offsets)
        self._block_ids[where] = ids
        self._block_valid[where] = True
        self._block_version[where] = weights_version

    def copy_block(self, source: BlockRef, target: BlockRef) -> None:
        """Copy the rows of a block whose keys and values are copied, as a fork does.

        Args:
            source: The block that the keys and values come from.
            target: Its copy.
        """
        held = self._held(source)
        block_id = target.block_id
        self._claim(np.array([block_id]), np.array([target.epoch]))
        self._block_ids[block_id] = self._block_ids[source.block_id]
        self._block_valid[block_id] = held
        self._block_version[block_id] = self._block_version[source.block_id]

    def take(self, request_id: str, num_rows: int) -> RequestRows:
        """Return a copy of a request's first rows.

        Args:
            request_id: A running request.
            num_rows: Rows to return; rows that never came are marked invalid.

        Returns:
            Rows of tokens `[0, num_rows)`.
        """
        rows = self._requests[request_id]
        ids = np.zeros((num_rows, *self._row_shape), self._dtype)
        valid, versions = np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.int64)
        count = min(num_rows, rows.end)
        ids[:count], valid[:count] = rows.ids[:count], rows.valid[:count]
        versions[:count] = rows.versions[:count]
        return RequestRows(ids, valid, versions, min(rows.num_prefix, num_rows))

    def free(self, request_id: str) -> None:
        """Forget a request, finished or aborted; unknown ids are ignored.

        Args:
            request_id: The request.
        """
        self._requests.pop(request_id, None)

    def _held(self, block: BlockRef) -> NDArray[np.bool_]:
        """Which rows of this life of a block are here; bool `[block_size]`."""
        is_current = self._block_epoch[block.block_id] == block.epoch
        return self._block_valid[block.block_id] & is_current

    def _claim(self, block_ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> None:
        """Forget the rows of earlier lives of blocks."""
        is_stale = self._block_epoch[block_ids] != epochs
        if is_stale.any():
            stale = block_ids[is_stale]
            self._block_epoch[stale] = epochs[is_stale]
            self._block_valid[stale] = False
