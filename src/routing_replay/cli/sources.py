"""Where the samples of a rollout come from."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routing_replay.errors import RoutingReplayError

if TYPE_CHECKING:
    from routing_replay.trace import RolloutSample

__all__ = ["OnFailure", "SampleSource"]

OnFailure = Callable[[str, RoutingReplayError], None]
"""Is told the key of a completion that failed, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSource:
    """An engine that is ready to generate.

    Attributes:
        facts: What makes the samples, JSON values.
        samples: Generates; gives samples as they end, and tells of those that failed.
        close: Gives the engine back.
    """

    facts: Mapping[str, object]
    samples: Callable[[OnFailure], Iterator["RolloutSample"]]
    close: Callable[[], None]
