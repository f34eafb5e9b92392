"""The replay buffer: the experts that a step's tokens are forced to."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routing_replay.capture.device_cache import RoutingSpec
from routing_replay.errors import CaptureOverflowError, ConfigError
from routing_replay.kernels import MISSING_ID

__all__ = ["ReplayBuffer"]


class _PinnedSlot:
    """Pinned memory for the rows of one step, and when it may be written again."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.rows = torch.empty(shape, dtype=torch.int16, pin_memory=True)
        self.array = self.rows.numpy()
        self.was_read = torch.cuda.Event(blocking=True)


class ReplayBuffer:
    """Ids to force, int16 `[L, N, K]` at static addresses; -1 in every row that routes natively.

    Args:
        spec: Layers, experts and K of the model.
        num_rows: N, rows of the largest step.
        device: Where the model runs.
        num_slots: Steps whose rows may be on their way to a GPU at once.
    """

    def __init__(
        self, spec: RoutingSpec, *, num_rows: int, device: torch.device, num_slots: int = 2
    ) -> None:
        self._row_shape = (spec.num_moe_layers, spec.top_k)
        shape = (spec.num_moe_layers, num_rows, spec.top_k)
        self._ids = torch.full(shape, MISSING_ID, dtype=torch.int16, device=device)
        self._num_filled = 0
        self._slots: list[_PinnedSlot] = []
        self._next_slot = 0
        if device.type == "cuda":
            by_row = (num_rows, *self._row_shape)
            self._slots = [_PinnedSlot(by_row) for _ in range(num_slots)]
            # Copies and kernels of a stream run in order, so that one place on the device serves all steps.
            self._arrived = torch.empty(by_row, dtype=torch.int16, device=device)

    def layer(self, moe_layer_idx: int) -> Tensor:
        """Return the contiguous int16 `[N, K]` view of one MoE layer.

        Args:
            moe_layer_idx: Position on the trace's layer axis.

        Returns:
            The view, at an address that never changes.

        Runtime: no sync; no allocation; CUDA-graph safe.
        """
        return self._ids[moe_layer_idx]

    def fill(self, rows: NDArray[np.int16]) -> None:
        """Set the ids of a step and return all other rows to native.

        Args:
            rows: int16 `[n, L, K]`, one row per token of the step, -1 in native rows; none for a native step. It may
                be changed as soon as this returns.

        Raises:
            ConfigError: Another dtype or shape.
            CaptureOverflowError: More rows than the buffer has.

        Runtime: on a GPU asynchronous on the current stream, in order with the step that is launched next; no
            allocation; waits on the host only while the rows of `num_slots` earlier steps have not left.
        """
        self._check(rows)
        num_rows = len(rows)
        if num_rows:
            source = self._upload(rows) if self._slots else torch.from_numpy(rows)
            self._ids[:, :num_rows].copy_(source.transpose(0, 1))
        if num_rows < self._num_filled:
            self._ids[:, num_rows : self._num_filled].fill_(MISSING_ID)
        self._num_filled = num_rows

    def _upload(self, rows: NDArray[np.int16]) -> Tensor:
        """Send rows to the device through the next slot; return where they arrive."""
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        slot.was_read.synchronize()
        num_rows = len(rows)
        slot.array[:num_rows] = rows
        arrived = self._arrived[:num_rows]
        arrived.copy_(slot.rows[:num_rows], non_blocking=True)
        slot.was_read.record()
        return arrived

    def _check(self, rows: NDArray[np.int16]) -> None:
        if rows.dtype != np.int16 or rows.shape[1:] != self._row_shape:
            raise ConfigError(
                f"rows is {rows.dtype} {list(rows.shape)}; accepted is int16 [n, {self._row_shape[0]}, "
                f"{self._row_shape[1]}], -1 in native rows"
            )
        if len(rows) > self._ids.shape[1]:
            raise CaptureOverflowError(
                f"a step of {len(rows)} rows does not fit the replay buffer of {self._ids.shape[1]} rows; raise "
                "max_num_batched_tokens, which sizes it"
            )
