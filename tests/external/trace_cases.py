"""Random traces, and one with a single other id, for tests that need numpy alone."""

import dataclasses

import numpy as np

from routing_replay.trace import RoutingTrace

# (experts, top_k, MoE layers, decoder layers)
MODELS = {
    "8x2_all_moe": (8, 2, (0, 1, 2, 3), 4),
    "64x6_first_dense": (64, 6, (1, 2, 3), 4),
    "256x8_every_other": (256, 8, (1, 3), 4),
    "512x10_all_moe": (512, 10, (0, 1, 2, 3), 4),
}


def random_trace(
    model: str, *, seed: int, num_tokens: int, rows: int | None = None
) -> RoutingTrace:
    """Rows of a sequence of `num_tokens` tokens, all but the last unless `rows` says otherwise."""
    num_experts, top_k, layer_ids, num_layers = MODELS[model]
    count = num_tokens - 1 if rows is None else rows
    keys = np.random.default_rng(seed).random((count, len(layer_ids), num_experts))
    return RoutingTrace.from_rows(
        np.argsort(keys, axis=-1)[:, :, :top_k],
        token_ids=token_ids(seed, num_tokens),
        layer_ids=layer_ids,
        num_layers=num_layers,
        num_experts=num_experts,
    )


def token_ids(seed: int, num_tokens: int) -> list[int]:
    """The tokens of a seed; none is 0, which pads."""
    return [1 + (seed * 7919 + idx * 104729) % 30000 for idx in range(num_tokens)]


def with_other_id(trace: RoutingTrace, *, row: int, slot: int) -> RoutingTrace:
    """The twin of a trace: one id of one row is another."""
    ids = trace.ids.copy()
    taken = set(ids[row, slot].tolist())
    ids[row, slot, 0] = next(idx for idx in range(trace.num_experts) if idx not in taken)
    return dataclasses.replace(trace, ids=ids)
