"""The replay buffer: the experts that a step's tokens are forced to."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routing_replay.capture.device_cache import RoutingSpec
from routing_replay.kernels import MISSING_ID

__all__ = ["ReplayBuffer"]


class ReplayBuffer:
    """Ids to force, int16 `[L, N, K]` at static addresses; -1 in every row that routes natively.

    Args:
        spec: Layers, experts and K of the model.
        num_rows: N, rows of the largest step.
        device: Where the model runs.
    """

    def __init__(self, spec: RoutingSpec, *, num_rows: int, device: torch.device) -> None:
        shape = (spec.num_moe_layers, num_rows, spec.top_k)
        self._ids = torch.full(shape, MISSING_ID, dtype=torch.int16, device=device)
        self._num_filled = 0

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
            rows: int16 `[n, L, K]`, one row per token of the step, -1 in native rows.

        Runtime: one host-to-device copy; allocates the transposed rows.
        """
        num_rows = len(rows)
        self._ids[:, :num_rows] = torch.from_numpy(rows).to(self._ids.device).transpose(0, 1)
        self._ids[:, num_rows : self._num_filled] = MISSING_ID
        self._num_filled = num_rows
