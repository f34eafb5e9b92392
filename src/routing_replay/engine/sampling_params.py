"""How a request is sampled, under vLLM's names."""

from dataclasses import dataclass

from routing_replay.errors import ConfigError

__all__ = ["SamplingParams"]

_INFINITY = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of a request.

    Attributes:
        n: Completions of the prompt; they share its computation and differ in their seeds (`seed + index`).
        temperature: 0 takes the most probable token (ties: the smaller id).
        top_p: Sample from the smallest set of most probable tokens whose probability reaches this, in (0, 1].
        top_k: Sample from this many most probable tokens; 0 or -1 for all.
        min_p: Sample from tokens at least this probable relative to the most probable one, in [0, 1].
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or output; 1 for none.
        presence_penalty: Subtracted from the logits of tokens in the output, in [-2, 2].
        frequency_penalty: Subtracted once for each time that a token is in the output, in [-2, 2].
        seed: Makes the request's tokens depend on nothing but itself; None derives one from the engine's seed.
        max_tokens: Most tokens to generate; 0 with `prompt_logprobs` scores the prompt alone.
        min_tokens: Tokens before which no end token, stop token or stop string ends the output.
        stop: Strings that end the output, cut off unless `include_stop_str_in_output`; needs a tokenizer.
        stop_token_ids: Tokens that end the output, besides the model's own.
        include_stop_str_in_output: Keep the stop string in the text.
        ignore_eos: Go on after the model's own end tokens.
        logprobs: How many most probable alternatives to return with each token's logprob; None for no logprobs.
        prompt_logprobs: The same for each prompt token but the first; such a request reads no cached prefix.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty changes logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def __post_init__(self) -> None:
        """Check every value."""
        self._check_numbers()
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError(
                f"stop={self.stop!r}; accepted is a tuple of strings that are not empty"
            )
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ConfigError(
                "max_tokens=0; accepted is 1 or more, or 0 together with prompt_logprobs to score the prompt"
            )
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; accepted is at most that"
            )
        if self.n > 1 and self.max_tokens == 0:
            raise ConfigError(f"n={self.n} with max_tokens=0; accepted is n=1: there is one score")

    def _check_numbers(self) -> None:
        accepted = (
            ("n", self.n >= 1, "1 or more"),
            ("temperature", 0.0 <= self.temperature < _INFINITY, "a finite number of 0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= -1, "1 or more, or 0 or -1 for all tokens"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < _INFINITY, "above 0, finite"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "in [0, 2^63), or None"),
            ("max_tokens", self.max_tokens >= 0, "1 or more"),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more, or None"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or self.prompt_logprobs >= 0,
                "0 or more, or None",
            ),
        )
        for name, is_accepted, wanted in accepted:
            if not is_accepted:
                raise ConfigError(f"{name}={getattr(self, name)}; accepted is {wanted}")
