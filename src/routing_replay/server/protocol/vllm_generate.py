"""Bodies of vLLM's `/inference/v1/generate`: tokens in, tokens out."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from routing_replay.engine import SamplingParams
from routing_replay.server.bodies import RequestBody
from routing_replay.server.protocol.chat import ChatLogprobs
from routing_replay.server.protocol.responses import PromptLogprob, Usage
from routing_replay.server.protocol.sampling import (
    Penalty,
    RequestId,
    StopFields,
    StreamOptions,
    TokenId,
)
from routing_replay.server.routing import ChoiceRouting, RoutingOptions

__all__ = ["EngineVersion", "Generation", "GenerationChunk", "VllmRequest", "VllmSampling"]

_NotSupported = Annotated[None, Field(description="Not supported.")]


class _ExtraArgs(RequestBody):
    """Arguments of other servers' extensions."""

    prl_compact_logprobs: Annotated[
        bool, Field(description="Accepted, not used: logprobs come in their usual form.")
    ] = False


class VllmSampling(StopFields):
    """`sampling_params`, under vLLM's names and with its defaults."""

    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    max_tokens: Annotated[
        int | None, Field(ge=0, lt=2**31, description="As many as fit by default.")
    ] = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    include_stop_str_in_output: bool = False
    logprobs: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    routed_experts_prompt_start: Annotated[
        int | None, Field(ge=0, le=2**31, description="Token index of the first row to return.")
    ] = None
    skip_special_tokens: Annotated[
        bool, Field(description="Of the text in which stop strings are looked for.")
    ] = True
    detokenize: Annotated[bool, Field(description="Accepted, not used: there is no text.")] = True
    spaces_between_special_tokens: Annotated[bool, Field(description="Accepted, not used.")] = True
    flat_logprobs: Annotated[bool, Field(description="Accepted, not used.")] = False
    output_kind: Annotated[int | None, Field(ge=0, le=2, description="Accepted, not used.")] = None
    extra_args: _ExtraArgs | None = None
    truncate_prompt_tokens: _NotSupported = None
    structured_outputs: _NotSupported = None
    logit_bias: Annotated[
        dict[str, JsonValue] | None, Field(max_length=0, description="Not supported.")
    ] = None
    allowed_token_ids: _NotSupported = None
    bad_words: Annotated[list[str] | None, Field(max_length=0, description="Not supported.")] = None

    def params(self, *, max_tokens: int) -> SamplingParams:
        """Return the engine's settings.

        Args:
            max_tokens: Most tokens to generate.

        Returns:
            The settings.

        Raises:
            ConfigError: Two of them do not go together.
        """
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            **self.stops,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


class VllmRequest(RoutingOptions, RequestBody):
    """Tokens to be continued."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 8, "logprobs": 1}}
            ]
        }
    )

    token_ids: Annotated[list[TokenId], Field(min_length=1)]
    sampling_params: VllmSampling = VllmSampling()
    model: Annotated[str | None, Field(max_length=1024)] = None
    request_id: Annotated[
        RequestId | None, Field(description="Name of the request, for `/abort`.")
    ] = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: Annotated[
        bool | None, Field(description="Accepted, not used: token ids are always returned.")
    ] = None
    cache_salt: Annotated[
        str | None,
        Field(
            max_length=1024,
            description="Accepted, not used: prefixes are shared among requests, and forgotten when weights change.",
        ),
    ] = None
    priority: Annotated[int, Field(ge=0, le=0, description="Not supported.")] = 0
    features: _NotSupported = None
    kv_transfer_params: _NotSupported = None
    ec_transfer_params: _NotSupported = None


class GenerationChoice(ChoiceRouting):
    """One completion, or what is new of it."""

    index: int
    token_ids: list[int]
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: int | str | None


class Generation(BaseModel):
    """The response."""

    request_id: str
    model: str
    created: int
    choices: list[GenerationChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None
    kv_transfer_params: None
    weights_version: int


class GenerationChunk(BaseModel):
    """An event of a stream."""

    request_id: str
    choices: list[GenerationChoice]
    usage: Usage | None = None
    weights_version: int


class EngineVersion(BaseModel):
    """The version of the server."""

    version: str
