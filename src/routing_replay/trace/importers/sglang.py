"""Routing as SGLang returns it.

Source: SGLang 0.5.23, `managers/detokenizer_manager.py` (base64 of raw int32), `/generate` and `sglext`.
"""

import numpy as np

from routing_replay.errors import TraceFormatError
from routing_replay.trace._model_routing import ModelRouting
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.importers._bind import TokenIds, bind
from routing_replay.trace.importers._wire import Wire, array_of, decode_base64

__all__ = ["import_sglang"]


def import_sglang(
    routed_experts: Wire,
    *,
    token_ids: TokenIds,
    routing: ModelRouting,
    start_len: int = 0,
    weights_version: int = 0,
) -> RoutingTrace:
    """Import `meta_info["routed_experts"]`, or `sglext.routed_experts` of the OpenAI routes.

    Args:
        routed_experts: Base64 text of little-endian int32 without a shape, or an array, flat or
            `[rows, all decoder layers, K]`. Dense layers hold zeros; columns are in no order.
        token_ids: Prompt and completion.
        routing: The model, which gives the shape.
        start_len: `routed_experts_start_len` of the request: the token index of row 0.
        weights_version: Version of the weights that routed the rows.

    Returns:
        A trace with `ordered=False`.

    Raises:
        RoutingDiagnosisError: The rows cannot be right.
        TraceFormatError: It is not base64, or not a whole number of rows of this model.
    """
    if isinstance(routed_experts, str | bytes):
        data = decode_base64(routed_experts, name="routed_experts")
        if len(data) % 4:
            raise TraceFormatError(
                f"routed_experts has {len(data)} bytes, not a multiple of 4; SGLang sends int32"
            )
        ids = np.frombuffer(data, "<i4")
    else:
        ids = array_of(routed_experts, name="routed_experts")
    if ids.ndim != 3:
        row = routing.num_layers * routing.top_k
        if ids.size % row:
            raise TraceFormatError(
                f"routed_experts has {ids.size} ids, not a multiple of {routing.num_layers} layers x {routing.top_k} "
                "experts; the config is of another model, or the field was cut off"
            )
        ids = ids.reshape(-1, routing.num_layers, routing.top_k)
    return bind(
        ids,
        token_ids=token_ids,
        routing=routing,
        start=start_len,
        weights_version=weights_version,
        what="routed_experts from SGLang",
    )
