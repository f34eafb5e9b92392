"""Rows of a trace as a consumer counts them: from token 0, without gaps, with the layers and the dtype that it wants."""

import operator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace._dtype import IdArray, IntArray, ValidArray
from routing_replay.trace._trace import RoutingTrace

_Id = TypeVar("_Id", bound=np.integer)


def checked_num_tokens(trace: RoutingTrace, num_tokens: int) -> int:
    """Check the content of a trace, and that its rows lie inside a sequence of so many tokens.

    Raises:
        ConfigError: `num_tokens` is below 1.
        TraceFormatError: An id is out of range or repeated in its row.
        TraceMismatchError: The trace has rows of tokens that the sequence does not have.
    """
    tokens = operator.index(num_tokens)
    if tokens < 1:
        raise ConfigError(
            f"num_tokens={tokens}; accepted is 1 or more, the tokens of prompt and completion"
        )
    if trace.end > tokens:
        raise TraceMismatchError(
            f"the trace has a row of token index {trace.end - 1} but num_tokens={tokens}; pass the length of the whole "
            f"sequence, or cut the trace as the tokens were cut, with truncate({tokens})"
        )
    trace.validate()
    return tokens


def checked_first(first: int, *, name: str, limit: int) -> int:
    """Return a first token index if it lies in [0, limit].

    Raises:
        ConfigError: It does not.
    """
    token_idx = operator.index(first)
    if not 0 <= token_idx <= limit:
        raise ConfigError(f"{name}={token_idx}; accepted is a token index in [0, {limit}]")
    return token_idx


def first_missing(trace: RoutingTrace, *, first: int, stop: int) -> int | None:
    """Return the smallest token index in [first, stop) that has no valid row."""
    if first >= stop:
        return None
    if first < trace.start:
        return first
    gaps = np.flatnonzero(~trace.valid[first - trace.start : stop - trace.start])
    if gaps.size:
        return first + int(gaps[0])
    return max(trace.end, first) if trace.end < stop else None


def rows_between(trace: RoutingTrace, *, first: int, stop: int, target: str) -> IdArray:
    """Return the ids of the tokens [first, stop), `[stop - first, L, K]`, a view.

    Raises:
        TraceMismatchError: One of them is missing.
    """
    missing = first_missing(trace, first=first, stop=stop)
    if missing is not None:
        raise TraceMismatchError(
            f"the row of token index {missing} is missing, and {target} cannot say so: a reader would take its filler "
            f"for experts; the trace has the rows [{trace.start}, {trace.end}), of which "
            f"{int(trace.valid.sum())} were captured; merge the missing rows first, or drop the sample"
        )
    return trace.ids[first - trace.start : max(stop, first) - trace.start]


def placed_rows(trace: RoutingTrace, *, num_rows: int) -> tuple[IdArray, ValidArray]:
    """Return the ids of the tokens [0, num_rows) and which of them were captured.

    Rows of tokens that were not captured hold arange(K): distinct ids, as every dispatcher wants them.
    """
    filler = np.arange(trace.top_k, dtype=trace.ids.dtype)
    shape = (num_rows, trace.num_moe_layers, trace.top_k)
    ids = np.empty(shape, dtype=trace.ids.dtype)
    ids[: trace.start] = filler
    ids[trace.start : trace.end] = trace.ids
    ids[trace.end :] = filler
    captured = np.zeros(num_rows, dtype=np.bool_)
    captured[trace.start : trace.end] = trace.valid
    return ids, captured


def cast_ids(
    trace: RoutingTrace, ids: IntArray, dtype: np.dtype[_Id] | type[_Id], *, target: str
) -> npt.NDArray[_Id]:
    """Return ids in a consumer's dtype, in C order, sharing no memory with the trace.

    Raises:
        TraceMismatchError: The dtype cannot hold every expert of the model.
    """
    wanted = np.dtype(dtype)
    largest = int(np.iinfo(wanted).max)
    if trace.num_experts - 1 > largest:
        raise TraceMismatchError(
            f"{target} holds expert ids as {wanted.name}, up to {largest}, but the model has num_experts="
            f"{trace.num_experts}; this target cannot express it"
        )
    return ids.astype(wanted, order="C", copy=True)


def all_layers(trace: RoutingTrace, ids: npt.NDArray[_Id]) -> npt.NDArray[_Id]:
    """Return `[rows, num_layers, K]` of `[rows, L, K]`: dense layers hold arange(K).

    Dense layers have no router that reads them; arange keeps them distinct, in range and not all zero.
    """
    if trace.num_moe_layers == trace.num_layers:
        return ids
    every = np.empty((len(ids), trace.num_layers, trace.top_k), dtype=ids.dtype)
    every[:, list(trace.layer_ids)] = ids
    dense = sorted(set(range(trace.num_layers)) - set(trace.layer_ids))
    every[:, dense] = np.arange(trace.top_k, dtype=ids.dtype)
    return every
