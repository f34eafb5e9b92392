"""Speculation: its settings, drafts by prompt lookup, and what the model makes of drafts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from routing_replay.errors import ConfigError

__all__ = ["PromptLookup", "SpeculativeConfig", "propose", "verify"]

_METHODS = ("ngram", "mtp")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are drafted; names are vLLM's.

    Attributes:
        method: `"ngram"` looks for the last tokens earlier in the request and drafts what came after them; `"mtp"` runs the
            checkpoint's own layers for it, one for each token.
        num_speculative_tokens: Most tokens of a draft; with `"mtp"` at most config.json's `num_nextn_predict_layers`.
        prompt_lookup_max: Most tokens to match, for `"ngram"`.
        prompt_lookup_min: Fewest tokens to match, for `"ngram"`.
    """

    method: str = "ngram"
    num_speculative_tokens: int = 3
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 1

    def __post_init__(self) -> None:
        """Check every value."""
        if self.method not in _METHODS:
            raise ConfigError(
                f"method={self.method!r}; accepted are {', '.join(map(repr, _METHODS))}"
            )
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; accepted is 1 or more")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min={self.prompt_lookup_min} is above prompt_lookup_max={self.prompt_lookup_max}; "
                "accepted is at most that"
            )

    @property
    def num_layers(self) -> int:
        """Layers of the model that draft, each with keys and values of its own."""
        return self.num_speculative_tokens if self.method == "mtp" else 0

    @classmethod
    def of(cls, settings: "Mapping[str, object] | SpeculativeConfig") -> "SpeculativeConfig":
        """Make a configuration of a mapping, as vLLM's `speculative_config=` takes it.

        Args:
            settings: Names and values, or a configuration, which is returned as it is.

        Returns:
            The configuration.

        Raises:
            ConfigError: A name is unknown or a value is not accepted.
        """
        if isinstance(settings, SpeculativeConfig):
            return settings
        accepted = {item.name: type(item.default) for item in fields(cls)}
        for name, value in settings.items():
            if name not in accepted:
                raise ConfigError(
                    f"speculative_config has {name!r}; accepted are {', '.join(accepted)}"
                )
            if type(value) is not accepted[name]:
                raise ConfigError(
                    f"speculative_config has {name}={value!r}; accepted is of type {accepted[name].__name__}"
                )
        return cls(**settings)  # pyright: ignore[reportArgumentType]


class PromptLookup:
    """Drafts of one request; its tokens are kept as an array, so that a step costs one pass over it.

    Args:
        token_ids: The tokens so far.
        config: How to draft.
    """

    def __init__(self, token_ids: Sequence[int], config: SpeculativeConfig) -> None:
        self._config = config
        self._num_tokens = 0
        self._tokens = np.empty(2 * len(token_ids) + 64, np.int32)
        self.extend(token_ids)

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return self._num_tokens

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append accepted tokens."""
        end = self._num_tokens + len(token_ids)
        if end > len(self._tokens):
            grown = np.empty(2 * end, np.int32)
            grown[: self._num_tokens] = self._tokens[: self._num_tokens]
            self._tokens = grown
        self._tokens[self._num_tokens : end] = token_ids
        self._num_tokens = end

    def propose(self) -> list[int]:
        """Return a draft of the tokens that may come next, possibly empty."""
        return propose(self._tokens[: self._num_tokens], self._config)


def propose(token_ids: Sequence[int] | NDArray[np.integer], config: SpeculativeConfig) -> list[int]:
    """Draft the tokens that followed the last ones when these occurred before.

    The longest match counts; among equally long ones the latest that a whole draft follows, or else the first.

    Args:
        token_ids: Prompt and output so far; an array is not copied.
        config: How to draft.

    Returns:
        At most `num_speculative_tokens` tokens; none without a match of `prompt_lookup_min` tokens.
    """
    tokens = np.asarray(token_ids)
    if len(tokens) < 2:
        return []
    # Places of the last token of a match; longer matches are found among them.
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    length = 1 if len(ends) else 0
    while length and length < config.prompt_lookup_max:
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    if length < config.prompt_lookup_min:
        return []
    count = config.num_speculative_tokens
    followed = np.flatnonzero(ends + count < len(tokens))
    start = int(ends[followed[-1]] if len(followed) else ends[0]) + 1
    return tokens[start : start + count].tolist()


def verify(drafts: Sequence[int], sampled: Sequence[int]) -> list[int]:
    """Return the tokens that a request gains from a draft.

    The model samples a token at every place of the draft, each with its own number, as it would without a draft; up to
    the first difference these are the tokens that it would have sampled one by one. So nothing is approximate, whether
    tokens are drawn or the most probable ones.

    Args:
        drafts: The draft.
        sampled: The model's own token at each place of the draft, and the one after it.

    Returns:
        The sampled tokens up to and including the first that differs from the draft; all where none does.

    Raises:
        ConfigError: There is not one sampled token more than there are drafts.
    """
    if len(sampled) != len(drafts) + 1:
        raise ConfigError(
            f"{len(sampled)} sampled tokens for {len(drafts)} drafts; accepted is one more than there are drafts"
        )
    kept = 0
    while kept < len(drafts) and drafts[kept] == sampled[kept]:
        kept += 1
    return list(sampled[: kept + 1])
