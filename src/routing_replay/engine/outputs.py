"""What a request returns, under vLLM's names."""

from dataclasses import dataclass

from routing_replay.capture import CapturedRows
from routing_replay.errors import ConfigError, RoutingReplayError
from routing_replay.trace import RoutingTrace

__all__ = ["CompletionOutput", "Logprob", "RequestOutput"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of a token at one position.

    Attributes:
        logprob: Natural logarithm.
        rank: 1 for the most probable token.
        decoded_token: Its text, None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion.

    Attributes:
        index: Which completion of the request.
        text: Decoded tokens, without special ones and, unless asked for, without the stop string; empty without a
            tokenizer.
        token_ids: Generated tokens, a stop token included.
        cumulative_logprob: Sum of the tokens' logprobs; None if none were asked for.
        logprobs: Per token: the sampled token and the alternatives asked for.
        finish_reason: `"stop"`, `"length"`, `"abort"`, or `"error"`.
        stop_reason: The token or string that ended the output, if it is not the model's own end token.
        error: Why the request failed, if it did.
        captured: Its rows, if capture was on and the request did not fail; `routing` makes the trace of them.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str
    stop_reason: int | str | None = None
    error: RoutingReplayError | None = None
    captured: CapturedRows | None = None

    @property
    def routing(self) -> RoutingTrace:
        """The trace of prompt and completion: a row for every token but the last; made when it is first asked for.

        Raises:
            RoutingReplayError: The request failed; this is its error.
            ConfigError: The engine does not capture.
        """
        if self.error is not None:
            raise self.error
        if self.captured is None:
            raise ConfigError(
                "routing was not captured; make the engine with LLM(..., enable_return_routed_experts=True)"
            )
        return self.captured.trace


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Attributes:
        request_id: Unique in the engine.
        prompt: The prompt's text, None if it came as tokens.
        prompt_token_ids: The prompt's tokens.
        outputs: Its completions.
        finished: Always True for `LLM.generate`.
        num_cached_tokens: Prompt tokens whose KV blocks and routing rows came from the prefix cache.
        num_preemptions: How often its completions gave their KV blocks back and were computed again.
        num_draft_tokens: Drafts that its completions had computed; 0 without speculation. Names as in vLLM's
            `SpecDecodingStats`.
        num_accepted_tokens: Those of them that are among the completions' tokens.
        prompt_logprobs: Per prompt token: the token and the alternatives asked for; None for the first token, and
            None as a whole where none were asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool = True
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
