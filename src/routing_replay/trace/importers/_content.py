"""Findings about the content of an array: what ids say that no correct engine writes."""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from routing_replay.trace._checks import repeats_expert
from routing_replay.trace._dtype import IntArray, ValidArray
from routing_replay.trace._model_routing import ModelRouting
from routing_replay.trace.importers._finding import Finding

__all__ = ["bits_per_layer", "diagnose_content", "diagnose_dense", "diagnose_frozen"]

# What chance may bring about once in 2**128 correct arrays is no longer put down to chance.
SURPRISE_BITS = 128
_MIN_RUN = 8


def bits_per_layer(routing: ModelRouting) -> float:
    """Return log2 of the number of expert sets of a layer: how surprising it is to meet a given one."""
    return math.log2(math.comb(routing.num_experts, routing.top_k))


def diagnose_dense(ids: IntArray, routing: ModelRouting) -> list[Finding]:
    """Look into the slots of dense layers, which hold zeros or arange(K).

    Args:
        ids: `[rows, decoder layers, K]`.
        routing: The model.

    Returns:
        At most one finding.
    """
    dense = list(routing.dense_layer_ids)
    if not dense or not len(ids):
        return []
    slots = ids[:, dense]
    is_zero = (slots == 0).all(axis=2)
    is_range = (slots == np.arange(routing.top_k)).all(axis=2)
    filled = ~(is_zero | is_range).all(axis=0)
    if not filled.any():
        return []
    layer_idx = dense[int(np.argmax(filled))]
    empty = [i for i in routing.layer_ids if routing.top_k > 1 and not ids[:, i].any()]
    shifted = f"; layer {empty[0]}, which has one, is all zeros" if empty else ""
    return [
        Finding(
            code="layer_offset" if empty else "dense_layer_routes",
            message=f"decoder layer {layer_idx} has no router, but its slot holds {ids[0, layer_idx].tolist()}{shifted}",
            row=None,
            layer_idx=layer_idx,
            values=tuple(int(value) for value in ids[0, layer_idx]),
            cause="the layer axis is shifted (layers counted without the dense ones), or the config is of another model",
            upstream=("verl#5037", "verl#7106", "miles#2570"),
        )
    ]


def diagnose_content(ids: IntArray, routing: ModelRouting, *, start: int) -> list[Finding]:
    """Look at the ids of layers with a router: range, distinctness, zeros.

    Args:
        ids: `[rows, L, K]`.
        routing: The model.
        start: Token index of the first row.

    Returns:
        What is wrong, worst first.
    """
    if not ids.size:
        return []
    outside = _range(ids, routing, start=start)
    if outside:
        return outside
    if routing.top_k == 1:
        return _zeros_of_one(ids, routing)
    repeated = repeats_expert(ids)
    return _repeats(ids, repeated, routing, start=start) if repeated.any() else []


def _place(mask: npt.NDArray[np.bool_], routing: ModelRouting, start: int) -> tuple[int, int, int]:
    """The first true cell: its row, slot and decoder layer."""
    row, slot = (int(index) for index in np.unravel_index(int(np.argmax(mask)), mask.shape)[:2])
    return row, slot, routing.layer_ids[slot]


def _range(ids: IntArray, routing: ModelRouting, *, start: int) -> list[Finding]:
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        missing: ValidArray = np.any(ids < 0, axis=2)
        row, slot, layer_idx = _place(missing, routing, start)
        return [
            Finding(
                code="negative_ids",
                message=f"{int(missing.any(axis=1).sum())} rows hold negative ids, the first at token index {start + row}, "
                f"layer {layer_idx}: {ids[row, slot].tolist()}",
                row=start + row,
                layer_idx=layer_idx,
                values=tuple(int(value) for value in ids[row, slot]),
                cause="a sentinel of rows that were not captured; import with the trainer's importer that knows it, or merge "
                "the missing rows",
                upstream=("nemo-rl#3113",),
            )
        ]
    if high < routing.num_experts:
        return []
    above: ValidArray = np.any(ids >= routing.num_experts, axis=2)
    row, slot, layer_idx = _place(above, routing, start)
    physical = high < 2 * routing.num_experts and not above.all()
    return [
        Finding(
            code="physical_ids" if physical else "ids_out_of_range",
            message=f"ids reach {high} where the model has {routing.num_experts} experts, first at token index {start + row}, "
            f"layer {layer_idx}: {ids[row, slot].tolist()}",
            row=start + row,
            layer_idx=layer_idx,
            values=(high, routing.num_experts),
            cause="ids of physical experts, after the load balancer's (EPLB) remap, instead of logical ones: capture before "
            "the remap"
            if physical
            else "the config is of another model, or the bytes are of another dtype",
            upstream=("vllm#33013",) if physical else (),
        )
    ]


