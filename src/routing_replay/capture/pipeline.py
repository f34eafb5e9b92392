"""From the device cache to the host cache: gather a step's rows, check them, hand them to their requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from routing_replay.capture.device_cache import DeviceCache, RoutingSpec
from routing_replay.capture.host_cache import BlockRef, HostCache
from routing_replay.errors import CaptureError
from routing_replay.kernels import MISSING_ID, RowFault
from routing_replay.trace import RoutingTrace

__all__ = ["CapturePipeline", "RowSpan", "describe_bad_row"]


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
    """

    def __init__(self, device_cache: DeviceCache, host_cache: HostCache) -> None:
        self.device_cache = device_cache
        self.host_cache = host_cache

    def collect(self, spans: Sequence[RowSpan], *, num_reset: int) -> dict[str, CaptureError]:
        """Take the rows of a step that has run, in the order of its tokens.

        A request with a bad row gets none of its rows of the step: it has failed.

        Args:
            spans: The requests of the step; their rows lie one after another from cache row 0 on.
            num_reset: Rows of the step's bucket, padding rows included.

        Returns:
            An error for every request with a bad row.

        Runtime: copies the rows and flags to the host and waits for them; allocates the rows.
        """
        num_rows = sum(span.num_rows for span in spans)
        row_idx = torch.arange(num_rows, device=self.device_cache.layer(0).device)
        step = self.device_cache.gather(row_idx, num_reset=num_reset)
        flags = step.flags.cpu().numpy()
        rows = step.rows.cpu().numpy()
        errors: dict[str, CaptureError] = {}
        first = 0
        for span in spans:
            span_flags = flags[first : first + span.num_rows]
            span_rows = rows[first : first + span.num_rows]
            first += span.num_rows
            if span_flags.any():
                errors[span.request_id] = self._error(span, span_flags, span_rows)
                continue
            self.host_cache.append(span.request_id, span.start, span_rows)
            self.host_cache.write_blocks(span.blocks, span.start, span_rows)
        return errors

    def finish(
        self, request_id: str, token_ids: Sequence[int], *, weights_version: int
    ) -> RoutingTrace:
        """Assemble the trace of a finished request.

        Args:
            request_id: A running request; call `host_cache.free` afterwards.
            token_ids: All its tokens; the last one was never an input and has no row.
            weights_version: Version of the weights that computed the rows.

        Returns:
            A complete trace of `len(token_ids) - 1` rows.

        Raises:
            CaptureError: A row never arrived.
        """
        spec = self.device_cache.spec
        rows = self.host_cache.take(request_id, len(token_ids) - 1)
        if not rows.valid.all():
            missing = np.flatnonzero(~rows.valid)
            raise CaptureError(
                f"request {request_id!r}: {len(missing)} of {len(rows.valid)} routing rows never arrived, the first "
                f"for token index {missing[0]}; send the request again and report this"
            )
        trace = RoutingTrace.from_rows(
            rows.ids,
            token_ids=token_ids,
            layer_ids=spec.layer_ids,
            num_layers=spec.num_layers,
            num_experts=spec.num_experts,
            weights_version=weights_version,
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
