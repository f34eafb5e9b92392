"""Routing as the trainers take it that want one plain array of all decoder layers."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from routing_replay.errors import ConfigError
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.export._format import OnMissing
from routing_replay.trace.export._rows import (
    all_layers,
    cast_ids,
    checked_num_tokens,
    placed_rows,
    rows_between,
)

__all__ = ["to_areal", "to_miles", "to_ms_swift", "to_slime", "to_verl"]

_Id = TypeVar("_Id", bound=np.integer)


def to_verl(trace: RoutingTrace, *, num_tokens: int) -> npt.NDArray[np.int16]:
    """Make `AgentLoopOutput.routed_experts` (or `TokenOutput.routed_experts`) of verl.

    verl accepts T - 1 rows or T, and replays all but the last token; the row of the last token is left out.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and response, T.

    Returns:
        int16 `[T - 1, num_layers, K]`, dense layers arange(K).

    Raises:
        ConfigError: `num_tokens` is below 1.
        TraceMismatchError: A row is missing, the trace is longer than the sequence, or the model has more than 32768
            experts.
    """
    return _every_row(trace, np.int16, num_tokens=num_tokens, target="verl")


def to_slime(trace: RoutingTrace, *, num_tokens: int) -> npt.NDArray[np.int32]:
    """Make `Sample.rollout_routed_experts` of slime.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and response, T.

    Returns:
        int32 `[T - 1, num_layers, K]`, dense layers arange(K): slime takes a layer of zeros for a lost one.

    Raises:
        ConfigError: `num_tokens` is below 1.
        TraceMismatchError: A row is missing, or the trace is longer than the sequence.
    """
    return _every_row(trace, np.int32, num_tokens=num_tokens, target="slime")


def to_miles(
    trace: RoutingTrace, *, num_tokens: int, on_missing: OnMissing = "error"
) -> npt.NDArray[np.int32]:
    """Make `Sample.rollout_routed_experts` of miles.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and response, T.
        on_missing: "error" refuses missing rows. "arange" writes them as rows of -1, which miles replays as the
            experts 0 to K-1: neither what the engine did nor what the trainer's router would do.

    Returns:
        int32 `[T - 1, num_layers, K]`, dense layers arange(K).

    Raises:
        ConfigError: `num_tokens` is below 1, or the policy is another.
        TraceMismatchError: A row is missing under "error", or the trace is longer than the sequence.
    """
    if on_missing == "error":
        return _every_row(trace, np.int32, num_tokens=num_tokens, target="miles")
    if on_missing != "arange":
        raise ConfigError(
            f"on_missing={on_missing!r} is not offered by miles, which has no row for the trainer's own router; "
            "accepted are error, arange"
        )
    num_rows = checked_num_tokens(trace, num_tokens) - 1
    ids, captured = placed_rows(trace, num_rows=num_rows)
    rows = cast_ids(trace, all_layers(trace, ids), np.int32, target="miles")
    rows[~captured] = -1
    return rows


def to_ms_swift(trace: RoutingTrace, *, num_tokens: int) -> npt.NDArray[np.int64]:
    """Make `RolloutResponseChoice.routed_experts` of ms-swift.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and response, T.

    Returns:
        int64 `[T - 1, num_layers, K]`, dense layers arange(K).

    Raises:
        ConfigError: `num_tokens` is below 1.
        TraceMismatchError: A row is missing, or the trace is longer than the sequence.
    """
    return _every_row(trace, np.int64, num_tokens=num_tokens, target="ms-swift")


def to_areal(trace: RoutingTrace, *, num_tokens: int) -> npt.NDArray[np.int32]:
    """Make `ModelResponse.routed_experts` of AReaL, whose layers and columns share an axis.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and response, T.

    Returns:
        int32 `[T - 1, num_layers * K]`, dense layers arange(K).

    Raises:
        ConfigError: `num_tokens` is below 1.
        TraceMismatchError: A row is missing, or the trace is longer than the sequence.
    """
    rows = _every_row(trace, np.int32, num_tokens=num_tokens, target="AReaL")
    return rows.reshape(len(rows), trace.num_layers * trace.top_k)


def _every_row(
    trace: RoutingTrace, dtype: type[_Id], *, num_tokens: int, target: str
) -> npt.NDArray[_Id]:
    stop = checked_num_tokens(trace, num_tokens) - 1
    rows = rows_between(trace, first=0, stop=stop, target=f"{target}'s array")
    return cast_ids(trace, all_layers(trace, rows), dtype, target=target)