def _zeros_of_one(ids: IntArray, routing: ModelRouting) -> list[Finding]:
    """With one expert a token, expert 0 is a fair choice; only too many of them are not."""
    needed = max(_MIN_RUN, math.ceil(SURPRISE_BITS / max(bits_per_layer(routing), 1e-9)))
    empty = ~ids.any(axis=(0, 2))
    cells = int(ids.shape[0] * empty.sum())
    if empty.all() and cells >= needed:
        return [_all_zero(ids)]
    if not empty.any() or ids.shape[0] < needed:
        return []
    layers = [routing.layer_ids[slot] for slot in np.flatnonzero(empty)]
    return [_zero_layers(layers, len(ids), severity="warning")]


def _all_zero(ids: IntArray) -> Finding:
    return Finding(
        code="all_zero",
        message=f"every id of {ids.shape[0]} rows and {ids.shape[1]} layers with a router is 0",
        row=None,
        values=(0,),
        cause="the engine's capture hook never ran: routing inside torch.compile or a monolithic kernel; with vLLM, set "
        "enforce_eager=True or another MoE backend",
        upstream=("vllm#44116", "vllm#49184", "vllm#33013", "vllm-ascend#16314"),
    )


def _zero_layers(
    layers: list[int], num_rows: int, *, severity: Literal["error", "warning"] = "error"
) -> Finding:
    return Finding(
        code="zero_layers",
        message=f"layers {layers} hold 0 in all {num_rows} rows",
        row=None,
        layer_idx=layers[0],
        values=tuple(layers),
        cause="these layers were never captured: pipeline stages that were not gathered, a fused router without a hook, or "
        "layers that route by token id",
        upstream=("vllm#35623", "slime#1145", "sglang#29588"),
        severity=severity,
    )


def _repeats(
    ids: IntArray, repeated: ValidArray, routing: ModelRouting, *, start: int
) -> list[Finding]:
    """Name what repeats an expert: zeros by where they are, and the rest."""
    zero = repeated & ~ids.any(axis=2)
    if zero.all():
        return [_all_zero(ids)]
    findings: list[Finding] = []
    in_rows: ValidArray = np.all(zero, axis=1)
    in_layers = zero.all(axis=0)
    if in_layers.any():
        layers = [routing.layer_ids[slot] for slot in np.flatnonzero(in_layers)]
        findings.append(_zero_layers(layers, len(ids)))
    if in_rows.any():
        findings.append(_zero_rows(in_rows, start=start))
    rest = zero & ~in_rows[:, None] & ~in_layers
    if rest.any():
        row, _, layer_idx = _place(rest, routing, start)
        findings.append(
            Finding(
                code="zero_cells",
                message=f"{int(rest.sum())} (row, layer) pairs hold zeros, the first at token index {start + row}, layer "
                f"{layer_idx}",
                row=start + row,
                layer_idx=layer_idx,
                values=(int(rest.sum()),),
                cause="some steps of these layers were not captured: a kernel that bypasses the hook for some batch sizes, or "
                "another rank's rows",
                upstream=("vllm-ascend#15451", "vllm#35623"),
            )
        )
    other = repeated & ~zero
    if other.any():
        row, slot, layer_idx = _place(other, routing, start)
        findings.append(
            Finding(
                code="duplicate_ids",
                message=f"{int(other.sum())} (row, layer) pairs repeat an expert, the first at token index {start + row}, "
                f"layer {layer_idx}: {ids[row, slot].tolist()}",
                row=start + row,
                layer_idx=layer_idx,
                values=tuple(int(value) for value in ids[row, slot]),
                cause="a router picks distinct experts: the bytes are of another dtype or shape, or the remap of a load "
                "balancer folded them",
                upstream=("sglang#23885",),
            )
        )
    return findings


