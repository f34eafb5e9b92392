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
    """

    ids: NDArray[np.integer]
    valid: NDArray[np.bool_]


class _Rows:
    """A growing `[rows, L, K]` array with a validity mask; capacity doubles, so appending is linear in total."""

    def __init__(self, row_shape: tuple[int, int], dtype: np.dtype) -> None:
        self.ids = np.empty((_FIRST_CAPACITY, *row_shape), dtype)
        self.valid = np.zeros(_FIRST_CAPACITY, np.bool_)
        self.end = 0

    def write(self, start: int, ids: NDArray[np.integer], valid: NDArray[np.bool_]) -> None:
        end = start + len(ids)
        if end > len(self.ids):
            capacity = max(end, 2 * len(self.ids))
            grown = np.empty((capacity, *self.ids.shape[1:]), self.ids.dtype)
            grown[: self.end] = self.ids[: self.end]
            mask = np.zeros(capacity, np.bool_)
            mask[: self.end] = self.valid[: self.end]
            self.ids, self.valid = grown, mask
        self.ids[start:end] = ids
        self.valid[start:end] = valid
        self.end = max(self.end, end)


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
        self._block_epoch = np.full(num_blocks, -1, np.int64)

    @property
    def num_requests(self) -> int:
        """Requests that hold rows now."""
        return len(self._requests)

    def begin(self, request_id: str, prefix: Sequence[BlockRef] = ()) -> None:
        """Start a request, with the rows of the KV blocks that its prompt hit.

        Args:
            request_id: A name that no running request has.
            prefix: The blocks hit, in token order, each full.

        Raises:
            ConfigError: The request is running already.
            CaptureError: A block holds no rows of that epoch, or not all of them.
        """
        if request_id in self._requests:
            raise ConfigError(
                f"request {request_id!r} is running already; pass an id that is not in use"
            )
        rows = _Rows(self._row_shape, self._dtype)
        for position, block in enumerate(prefix):
            epoch = int(self._block_epoch[block.block_id])
            if epoch != block.epoch or not self._block_valid[block.block_id].all():
                raise CaptureError(
                    f"request {request_id!r} hit KV block {block.block_id} of epoch {block.epoch}, but the host cache "
                    f"holds {int(self._block_valid[block.block_id].sum())} of {self._block_size} rows of epoch {epoch}; "
                    "reset the prefix cache and send the request again"
                )
            ids, valid = self._block_ids[block.block_id], self._block_valid[block.block_id]
            rows.write(position * self._block_size, ids, valid)
        self._requests[request_id] = rows

    def append(self, request_id: str, start: int, ids: NDArray[np.integer]) -> None:
        """Add checked rows of a running request.

        Args:
            request_id: A running request.
            start: Token index of the first row; rows before it that never came stay invalid.
            ids: `[n, L, K]` in the staging dtype.
        """
        self._requests[request_id].write(start, ids, np.ones(len(ids), np.bool_))

    def write_blocks(
        self, blocks: Sequence[BlockRef], start: int, ids: NDArray[np.integer]
    ) -> None:
        """Add the same rows to the KV blocks that hold their tokens.

        Args:
            blocks: All blocks of the request, in token order.
            start: Token index of the first row.
            ids: `[n, L, K]` in the staging dtype.
        """
        for first in range(start - start % self._block_size, start + len(ids), self._block_size):
            block = blocks[first // self._block_size]
            if self._block_epoch[block.block_id] != block.epoch:
                self._block_epoch[block.block_id] = block.epoch
                self._block_valid[block.block_id] = False
            low, high = max(first, start), min(first + self._block_size, start + len(ids))
            self._block_ids[block.block_id, low - first : high - first] = ids[
                low - start : high - start
            ]
            self._block_valid[block.block_id, low - first : high - first] = True

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
        valid = np.zeros(num_rows, np.bool_)
        count = min(num_rows, rows.end)
        ids[:count], valid[:count] = rows.ids[:count], rows.valid[:count]
        return RequestRows(ids, valid)

    def free(self, request_id: str) -> None:
        """Forget a request, finished or aborted; unknown ids are ignored.

        Args:
            request_id: The request.
        """
        self._requests.pop(request_id, None)
