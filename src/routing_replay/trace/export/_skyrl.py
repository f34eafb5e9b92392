"""Routing as SkyRL takes it: a prefix of rows that covers every token with a loss, in the narrowest of three dtypes."""

import base64
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace._dtype import IntArray
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.export._rows import (
    all_layers,
    checked_first,
    checked_num_tokens,
    first_missing,
    rows_between,
)

__all__ = ["SkyRlRouting", "to_skyrl", "to_skyrl_generate"]

_SkyRlArray = npt.NDArray[np.uint8 | np.int16 | np.int32]


class SkyRlRouting(TypedDict):
    """`routed_experts` of a choice of SkyRL's `/skyrl/v1/generate`."""

    data: str
    """base64 of the C-order, little-endian bytes."""
    shape: list[int]
    """`[rows, num_layers, K]`."""
    dtype: str
    """uint8, int16 or int32."""


def to_skyrl(
    trace: RoutingTrace, *, num_tokens: int, loss_mask: Sequence[int] | None = None
) -> _SkyRlArray:
    """Make one entry of `rollout_expert_indices` of SkyRL's generator output.

    SkyRL replays a prefix of the sequence and gives the tokens after it dummy experts, which is right for tokens
    without a loss alone.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and response, T.
        loss_mask: For each of the T tokens, whether it is a target of the loss. The prefix may then end at the first
            missing row after which no token is a target. `None` demands the T - 1 rows.

    Returns:
        `[rows, num_layers, K]`, rows <= T - 1, dense layers arange(K); uint8, int16 or int32, the first that holds the
        largest id *present*, which SkyRL checks.

    Raises:
        ConfigError: `num_tokens` is below 1, or `loss_mask` has another length.
        TraceMismatchError: A row is missing that a target needs, no row is left, or the trace is longer than the
            sequence.
    """
    stop = checked_num_tokens(trace, num_tokens) - 1
    if loss_mask is not None:
        stop = _prefix_for(trace, stop=stop, loss_mask=loss_mask)
    rows = rows_between(trace, first=0, stop=stop, target="SkyRL's array")
    if not len(rows):
        raise TraceMismatchError(
            f"no row precedes token index {stop + 1}, and SkyRL wants at least one for every sample; drop the sample"
        )
    return _narrow(trace, all_layers(trace, rows))


def to_skyrl_generate(
    trace: RoutingTrace, *, num_tokens: int, prompt_start: int = 0
) -> SkyRlRouting:
    """Make the routing of a choice of SkyRL's `/skyrl/v1/generate`.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and response, T.
        prompt_start: The request's `routed_experts_prompt_start`; the answer does not carry it.

    Returns:
        `data`, `shape` and `dtype` of the T - 1 - prompt_start rows; the dtype is as in `to_skyrl`.

    Raises:
        ConfigError: `num_tokens` or `prompt_start` is out of range.
        TraceMismatchError: A row is missing, or the trace is longer than the sequence.
    """
    stop = checked_num_tokens(trace, num_tokens) - 1
    first = checked_first(prompt_start, name="prompt_start", limit=stop)
    rows = _narrow(
        trace,
        all_layers(trace, rows_between(trace, first=first, stop=stop, target="SkyRL's field")),
    )
    data = rows.astype(rows.dtype.newbyteorder("<")).tobytes()
    return {
        "data": base64.b64encode(data).decode("ascii"),
        "shape": list(rows.shape),
        "dtype": rows.dtype.name,
    }


def _prefix_for(trace: RoutingTrace, *, stop: int, loss_mask: Sequence[int]) -> int:
    """Rows up to the first missing one, if no later token is a target; else all rows, so that the gap is refused."""
    if len(loss_mask) != stop + 1:
        raise ConfigError(
            f"loss_mask has {len(loss_mask)} entries for {stop + 1} tokens; pass one for each token, prompt included"
        )
    missing = first_missing(trace, first=0, stop=stop)
    if missing is None or np.any(np.asarray(loss_mask[missing + 1 :])):
        return stop
    return missing


def _narrow(trace: RoutingTrace, ids: IntArray) -> _SkyRlArray:
    largest = int(ids.max(initial=0))
    if largest <= np.iinfo(np.uint8).max:
        return ids.astype(np.uint8, order="C", copy=True)
    kind = np.int16 if largest <= np.iinfo(np.int16).max else np.int32
    return ids.astype(kind, order="C", copy=True)
