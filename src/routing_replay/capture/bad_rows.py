"""What is wrong with a bad row, in words."""

import numpy as np
from numpy.typing import NDArray

from routing_replay.capture.device_cache import RoutingSpec
from routing_replay.capture.pending import StepTicket
from routing_replay.capture.staging import HostRows
from routing_replay.errors import CaptureError
from routing_replay.kernels import MISSING_ID, RowFault

__all__ = ["describe_bad_row", "errors_of"]


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


def errors_of(spec: RoutingSpec, ticket: StepTicket, arrived: HostRows) -> dict[str, CaptureError]:
    """Make an error for every request with a flagged row, or for all of a step whose rows are another's.

    Args:
        spec: Layers, experts and K of the model.
        ticket: The step.
        arrived: The rows of the step.

    Returns:
        By request; rows that nobody keeps fail nobody.
    """
    if ticket.stamp is not None and ticket.stamp != arrived.stamp:
        return {
            piece.request_id: CaptureError(
                f"request {piece.request_id!r}, token index {piece.start}: the rows of step {ticket.stamp} were asked for, "
                f"those of step {arrived.stamp} came; its routing is not returned; the step's CUDA graph did not gather it: "
                "set enforce_eager=True and report this"
            )
            for piece in ticket.pieces
        }
    errors: dict[str, CaptureError] = {}
    if not arrived.flags.any():
        return errors
    for piece in ticket.pieces:
        flags = arrived.flags[piece.first : piece.first + piece.num_rows]
        if flags.any():
            bad = int(np.flatnonzero(flags)[0])
            ids = arrived.rows[piece.first + bad]
            detail = describe_bad_row(spec, ids, RowFault(int(flags[bad])))
            errors[piece.request_id] = CaptureError(
                f"request {piece.request_id!r}, token index {piece.start + bad}: {detail}; "
                "its routing is not returned; a layer's op does not fill routing_replay_out"
            )
    return errors
