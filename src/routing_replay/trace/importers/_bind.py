"""From an engine's array to a trace: diagnose it, take the layers with a router, tie it to its tokens."""

from collections.abc import Sequence

import numpy as np

from routing_replay.trace._digest import token_digests
from routing_replay.trace._dtype import IntArray, ValidArray
from routing_replay.trace._model_routing import ModelRouting
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.importers._content import (
    diagnose_content,
    diagnose_dense,
    diagnose_frozen,
)
from routing_replay.trace.importers._finding import Finding, raise_errors
from routing_replay.trace.importers._shapes import diagnose_rows, diagnose_shape

__all__ = ["TokenIds", "bind", "diagnose"]

TokenIds = Sequence[int] | IntArray
"""The whole sequence from token 0, prompt and completion."""


def diagnose(
    ids: IntArray,
    *,
    token_ids: TokenIds,
    routing: ModelRouting,
    start: int = 0,
    all_layers: bool = True,
) -> tuple[Finding, ...]:
    """Look for everything that is known to be wrong with arrays of routed experts.

    A correct array gives no finding. What one array cannot show (rows of another request) `find_shared_rows` finds.

    Args:
        ids: `[rows, layers, K]`, any integer dtype.
        token_ids: The whole sequence from token 0, prompt and completion.
        routing: The model.
        start: Token index of row 0.
        all_layers: The layer axis holds every decoder layer (vLLM, SGLang), or those with a router alone (Megatron).

    Returns:
        What was found, worst first; nothing for a correct array.

    Runtime: no copy of the array, but for one of the layers with a router where the model has dense ones.
    """
    findings = diagnose_shape(ids, routing, all_layers=all_layers)
    if findings:
        return tuple(findings)
    rows = diagnose_rows(ids, num_tokens=len(token_ids), start=start)
    if all_layers:
        findings += diagnose_dense(ids, routing)
    moe = _moe_layers(ids, routing, all_layers=all_layers)
    findings += diagnose_content(moe, routing, start=start)
    if not findings and not rows:
        findings += diagnose_frozen(moe, np.asarray(token_ids), routing, start=start)
    return (*findings, *rows)


def _moe_layers(ids: IntArray, routing: ModelRouting, *, all_layers: bool) -> IntArray:
    if not all_layers or routing.num_moe_layers == routing.num_layers:
        return ids
    return ids[:, list(routing.layer_ids)]


def bind(
    ids: IntArray,
    *,
    token_ids: TokenIds,
    routing: ModelRouting,
    what: str,
    start: int = 0,
    all_layers: bool = True,
    valid: ValidArray | None = None,
    ordered: bool = False,
    weights_version: int = 0,
) -> RoutingTrace:
    """Make a trace of an array, or say what is wrong with it.

    Args:
        ids: `[rows, layers, K]`.
        token_ids: The whole sequence from token 0.
        routing: The model.
        what: What the array is, for messages.
        start: Token index of row 0.
        all_layers: As for `diagnose`.
        valid: Rows that were captured, bool `[rows]`; the others are not looked at. None for all.
        ordered: Whether columns are in the router's rank order.
        weights_version: Version of the weights that routed the rows.

    Returns:
        A trace that shares no memory with the array.

    Raises:
        RoutingDiagnosisError: The array cannot be right.
        TraceFormatError: A token id is not accepted.
    """
    token_digests(token_ids[:1])  # says what is wrong with token ids before their number is used
    looked_at = ids
    if valid is not None and not valid.all() and ids.ndim == 3 and len(valid) == len(ids):
        # A row that was not captured says nothing: it is looked at as if it repeated no expert.
        looked_at = ids.copy()
        looked_at[~valid] = np.arange(ids.shape[2])
    findings = diagnose(
        looked_at, token_ids=token_ids, routing=routing, start=start, all_layers=all_layers
    )
    raise_errors(findings, what=what)
    return RoutingTrace.from_rows(
        _moe_layers(ids, routing, all_layers=all_layers),
        token_ids=token_ids,
        layer_ids=routing.layer_ids,
        num_layers=routing.num_layers,
        num_experts=routing.num_experts,
        start=start,
        valid=valid,
        ordered=ordered,
        weights_version=weights_version,
    )
