"""Runs of the weights version: which update of the model routed which rows."""

import itertools
from collections.abc import Sequence
from typing import TypeAlias, cast

from routing_replay.errors import TraceFormatError

WeightsVersion: TypeAlias = tuple[tuple[int, int], ...]

MAX_INT = (1 << 63) - 1


def is_int(value: object, *, low: int = 0, high: int = MAX_INT) -> bool:
    """Tell whether a value is a plain integer (not a bool, not a numpy scalar) in [low, high]."""
    return type(value) is int and low <= value <= high


def check_runs(runs: object, *, start: int, num_rows: int) -> None:
    """Check the form of weights-version runs.

    Args:
        runs: Tuple of `(token_idx, version)` tuples.
        start: Token index of the first row.
        num_rows: Rows that the runs cover.

    Raises:
        TraceFormatError: Not tuples of two integers, or the runs do not cover the rows in the one
            canonical way: first at `start`, strictly increasing, neighbours of different versions.
    """
    form = "weights_version must be a tuple of (token_idx, version) tuples of non-negative integers"
    if not isinstance(runs, tuple):
        raise TraceFormatError(f"{form}, not {type(runs).__name__}")
    checked: list[tuple[int, int]] = []
    for idx, run in enumerate(cast("tuple[object, ...]", runs)):
        pair = cast("tuple[object, ...]", run)
        if not isinstance(run, tuple) or len(pair) != 2 or not all(is_int(x) for x in pair):
            raise TraceFormatError(f"{form}; weights_version[{idx}] = {run!r}")
        checked.append(cast("tuple[int, int]", run))
    _check_cover(checked, start=start, num_rows=num_rows)


def _check_cover(runs: Sequence[tuple[int, int]], *, start: int, num_rows: int) -> None:
    """Check that well-formed runs cover the rows canonically."""
    if num_rows == 0:
        if runs:
            raise TraceFormatError(
                f"weights_version has {len(runs)} runs but the trace has no rows; it must be ()"
            )
        return
    if not runs or runs[0][0] != start:
        raise TraceFormatError(
            f"weights_version begins with {tuple(runs[:1])}, not at the first row; its first"
            f" token_idx must be start = {start}"
        )
    if runs[-1][0] >= start + num_rows:
        raise TraceFormatError(
            f"weights_version has a run at token_idx {runs[-1][0]}, past the last row; rows end at"
            f" token index {start + num_rows}"
        )
    for before, after in itertools.pairwise(runs):
        if after[0] <= before[0] or after[1] == before[1]:
            raise TraceFormatError(
                f"weights_version has neighbouring runs {before} and {after}; token_idx must"
                f" strictly increase and neighbours must have different versions"
            )


def slice_runs(runs: WeightsVersion, *, start: int, stop: int) -> WeightsVersion:
    """Return the runs that cover the token indexes [start, stop), which lie inside `runs`."""
    if start == stop:
        return ()
    before = [version for token_idx, version in runs if token_idx <= start]
    return (
        (start, before[-1]),
        *((token_idx, version) for token_idx, version in runs if start < token_idx < stop),
    )


def join_runs(first: WeightsVersion, second: WeightsVersion) -> WeightsVersion:
    """Append runs of later rows, which joins the neighbours where the version stays the same."""
    if first and second and first[-1][1] == second[0][1]:
        return first + second[1:]
    return first + second
