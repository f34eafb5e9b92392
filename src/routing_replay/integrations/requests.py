"""What is asked of a foreign engine, under the field's own names."""

from collections.abc import Sequence
from dataclasses import dataclass

from routing_replay.errors import ConfigError

__all__ = ["RolloutRequest", "SamplingSettings", "check_keys", "sample_key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """A prompt by its tokens.

    Attributes:
        key: Unique among the requests of a rollout.
        prompt_token_ids: The prompt, at least one token.
    """

    key: str
    prompt_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ConfigError(f"request {self.key!r} has no token; pass a prompt of at least one")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How every request of a rollout is sampled.

    There is no seed: engines draw from one stream for the batch, and a seed of its own for each request stops vLLM's
    CPU build 0.30.0 where a prompt is prefilled in chunks. Every value is sent, so that no default of the server or of the model's
    generation_config.json takes its place.

    Attributes:
        n: Completions of each prompt.
        temperature: 0 takes the most probable token.
        top_p: Sample from the smallest set of tokens that reaches this probability.
        top_k: Sample from this many tokens; 0 or -1 for all.
        min_p: Sample from tokens at least this probable relative to the most probable one.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or output.
        presence_penalty: Subtracted from the logits of tokens in the output.
        frequency_penalty: Subtracted once for each time that a token is in the output.
        max_tokens: Most tokens of a completion.
        min_tokens: Tokens before which nothing ends a completion.
        stop: Strings that end a completion.
        stop_token_ids: Tokens that end a completion, besides the model's own.
        ignore_eos: Go on after the model's own end tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("n", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; accepted is 1 or more")


def sample_key(request_key: str, index: int, n: int) -> str:
    """Return the key of a completion.

    Args:
        request_key: Key of its request.
        index: Which completion of the request.
        n: Completions of the request.

    Returns:
        The request's own key where it has one completion, else `KEY/INDEX`.
    """
    return request_key if n == 1 else f"{request_key}/{index}"


def check_keys(requests: Sequence[RolloutRequest]) -> None:
    """Refuse requests that share a key.

    Args:
        requests: The requests of a rollout.

    Raises:
        ConfigError: Two have the same key.
    """
    seen: set[str] = set()
    for request in requests:
        if request.key in seen:
            raise ConfigError(f"key {request.key!r} is in use by two requests; keys are unique")
        seen.add(request.key)
