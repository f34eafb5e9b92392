"""Routing as prime-rl's trainer takes it: bytes with their shape, one row for every token."""

from typing import TypedDict

import numpy as np

from routing_replay.errors import TraceMismatchError
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.export._rows import (
    all_layers,
    cast_ids,
    checked_num_tokens,
    rows_between,
)

__all__ = ["PrimeRlRouting", "to_prime_rl"]


class PrimeRlRouting(TypedDict):
    """The fields of prime-rl's `RoutedExperts`."""

    data: bytes
    """C-order, little-endian bytes."""
    shape: list[int]
    """`[T, num_layers, K]`."""
    dtype: str
    """uint8 up to 256 experts, else uint16."""


def to_prime_rl(trace: RoutingTrace, *, num_tokens: int) -> PrimeRlRouting:
    """Make the arguments of prime-rl's `RoutedExperts(data, shape, dtype)` of a `TrainingSample`.

    prime-rl demands a row for every token. The last token has none, so the row before it is repeated, as its own
    orchestrator does; no loss depends on it.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of the sample, T, at least 2 unless the trace has the row of the only token.

    Returns:
        `data`, `shape` and `dtype` of `[T, num_layers, K]`, dense layers arange(K).

    Raises:
        ConfigError: `num_tokens` is below 1.
        TraceMismatchError: A row is missing, the trace is longer than the sequence, or there is no row to repeat.
    """
    tokens = checked_num_tokens(trace, num_tokens)
    has_last = trace.end == tokens and bool(trace.valid[-1])
    stop = tokens if has_last else tokens - 1
    rows = rows_between(trace, first=0, stop=stop, target="prime-rl's struct")
    if not has_last:
        if stop == 0:
            raise TraceMismatchError(
                "a sequence of one token has no row, and prime-rl wants one for every token; leave routed_experts out"
            )
        rows = np.concatenate((rows, rows[-1:]))
    every = cast_ids(
        trace, all_layers(trace, rows), trace.ids.dtype.newbyteorder("<"), target="prime-rl"
    )
    return {"data": every.tobytes(), "shape": list(every.shape), "dtype": every.dtype.name}
