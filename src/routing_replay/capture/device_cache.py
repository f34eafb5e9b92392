"""The device cache: where every MoE layer of a step writes the experts it picked."""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.errors import CaptureOverflowError, ConfigError
from routing_replay.kernels import MISSING_ID
from routing_replay.kernels.gather import StepRing, gather_step

__all__ = ["DeviceCache", "RoutingSpec", "StepRows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSpec:
    """What of a model decides the shape of its routing.

    Attributes:
        layer_ids: 0-based decoder layer of each MoE layer, increasing; its length is L.
        num_layers: Decoder layers of the model, dense ones included.
        num_experts: E.
        top_k: K.
    """

    layer_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int

    @property
    def num_moe_layers(self) -> int:
        """L."""
        return len(self.layer_ids)

    @property
    def staging_dtype(self) -> torch.dtype:
        """uint8 where 255 is free to mean a bad id, otherwise int16."""
        return torch.uint8 if self.num_experts <= 255 else torch.int16

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of all layers in `staging_dtype`."""
        return self.num_moe_layers * self.top_k * self.staging_dtype.itemsize


@dataclass(frozen=True, slots=True)
class StepRows:
    """A place for the rows of one step and their flags.

    Attributes:
        rows: uint8 or int16 `[>= n, L, K]` (`RoutingSpec.staging_dtype`).
        flags: uint8 `[>= n]`, `RowFault` bits; 0 is a good row.
    """

    rows: Tensor
    flags: Tensor


class DeviceCache:
    """Routing rows of one step on the device: int16 `[L, N, K]`, layer-major, at static addresses.

    The view of a layer is handed to its fused op as `routing_replay_out`: no copy, no hook. Every row is -1 until a
    layer writes it, and again after `gather`, so that a skipped write can never pass as an older row.

    Args:
        spec: Layers, experts and K of the model.
        num_rows: N, rows of the largest step, padding included.
        device: Where the model runs.

    Raises:
        ConfigError: `num_rows` is not positive.
    """

    def __init__(self, spec: RoutingSpec, *, num_rows: int, device: torch.device) -> None:
        if num_rows < 1:
            raise ConfigError(
                f"num_rows={num_rows}; the device cache needs one row per token of the largest step"
            )
        self.spec = spec
        self.num_rows = num_rows
        shape = (spec.num_moe_layers, num_rows, spec.top_k)
        self._ids = torch.full(shape, MISSING_ID, dtype=torch.int16, device=device)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._ids.device

    def layer(self, moe_layer_idx: int) -> Tensor:
        """Return the contiguous int16 `[N, K]` view of one MoE layer.

        Args:
            moe_layer_idx: Position on the trace's layer axis.

        Returns:
            The view, at an address that never changes.

        Runtime: no sync; no allocation; CUDA-graph safe.
        """
        return self._ids[moe_layer_idx]

    def reset(self) -> None:
        """Return every row to -1, after layers have run outside of a step, or in one that failed.

        Runtime: no sync; no allocation; CUDA-graph safe.
        """
        self._ids.fill_(MISSING_ID)

    def gather(
        self, num_rows: int, *, num_reset: int, out: StepRows, ring: StepRing | None = None
    ) -> None:
        """Take a step's first rows out of the cache, check them, and reset the bucket to -1.

        Args:
            num_rows: n, live rows of the step: cache rows `[0, n)`.
            num_reset: Rows of the step's bucket, padding rows included.
            out: Where rows and flags go, on the device of the cache, from its row 0 on.
            ring: Whose slot they go to, where `out` is in its slot 0; None for `out` itself.

        Raises:
            CaptureOverflowError: The bucket is larger than the cache.
            ConfigError: There are more live rows than rows of the bucket.

        Runtime: no host sync; one launch; no allocation on a GPU; bitwise deterministic.
        """
        if num_reset > self.num_rows:
            raise CaptureOverflowError(
                f"a step of {num_reset} rows does not fit the device cache of {self.num_rows} rows; "
                "raise max_num_batched_tokens, which sizes it"
            )
        if num_rows > num_reset:
            raise ConfigError(
                f"num_rows={num_rows} live rows do not fit num_reset={num_reset}; the bucket of a step holds its live "
                "rows and its padding rows"
            )
        gather_step(
            self._ids,
            num_rows=num_rows,
            num_reset=num_reset,
            rows_out=out.rows,
            flags_out=out.flags,
            num_experts=self.spec.num_experts,
            ring=ring,
        )
