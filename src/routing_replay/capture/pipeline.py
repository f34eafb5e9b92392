"""From the device cache to the host cache: gather a step's rows, check them, hand them to their requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray

from routing_replay.capture.device_cache import DeviceCache, RoutingSpec
from routing_replay.capture.host_cache import BlockRef, HostCache
from routing_replay.errors import CaptureError
from routing_replay.kernels import MISSING_ID, RowFault
from routing_replay.trace import RoutingTrace

__all__ = ["CapturePipeline", "RowSpan", "UncachedPrefix", "describe_bad_row"]


class UncachedPrefix(StrEnum):
    """What happens when a prompt hits KV blocks whose rows are not here."""

    RECOMPUTE = "recompute"
    """Use only the part of the prefix whose rows are here, and compute the rest."""

    MISSING = "missing"
    """Use all of it; the trace marks the rows that are not here as not valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSpan:
    """Consecutive rows of a step that belong to one request.

    Attributes:
        request_id: The request.
        start: Token index of the first row.
        num_rows: How many tokens the request has in the step.
        blocks: All KV blocks of the request, in token order.
    """

    request_id: str
    start: int
    num_rows: int
    blocks: Sequence[BlockRef]


def describe_bad_row(spec: RoutingSpec, ids: NDArray[np.integer], fault: RowFault) -> str:
    """Say which layer of a bad row is wrong, and how.

    Args:
        spec: Layers, experts and K of the model.
        ids: `[L, K]` in the staging dtype.
        fault: The row's flag.

    Returns:
        A clause such as `decoder layer 3 wrote ids [7, 7], which repeat`.
    """
    for layer_idx, layer_ids in zip(spec.layer_ids, ids.astype(np.int64), strict=True):
        shown = layer_ids.tolist()
        if ((layer_ids < 0) | (layer_ids >= spec.num_experts)).any():
            if RowFault.OUT_OF_RANGE in fault and (layer_ids != MISSING_ID).any():
                return f"decoder layer {layer_idx} wrote an id outside [0, {spec.num_experts}): {shown}"
            return f"decoder layer {layer_idx} wrote no ids: {shown}"
        if len(set(shown)) < len(shown):
            return f"decoder layer {layer_idx} wrote ids {shown}, which repeat"
    return f"ids {ids.tolist()} carry fault {fault!r}"


