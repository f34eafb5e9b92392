"""Fields of a request about sampling, under OpenAI's and vLLM's names."""

from typing import Annotated, TypedDict

from pydantic import Field, JsonValue

from routing_replay.engine import SamplingParams
from routing_replay.server.bodies import RequestBody

__all__ = ["IgnoredFields", "SamplingFields", "StopFields", "StreamOptions"]

_MAX_STOP_STRINGS = 64
_MAX_STOP_LENGTH = 4096

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
"""A token; whether the model has it is checked with the prompt."""
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
StopString = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]


class StreamOptions(RequestBody):
    """What a stream holds besides tokens."""

    include_usage: Annotated[
        bool | None, Field(description="End with an event that holds the usage.")
    ] = None
    continuous_usage_stats: Annotated[
        bool | None, Field(description="Give the usage so far in every event.")
    ] = None
    include_obfuscation: Annotated[
        bool | None, Field(description="Accepted, not used: events are never padded.")
    ] = None


class IgnoredFields(RequestBody):
    """Fields of OpenAI's that change nothing here; unknown fields are refused."""

    user: Annotated[str | None, Field(description="Accepted, not used.")] = None
    store: Annotated[bool | None, Field(description="Accepted, not used.")] = None
    metadata: Annotated[
        dict[str, JsonValue] | None, Field(max_length=16, description="Accepted, not used.")
    ] = None
    service_tier: Annotated[str | None, Field(description="Accepted, not used.")] = None
    safety_identifier: Annotated[str | None, Field(description="Accepted, not used.")] = None
    prompt_cache_key: Annotated[str | None, Field(description="Accepted, not used.")] = None
    prompt_cache_retention: Annotated[str | None, Field(description="Accepted, not used.")] = None


class _Stops(TypedDict):
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool


class StopFields(RequestBody):
    """What ends a text besides its length, under names that all protocols share."""

    stop: Annotated[
        StopString | Annotated[list[StopString], Field(max_length=_MAX_STOP_STRINGS)] | None,
        Field(description="A string or strings that end the text."),
    ] = None
    stop_token_ids: Annotated[list[TokenId] | None, Field(max_length=1024)] = None
    ignore_eos: bool = False

    @property
    def stops(self) -> _Stops:
        """The engine's settings that say the same."""
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "stop": tuple(strings),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": self.ignore_eos,
        }


class SamplingFields(StopFields):
    """How to sample; null means the default."""

    n: Annotated[int | None, Field(ge=1, le=128, description="Completions; 1 by default.")] = None
    temperature: Annotated[
        float | None, Field(ge=0.0, le=100.0, description="0 takes the most probable token.")
    ] = None
    top_p: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31, description="0 or -1 for all tokens.")] = (
        None
    )
    min_p: Annotated[float | None, Field(ge=0.0, le=1.0)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0.0, le=100.0)] = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    min_tokens: Annotated[
        int | None, Field(ge=0, lt=2**31, description="Tokens before which nothing ends the text.")
    ] = None
    include_stop_str_in_output: bool = False
    prompt_logprobs: Annotated[
        int | None,
        Field(ge=0, lt=2**31, description="Alternatives to return with each prompt token."),
    ] = None
    skip_special_tokens: Annotated[
        bool, Field(description="Leave special tokens out of the text.")
    ] = True
    return_token_ids: Annotated[
        bool, Field(description="Return the tokens of prompt and completions.")
    ] = False
    return_tokens_as_token_ids: Annotated[
        bool, Field(description='Write tokens of logprobs as "token_id:N".')
    ] = False
    request_id: Annotated[
        RequestId | None, Field(description="Name of the request, for `/abort`.")
    ] = None

    def sampling_params(
        self, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """Return the engine's settings.

        Args:
            max_tokens: Most tokens to generate.
            logprobs: Alternatives per token.
            prompt_logprobs: Alternatives per prompt token.

        Returns:
            Settings with everything that is null left at the engine's default.
        """
        same_named = {
            name: getattr(self, name)
            for name in (
                "n",
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
                "seed",
                "min_tokens",
            )
        }
        given = {name: value for name, value in same_named.items() if value is not None}
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            **self.stops,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
