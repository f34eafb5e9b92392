"""Token-index ranges of a trace, checked before anything is cut."""

import operator

from routing_replay.errors import ConfigError


def checked_range(start: int, stop: int, *, first: int, end: int) -> tuple[int, int]:
    """Return [start, stop) as plain integers if it lies in the token indexes [first, end).

    Raises:
        ConfigError: The range is reversed or leaves the trace.
    """
    lower, upper = operator.index(start), operator.index(stop)
    if not first <= lower <= upper <= end:
        raise ConfigError(
            f"slice [{lower}, {upper}) is not inside the trace, whose rows are the token indexes"
            f" [{first}, {end}); pass {first} <= start <= stop <= {end}"
        )
    return lower, upper


def truncated_end(num_tokens: int, *, first: int, end: int) -> int:
    """Return the end of a trace with rows [first, end) after its sequence is cut.

    Raises:
        ConfigError: `num_tokens` is below 1, or leaves no token of the trace.
    """
    kept = operator.index(num_tokens)
    if kept < 1 or kept <= first:
        raise ConfigError(
            f"truncate({kept}) leaves nothing of the trace, whose rows are the token indexes"
            f" [{first}, {end}); pass num_tokens >= {first + 1}"
        )
    return min(kept, end)