class CapturePipeline:
    """Carries the rows of every step to the requests that they belong to.

    Args:
        device_cache: Where the layers write.
        host_cache: Where rows of requests and blocks are kept.
        uncached_prefix: What happens when a prompt hits KV blocks whose rows are not here.
    """

    def __init__(
        self,
        device_cache: DeviceCache,
        host_cache: HostCache,
        *,
        uncached_prefix: UncachedPrefix = UncachedPrefix.RECOMPUTE,
    ) -> None:
        self.device_cache = device_cache
        self.host_cache = host_cache
        self._uncached_prefix = uncached_prefix

    def num_usable_blocks(self, prefix: Sequence[BlockRef]) -> int:
        """Return how many leading blocks of a prefix hit may be used.

        Args:
            prefix: Full blocks in token order.

        Returns:
            All of them, or under `UncachedPrefix.RECOMPUTE` those before the first whose rows are not here.
        """
        if self._uncached_prefix is UncachedPrefix.MISSING:
            return len(prefix)
        for count, block in enumerate(prefix):
            if not self.host_cache.holds(block):
                return count
        return len(prefix)

    def begin(self, request_id: str, prefix: Sequence[BlockRef], num_rows: int) -> None:
        """Start a request with the rows that it did not compute itself; a preempted one keeps those it has.

        Args:
            request_id: The request.
            prefix: The KV blocks that it attends to without having computed them, in token order.
            num_rows: Their tokens.

        Raises:
            CaptureError: Rows of the prefix are not here.
        """
        if self.host_cache.is_running(request_id):
            return
        self.host_cache.begin(
            request_id,
            prefix,
            num_rows=num_rows,
            allow_missing=self._uncached_prefix is UncachedPrefix.MISSING,
        )

    def collect(
        self, spans: Sequence[RowSpan], *, num_reset: int, weights_version: int
    ) -> dict[str, CaptureError]:
        """Take the rows of a step that has run, in the order of its tokens.

        A request with a bad row gets none of its rows of the step: it has failed.

        Args:
            spans: The requests of the step; their rows lie one after another from cache row 0 on.
            num_reset: Rows of the step's bucket, padding rows included.
            weights_version: Version of the weights that ran the step.

        Returns:
            An error for every request with a bad row.

        Runtime: copies the rows and flags to the host and waits for them; allocates the rows.
        """
        num_rows = sum(span.num_rows for span in spans)
        row_idx = torch.arange(num_rows, device=self.device_cache.layer(0).device)
        step = self.device_cache.gather(row_idx, num_reset=num_reset)
        flags = step.flags.cpu().numpy()
        rows = step.rows.cpu().numpy()
        errors = self._bad_rows(spans, flags, rows) if flags.any() else {}
        pieces: list[tuple[Sequence[BlockRef], int, int]] = []
        is_good = np.ones(num_rows, np.bool_)
        first = 0
        for span in spans:
            end = first + span.num_rows
            if span.request_id in errors:
                is_good[first:end] = False
            else:
                pieces.append((span.blocks, span.start, span.num_rows))
                self.host_cache.append(
                    span.request_id,
                    span.start,
                    rows[first:end],
                    weights_version=weights_version,
                )
            first = end
        good_rows = rows[:num_rows][is_good] if errors else rows[:num_rows]
        self.host_cache.write_blocks(pieces, good_rows, weights_version=weights_version)
        return errors

    def _bad_rows(
        self, spans: Sequence[RowSpan], flags: NDArray[np.uint8], rows: NDArray[np.integer]
    ) -> dict[str, CaptureError]:
        """An error for every request with a flagged row."""
        errors: dict[str, CaptureError] = {}
        first = 0
        for span in spans:
            end = first + span.num_rows
            if flags[first:end].any():
                errors[span.request_id] = self._error(span, flags[first:end], rows[first:end])
            first = end
        return errors

    def num_rows(self, request_id: str) -> int:
        """Return how many rows of a request are here, 0 for one that never began."""
        return self.host_cache.num_rows(request_id)

    def finish(self, request_id: str, token_ids: Sequence[int]) -> RoutingTrace:
        """Assemble the trace of a request that has ended.

        Args:
            request_id: The request; call `host_cache.free` afterwards.
            token_ids: All its tokens; the last one was never an input and has no row.

        Returns:
            A trace of `len(token_ids) - 1` rows, each with the version of the weights that computed it. It is complete
            except, under `UncachedPrefix.MISSING`, for rows of a prefix hit that were not here.

        Raises:
            CaptureError: A row never arrived.
        """
        spec = self.device_cache.spec
        rows = self.host_cache.take(request_id, len(token_ids) - 1)
        missing = np.flatnonzero(~rows.valid)
        lost = missing[missing >= rows.num_prefix]
        if lost.size:
            raise CaptureError(
                f"request {request_id!r}: {len(lost)} of {len(rows.valid)} routing rows never arrived, the first "
                f"for token index {lost[0]}; send the request again and report this"
            )
        versions = rows.weights_version
        starts = np.flatnonzero(np.diff(versions, prepend=versions[:1] - 1))
        trace = RoutingTrace.from_rows(
            rows.ids,
            token_ids=token_ids,
            layer_ids=spec.layer_ids,
            num_layers=spec.num_layers,
            num_experts=spec.num_experts,
            valid=rows.valid,
            weights_version=[(int(start), int(versions[start])) for start in starts],
        )
        trace.validate()
        return trace

    def _error(
        self, span: RowSpan, flags: NDArray[np.uint8], rows: NDArray[np.integer]
    ) -> CaptureError:
        first_bad = int(np.flatnonzero(flags)[0])
        detail = describe_bad_row(
            self.device_cache.spec, rows[first_bad], RowFault(int(flags[first_bad]))
        )
        return CaptureError(
            f"request {span.request_id!r}, token index {span.start + first_bad}: {detail}; "
            "its routing is not returned; a layer's op does not fill routing_replay_out"
        )
