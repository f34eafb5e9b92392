"""Traces for tests: random ones for given shapes, and hypothesis strategies for all of them."""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from routing_replay.trace import RoutingTrace

NUM_EXPERTS = (8, 64, 256, 257, 512)


def random_ids(seed: int, *, rows: int, layers: int, num_experts: int, top_k: int) -> np.ndarray:
    """Return distinct ids, int16 [rows, layers, top_k], over the whole range of experts."""
    rng = np.random.default_rng(seed)
    keys = rng.random((rows, layers, num_experts))
    return np.argsort(keys, axis=-1)[:, :, :top_k].astype(np.int16)


def random_trace(
    seed: int = 0,
    *,
    rows: int = 7,
    layers: int = 3,
    num_experts: int = 64,
    top_k: int = 4,
    start: int = 0,
    **changes: object,
) -> RoutingTrace:
    """Return a trace of `tokens_of(seed, ...)` with random distinct ids."""
    return RoutingTrace.from_rows(
        random_ids(seed, rows=rows, layers=layers, num_experts=num_experts, top_k=top_k),
        **{
            "token_ids": tokens_of(seed, start + rows),
            "layer_ids": range(1, 2 * layers, 2),
            "num_layers": 2 * layers,
            "num_experts": num_experts,
            "start": start,
            **changes,
        },
    )


def tokens_of(seed: int, num_tokens: int) -> list[int]:
    """Return the first tokens of the sequence of a seed."""
    return [(seed * 7919 + idx * 104729 + 17) % 151936 for idx in range(num_tokens)]


def invalid_rows(trace: RoutingTrace, rows: list[int]) -> RoutingTrace:
    """Return a trace in which some rows are missing."""
    ids, valid = trace.ids.copy(), trace.valid.copy()
    ids[rows] = np.arange(trace.top_k)
    valid[rows] = False
    weights = None
    if trace.weights is not None:
        weights = trace.weights.copy()
        weights[rows] = 0
    return dataclasses.replace(trace, ids=ids, valid=valid, weights=weights)


@st.composite
def traces(draw: st.DrawFn, *, min_rows: int = 0) -> RoutingTrace:
    """Draw a trace with missing rows, version runs and weights, or without."""
    rows = draw(st.sampled_from([rows for rows in (0, 1, 7) if rows >= min_rows]))
    layers, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    start = draw(st.sampled_from((0, 1, 5)))
    seed = draw(st.integers(0, 1000))
    versions = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    kind = draw(st.sampled_from((None, np.float16, np.float32)))
    weights = None
    if kind is not None:
        weights = np.random.default_rng(seed).random((rows, layers, top_k)).astype(kind)
    return random_trace(
        seed,
        rows=rows,
        layers=layers,
        num_experts=draw(st.sampled_from(NUM_EXPERTS)),
        top_k=top_k,
        start=start,
        valid=np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=bool),
        ordered=draw(st.booleans()),
        weights_version=runs_of(start, versions),
        weights=weights,
    )


def runs_of(start: int, versions: list[int]) -> list[tuple[int, int]]:
    """Return the runs of a version per row."""
    return [
        (start + row, version)
        for row, version in enumerate(versions)
        if row == 0 or version != versions[row - 1]
    ]


def versions_of(trace: RoutingTrace) -> list[int]:
    """Return the version of every row of a trace, the inverse of `runs_of`."""
    return [
        next(version for first, version in reversed(trace.weights_version) if first <= token_idx)
        for token_idx in range(trace.start, trace.end)
    ]
