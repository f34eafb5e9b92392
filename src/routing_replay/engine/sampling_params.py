"""How a request is sampled, under vLLM's names."""

from dataclasses import dataclass

from routing_replay.errors import ConfigError

__all__ = ["SamplingParams"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of a request.

    Attributes:
        temperature: 0 takes the most probable token (ties: the smaller id).
        top_p: Sample from the smallest set of most probable tokens whose probability reaches this, in (0, 1].
        top_k: Sample from this many most probable tokens; 0 or -1 for all.
        seed: Makes the request's tokens depend on nothing but itself; None derives one from the engine's seed.
        max_tokens: Most tokens to generate.
        stop_token_ids: Tokens that end the output, besides the model's own.
        ignore_eos: Go on after the model's own end tokens.
        logprobs: How many most probable alternatives to return with each token's logprob; None for no logprobs.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature}; accepted is a finite number of 0 or more"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p}; accepted is above 0 and at most 1")
        if self.top_k < -1:
            raise ConfigError(
                f"top_k={self.top_k}; accepted is 1 or more, or 0 or -1 for all tokens"
            )
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}; accepted is 1 or more")
        if self.logprobs is not None and self.logprobs < 0:
            raise ConfigError(f"logprobs={self.logprobs}; accepted is 0 or more, or None")
