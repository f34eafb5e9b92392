"""Findings about the shape of an array: rows, layers, columns, dtype."""

import numpy as np

from routing_replay.trace._dtype import IntArray
from routing_replay.trace._model_routing import ModelRouting
from routing_replay.trace.importers._finding import Finding

__all__ = ["diagnose_rows", "diagnose_shape"]

_MAX_DRAFT_LAYERS = 8


def diagnose_shape(ids: IntArray, routing: ModelRouting, *, all_layers: bool) -> list[Finding]:
    """Compare layer axis, columns and dtype with the model.

    Args:
        ids: `[rows, layers, K]`.
        routing: The model.
        all_layers: Whether the layer axis should hold every decoder layer, or those with a router alone.

    Returns:
        What does not fit; the content can be looked at only where nothing is found.
    """
    findings: list[Finding] = []
    if ids.ndim != 3:
        return [
            Finding(
                code="shape",
                message=f"the array has shape {list(ids.shape)}, not [rows, layers, experts]",
                values=tuple(map(int, ids.shape)),
                cause="the shape was lost on the way; SGLang sends none, and one sent flat must be imported as SGLang's",
            )
        ]
    findings += _layer_axis(int(ids.shape[1]), routing, all_layers=all_layers)
    findings += _columns(int(ids.shape[2]), routing)
    if ids.dtype == np.uint8 and routing.num_experts > 1 << 8:
        findings.append(
            Finding(
                code="dtype_too_narrow",
                message=f"ids are uint8, which cannot name {routing.num_experts} experts",
                values=(routing.num_experts,),
                cause="ids above 255 wrapped around and are lost; capture again with uint16 or wider",
                upstream=("ms-swift router_replay_utils.py (R2 records uint8)",),
            )
        )
    return findings


def _layer_axis(found: int, routing: ModelRouting, *, all_layers: bool) -> list[Finding]:
    expected = routing.num_layers if all_layers else routing.num_moe_layers
    if found == expected:
        return []
    says = f"the layer axis has {found} layers, the model has {routing.num_layers}, {routing.num_moe_layers} of them with a router"
    extra = found - expected
    if 0 < extra <= _MAX_DRAFT_LAYERS and found > routing.num_layers:
        return [
            Finding(
                code="draft_layers",
                message=says,
                layer_idx=routing.num_layers,
                values=(found, expected),
                cause=f"the last {extra} are draft (MTP) layers, which no trainer replays; the engine must leave them out, "
                "and may have let them overwrite layers of the model",
                upstream=("vllm#48622", "slime#1131", "miles#619"),
            )
        ]
    other = routing.num_moe_layers if all_layers else routing.num_layers
    if found == other:
        named = "layers with a router alone" if all_layers else "every decoder layer"
        return [
            Finding(
                code="layer_axis",
                message=says,
                values=(found, expected),
                cause=f"this array holds {named}; import it as an engine's that does, or pass all_layers={not all_layers}",
                upstream=("verl#5037",),
            )
        ]
    return [
        Finding(
            code="layer_axis",
            message=says,
            values=(found, expected),
            cause="the config is of another model, or the stages of a pipeline were not gathered",
            upstream=("vllm#35623",),
        )
    ]


def _columns(found: int, routing: ModelRouting) -> list[Finding]:
    if found == routing.top_k:
        return []
    cause = (
        "further columns are shared experts fused into the routed ones, which are in no trace; cut them off only where "
        "the engine documents that they come last"
        if found > routing.top_k
        else "the config is of another model, or columns were lost"
    )
    return [
        Finding(
            code="top_k",
            message=f"rows hold {found} experts a layer, the model picks {routing.top_k}",
            values=(found, routing.top_k),
            cause=cause,
        )
    ]


def diagnose_rows(ids: IntArray, *, num_tokens: int, start: int) -> list[Finding]:
    """Compare the number of rows with the tokens.

    Args:
        ids: `[rows, layers, K]`.
        num_tokens: Tokens of the whole sequence, the last one sampled and never an input.
        start: Token index that the first row claims.

    Returns:
        At most one finding.
    """
    rows = int(ids.shape[0])
    expected = num_tokens - 1 - start
    if rows == expected:
        return []
    says = f"{rows} rows for {num_tokens} tokens from token index {start}; expected are {expected}, one for every token but the last"
    values = (rows, expected)
    if rows == expected + 1:
        return [_one_too_many(ids, says, values, row=start + expected)]
    if rows > expected:
        return [
            Finding(
                code="row_count",
                message=says,
                row=start + max(expected, 0),
                values=values,
                cause="rows of other tokens: a prefix counted twice where captures were joined, or tokens that were truncated "
                "without their rows",
                upstream=("verl#5344", "verifiers#1394"),
            )
        ]
    if rows == expected - 1:
        return [
            Finding(
                code="row_missing",
                message=says,
                row=start,
                values=values,
                cause="one row too few: the request began one token later than assumed, or the engine dropped the row of the "
                "first sampled token",
                upstream=("slime#1045", "ms-swift#9799"),
            )
        ]
    return [
        Finding(
            code="missing_front_rows",
            message=says,
            row=start,
            values=values,
            cause=f"rows that are missing are those of a prefix that was not computed again (a cache hit, another "
            f"instance); if so, these start at token index {num_tokens - 1 - rows}: import them from there, and merge",
            upstream=("vllm#57966", "llm-d-router#1473"),
        )
    ]


def _one_too_many(ids: IntArray, says: str, values: tuple[int, int], *, row: int) -> Finding:
    last = ids[-1]
    if not last.any() and ids.shape[2] > 1:
        padding = "the last row is zeros, padding for the token that was never an input"
    elif len(ids) > 1 and (last == ids[-2]).all():
        padding = (
            "the last row repeats the one before, padding for the token that was never an input"
        )
    elif (last == np.arange(ids.shape[2])).all():
        padding = "the last row is 0, 1, 2, ..., padding for the token that was never an input"
    else:
        padding = "the token ids lack the last token, or the engine ran one token past the end"
    return Finding(
        code="row_extra",
        message=says,
        row=row,
        values=values,
        cause=f"{padding}; cut the last row off if so",
        upstream=("verl#7524", "prime-rl#1807"),
    )
