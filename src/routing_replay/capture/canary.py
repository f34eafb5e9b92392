"""The start-up canary: known ids go in through replay and must come out through capture."""

import numpy as np
from numpy.typing import NDArray

from routing_replay.capture.device_cache import RoutingSpec
from routing_replay.errors import CaptureError

__all__ = ["canary_ids", "check_canary"]


def canary_ids(spec: RoutingSpec, num_rows: int) -> NDArray[np.int16]:
    """Make rows whose ids differ between neighbouring layers, ranks and tokens.

    Args:
        spec: Layers, experts and K of the model.
        num_rows: How many rows.

    Returns:
        int16 `[num_rows, L, K]`, distinct ids in each row and layer.
    """
    rows = np.arange(num_rows).reshape(-1, 1, 1)
    layers = np.arange(spec.num_moe_layers).reshape(1, -1, 1)
    ranks = np.arange(spec.top_k).reshape(1, 1, -1)
    # With K == E every row holds every expert; the offset then still rotates their order.
    return (
        (rows + layers * (spec.top_k % spec.num_experts + 1) + ranks) % spec.num_experts
    ).astype(np.int16)


def check_canary(
    spec: RoutingSpec, expected: NDArray[np.int16], captured: NDArray[np.integer]
) -> None:
    """Compare what was forced with what was captured.

    Args:
        spec: Layers, experts and K of the model.
        expected: `[n, L, K]` from `canary_ids`.
        captured: `[n, L, K]` from the capture path.

    Raises:
        CaptureError: A layer's ids differ: its op does not record, does not take given ids, or writes elsewhere.
    """
    differs = (expected != captured.astype(np.int64)).any(axis=(0, 2))
    if differs.any():
        slot = int(np.flatnonzero(differs)[0])
        raise CaptureError(
            f"start-up canary: decoder layer {spec.layer_ids[slot]} was forced to experts {expected[0, slot].tolist()} "
            f"but captured {captured[0, slot].tolist()} ({int(differs.sum())} of {spec.num_moe_layers} layers differ); "
            "its op must read routing_replay_in and fill routing_replay_out of its own layer"
        )
