"""Checks of what goes into one batch."""

from collections.abc import Sequence

from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace._trace import RoutingTrace


def check_one_model(traces: Sequence[RoutingTrace]) -> None:
    """Check that there is a trace, and that all are of one model.

    Raises:
        ConfigError: There is none.
        TraceMismatchError: Two differ in layers, experts or top_k.
    """
    if not traces:
        raise ConfigError("traces is empty; accepted is one or more")
    for position, trace in enumerate(traces):
        for name in ("layer_ids", "num_layers", "num_experts", "top_k"):
            mine, first = getattr(trace, name), getattr(traces[0], name)
            if mine != first:
                raise TraceMismatchError(
                    f"traces[{position}] has {name} = {mine} but traces[0] has {first}; a batch holds traces of one model"
                )


def check_one_length_each(traces: Sequence[RoutingTrace], **lengths: Sequence[int]) -> None:
    """Check that every named sequence has one number for each trace.

    Raises:
        ConfigError: One has more or fewer.
    """
    for name, values in lengths.items():
        if len(values) != len(traces):
            raise ConfigError(
                f"{name} has {len(values)} numbers for {len(traces)} traces; pass one for each"
            )
