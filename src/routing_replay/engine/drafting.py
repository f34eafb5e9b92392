"""Where the drafts of a request come from."""

from collections.abc import Callable, Sequence

from routing_replay.engine.config import EngineConfig
from routing_replay.engine.request import Request
from routing_replay.engine.speculation import PromptLookup, SpeculativeConfig

__all__ = ["drafter_of"]


def drafter_of(config: EngineConfig) -> Callable[[Request, int], Sequence[int]] | None:
    """Return what drafts for an engine's requests.

    Args:
        config: Settings of the engine.

    Returns:
        From a request whose tokens are all known, and the most tokens that there is room for, to guesses at its next
        tokens; None where nothing is drafted.
    """
    speculation = config.speculation
    if speculation is None:
        return None
    return _NgramDrafter(speculation) if speculation.method == "ngram" else _drafts_of


def _drafts_of(request: Request, most: int) -> Sequence[int]:
    """What `MtpDrafter` has left with the request."""
    return request.drafts[:most]


class _NgramDrafter:
    """Drafts what followed a request's last tokens when it had them before."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config

    def __call__(self, request: Request, most: int) -> Sequence[int]:
        lookup = request.lookup
        if lookup is None:
            lookup = request.lookup = PromptLookup(request.token_ids, self._config)
        lookup.extend(request.token_ids[lookup.num_tokens :])
        return lookup.propose()[:most]