def _zero_rows(in_rows: ValidArray, *, start: int) -> Finding:
    """Rows that are zero in every layer, named by where they are."""
    rows = np.flatnonzero(in_rows)
    first, last, count = int(rows[0]), int(rows[-1]), len(rows)
    is_one_run = last - first + 1 == count
    if is_one_run and last == len(in_rows) - 1:
        code, cause = (
            "zero_padding",
            "padding: zeros send every padded token to expert 0; cut these rows off",
        )
        upstream = ("nemo-rl#3208", "slime#822", "verl#4986")
    elif is_one_run and first == 0:
        code, cause = "zero_front_rows", "the prefix came from elsewhere (a cache hit, the prefill instance, left padding) and its rows did not"  # fmt: skip
        upstream = ("llm-d-router#1473", "sglang#23885")
    else:
        code, cause = "zero_rows", "these tokens were computed in steps that were not captured (preemption, another rank)"  # fmt: skip
        upstream = ("vllm#39917", "vllm-ascend#15451")
    return Finding(
        code=code,
        message=f"{count} rows are zero in every layer, token indexes {start + first} to {start + last}",
        row=start + first,
        values=(start + first, start + last, count),
        cause=cause,
        upstream=upstream,
    )


def diagnose_frozen(
    ids: IntArray, token_ids: IntArray, routing: ModelRouting, *, start: int
) -> list[Finding]:
    """Look for rows that stand still while the tokens change: a buffer that nobody wrote.

    Routers are no dice: those of small models send many tokens to the same experts. Only rows that stand still in every
    layer, and longer than any that was met in correct arrays, are an error.

    Args:
        ids: `[rows, L, K]`.
        token_ids: The whole sequence.
        routing: The model.
        start: Token index of the first row.

    Returns:
        An error where every layer stands still, a warning where single layers do.
    """
    bits = bits_per_layer(routing)
    if len(ids) <= _MIN_RUN or bits == 0:
        return []
    tokens = np.asarray(token_ids)[start : start + len(ids)]
    still = _same_as_before(ids) & (tokens[1:] != tokens[:-1])[:, None]
    first, count = _longest_run(still.all(axis=1))
    if count >= max(_MIN_RUN, math.ceil(2 * SURPRISE_BITS / (bits * routing.num_moe_layers))):
        return [_frozen(routing.layer_ids, start + first, count, routing, severity="error")]
    needed = max(2 * _MIN_RUN, math.ceil(SURPRISE_BITS / bits))
    candidates = np.flatnonzero(still.sum(axis=0) >= needed)
    runs = [(int(slot), *_longest_run(still[:, slot])) for slot in candidates]
    frozen = [(slot, first, count) for slot, first, count in runs if count >= needed]
    if not frozen:
        return []
    layers = tuple(routing.layer_ids[slot] for slot, _, _ in frozen)
    _, first, count = max(frozen, key=lambda item: item[2])
    return [_frozen(layers, start + first, count, routing, severity="warning")]


def _frozen(
    layers: tuple[int, ...],
    row: int,
    count: int,
    routing: ModelRouting,
    *,
    severity: Literal["error", "warning"],
) -> Finding:
    return Finding(
        code="frozen_rows",
        message=f"{len(layers)} of {routing.num_moe_layers} layers hold the same experts for different tokens, up to "
        f"{count + 1} of them from token index {row}",
        row=row,
        layer_idx=layers[0],
        values=layers,
        cause="nobody wrote these rows: a kernel that bypasses the hook leaves an older step's ids in the buffer (or, in "
        "single layers, a router that likes few experts)",
        upstream=("vllm#39568",),
        severity=severity,
    )


def _same_as_before(ids: IntArray) -> npt.NDArray[np.bool_]:
    """Whether each (row, layer) but the first row's holds what the row before holds; bool `[rows - 1, L]`."""
    cell_bytes = ids.shape[2] * ids.itemsize
    if cell_bytes in (1, 2, 4, 8) and ids.flags.c_contiguous:  # one comparison a cell, not K
        cells = ids.view(f"u{cell_bytes}")[:, :, 0]
        return cells[1:] == cells[:-1]
    return (ids[1:] == ids[:-1]).all(axis=2)


def _longest_run(flags: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Where the longest run of true starts, and how long it is."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    if not edges.size:
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    longest = int(np.argmax(lengths))
    return int(edges[2 * longest]), int(lengths[longest])
