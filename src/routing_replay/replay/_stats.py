"""What was replayed, counted per layer without a host sync."""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.replay._plan import ReplayPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReplayStats:
    """Counts of one router since `attach`; recomputed forwards count only as recomputations.

    Attributes:
        layer_idx: Decoder layer.
        calls: Forward passes inside a `replay` or `record` block.
        recomputations: Forward passes repeated by activation checkpointing, with the same experts.
        rows_replayed: Rows that took the given experts.
        rows_native_last: Last tokens of sequences that routed natively; they are not due.
        rows_native_missing: Due rows that routed natively because no trace has them.
        rows_mismatched: Replayed rows in which the model by itself would have picked another set.
    """

    layer_idx: int
    calls: int
    recomputations: int
    rows_replayed: int
    rows_native_last: int
    rows_native_missing: int
    rows_mismatched: int

    @property
    def rows_due(self) -> int:
        """Rows that a sampled token depends on, plus last rows that a trace has."""
        return self.rows_replayed + self.rows_native_missing

    @property
    def coverage(self) -> float:
        """Share of due rows that were replayed, in [0, 1]; NaN before the first."""
        return _share(self.rows_replayed, self.rows_due)

    @property
    def mismatch(self) -> float:
        """Share of replayed rows whose native expert set differs, in [0, 1]; NaN before the first."""
        return _share(self.rows_mismatched, self.rows_replayed)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayStats:
    """Counts of every router since `attach`.

    Attributes:
        layers: One entry per router, by increasing decoder layer.
    """

    layers: tuple[LayerReplayStats, ...]

    @property
    def rows_replayed(self) -> int:
        """(row, layer) pairs that took the given experts."""
        return sum(layer.rows_replayed for layer in self.layers)

    @property
    def rows_native_last(self) -> int:
        """(row, layer) pairs of last tokens that routed natively."""
        return sum(layer.rows_native_last for layer in self.layers)

    @property
    def rows_native_missing(self) -> int:
        """Due (row, layer) pairs that routed natively."""
        return sum(layer.rows_native_missing for layer in self.layers)

    @property
    def coverage(self) -> float:
        """Share of due (row, layer) pairs that were replayed, in [0, 1]; NaN before the first."""
        return _share(self.rows_replayed, self.rows_replayed + self.rows_native_missing)

    @property
    def mismatch(self) -> float:
        """Share of replayed (row, layer) pairs whose native set differs; NaN before the first."""
        mismatched = sum(layer.rows_mismatched for layer in self.layers)
        return _share(mismatched, self.rows_replayed)


class LayerCounter:
    """Running counts of one router; the mismatch stays on the device until it is read."""

    __slots__ = ("_calls", "_last", "_mismatched", "_missing", "_recomputations", "_replayed")

    def __init__(self) -> None:
        self._calls = self._recomputations = 0
        self._replayed = self._last = self._missing = 0
        self._mismatched: Tensor | None = None

    def count_call(self, plan: ReplayPlan, mismatched: Tensor | None) -> None:
        """Count one forward pass; `mismatched` is an int64 scalar on any device, `None` for 0."""
        self._calls += 1
        self._replayed += plan.rows_replayed
        self._last += plan.rows_native_last
        self._missing += plan.rows_native_missing
        if mismatched is not None:
            earlier = self._mismatched
            self._mismatched = mismatched if earlier is None else earlier + mismatched

    def count_recomputation(self) -> None:
        """Count one forward pass repeated in a backward pass."""
        self._recomputations += 1

    def read(self, layer_idx: int) -> LayerReplayStats:
        """Copy the counts to the host. Runtime: one host sync where a call was counted."""
        return LayerReplayStats(
            layer_idx=layer_idx,
            calls=self._calls,
            recomputations=self._recomputations,
            rows_replayed=self._replayed,
            rows_native_last=self._last,
            rows_native_missing=self._missing,
            rows_mismatched=0 if self._mismatched is None else int(self._mismatched),
        )


def count_mismatched(native: Tensor, effective: Tensor, mask: Tensor) -> Tensor:
    """Count the masked rows whose expert sets differ.

    Args:
        native: Expert ids, int64 `[tokens, K]`.
        effective: Expert ids, int64 `[tokens, K]`.
        mask: Rows to count, bool `[tokens]`.

    Returns:
        int64 scalar on the same device.

    Runtime: no host sync; allocates about 32 * tokens * K bytes; CUDA-graph safe; deterministic; no
        gradients.
    """
    differs = (native.sort(dim=-1).values != effective.sort(dim=-1).values).any(dim=-1)
    return torch.count_nonzero(differs & mask)


def _share(part: int, whole: int) -> float:
    """Divide, with NaN where there is nothing to take a share of."""
    return part / whole if whole else float("nan")
