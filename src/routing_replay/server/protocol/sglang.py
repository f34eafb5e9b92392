"""Bodies of SGLang's `/generate`, and of what its clients ask about a server."""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, RootModel

from routing_replay.engine import SamplingParams
from routing_replay.errors import ConfigError
from routing_replay.server.bodies import RequestBody
from routing_replay.server.protocol.sampling import Penalty, RequestId, StopFields, TokenId
from routing_replay.server.routing import ChoiceRouting, RoutingOptions

__all__ = [
    "SglangFinishReason",
    "SglangMetaInfo",
    "SglangModelInfo",
    "SglangOutput",
    "SglangOutputs",
    "SglangRequest",
    "SglangSampling",
    "SglangServerInfo",
    "each",
]

_T = TypeVar("_T")
_Tokens = Annotated[list[TokenId], Field(min_length=1)]
_TopLogprobs = Annotated[int, Field(ge=0, lt=2**31)]
_StartLen = Annotated[int, Field(ge=-1, lt=2**31)]
_NotSupported = Annotated[None, Field(description="Not supported.")]


class SglangSampling(StopFields):
    """`sampling_params`, under SGLang's names and with its defaults."""

    max_new_tokens: Annotated[
        int | None, Field(ge=0, lt=2**31, description="128 by default, or less where less fits.")
    ] = None
    min_new_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    sampling_seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    no_stop_trim: Annotated[
        bool, Field(description="Keep the stop string, or the token that ended, in the text.")
    ] = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: Annotated[
        bool, Field(description="Accepted, not used: tokenizers decide.")
    ] = True
    stream_interval: Annotated[int | None, Field(ge=1, description="Accepted, not used.")] = None
    json_schema: _NotSupported = None
    regex: _NotSupported = None
    ebnf: _NotSupported = None
    structural_tag: _NotSupported = None
    stop_regex: _NotSupported = None
    logit_bias: Annotated[
        dict[str, JsonValue] | None, Field(max_length=0, description="Not supported.")
    ] = None
    custom_params: Annotated[
        dict[str, JsonValue] | None, Field(max_length=0, description="Not supported.")
    ] = None

    def params(
        self, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """Return the engine's settings.

        Args:
            max_tokens: Most tokens to generate.
            logprobs: Alternatives per token.
            prompt_logprobs: Alternatives per prompt token.

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
            seed=self.sampling_seed,
            max_tokens=max_tokens,
            min_tokens=self.min_new_tokens,
            **self.stops,
            include_stop_str_in_output=self.no_stop_trim,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class SglangRequest(RoutingOptions, RequestBody):
    """A prompt or a batch of prompts; other fields are one for all, or a list with one for each prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "text": "<|user|>12+34=<|assistant|>",
                    "sampling_params": {"max_new_tokens": 16, "temperature": 0.0},
                    "return_logprob": True,
                    "return_routed_experts": True,
                }
            ]
        }
    )

    text: str | Annotated[list[str], Field(min_length=1)] | None = None
    input_ids: _Tokens | Annotated[list[_Tokens], Field(min_length=1)] | None = None
    sampling_params: SglangSampling | list[SglangSampling] | None = None
    rid: Annotated[
        RequestId | list[RequestId] | None, Field(description="Name of the request, for `/abort`.")
    ] = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: Annotated[
        _StartLen | list[_StartLen] | None,
        Field(description="First prompt token with a logprob; -1 for none."),
    ] = None
    top_logprobs_num: _TopLogprobs | list[_TopLogprobs] = 0
    return_text_in_logprobs: bool = False
    stream: bool = False
    log_metrics: Annotated[bool, Field(description="Accepted, not used.")] = True
    priority: Annotated[int | None, Field(ge=0, le=0, description="Not supported.")] = None
    modalities: Annotated[list[str] | None, Field(max_length=0)] = None
    return_hidden_states: Annotated[Literal[False], Field(description="Not supported.")] = False
    background: Literal[False] = False
    token_ids_logprob: _NotSupported = None
    input_embeds: _NotSupported = None
    image_data: _NotSupported = None
    video_data: _NotSupported = None
    audio_data: _NotSupported = None
    lora_path: _NotSupported = None
    session_params: _NotSupported = None
    custom_logit_processor: _NotSupported = None
    data_parallel_rank: Annotated[
        Literal[0] | None, Field(description="There is one replica, 0.")
    ] = None
    bootstrap_host: _NotSupported = None
    bootstrap_port: _NotSupported = None
    bootstrap_room: _NotSupported = None


class SglangFinishReason(BaseModel):
    """How a completion ended."""

    type: Literal["stop", "length", "abort"]
    matched: Annotated[int | str | None, Field(description="What ended it, with `stop`.")] = None
    length: Annotated[int | None, Field(description="Tokens, with `length`.")] = None
    message: Annotated[str | None, Field(description="Why, with `abort`.")] = None


_TokenLogprobs = list[tuple[float | None, int, str | None]]


class _VersionSpan(BaseModel):
    """Sampled tokens [start, end) of one version of the weights."""

    version: str
    start: int
    end: int


class SglangMetaInfo(ChoiceRouting):
    """Everything about a completion but its text and tokens."""

    id: str
    finish_reason: SglangFinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str
    weight_versions: Annotated[
        list[_VersionSpan] | None, Field(description="Where it changed while tokens were sampled.")
    ] = None
    e2e_latency: Annotated[float, Field(description="Seconds.")]
    input_token_logprobs: _TokenLogprobs | None = None
    output_token_logprobs: _TokenLogprobs | None = None
    input_top_logprobs: list[_TokenLogprobs | None] | None = None
    output_top_logprobs: list[_TokenLogprobs | None] | None = None
    routed_experts_start_len: int | None = None


class SglangOutput(BaseModel):
    """A completion; in a stream, all of it so far."""

    text: str
    output_ids: list[int]
    meta_info: SglangMetaInfo
    index: Annotated[int | None, Field(description="Which completion; in streams of several.")] = (
        None
    )


class SglangOutputs(RootModel[SglangOutput | list[SglangOutput]]):
    """One completion for a prompt with n = 1, else a list."""


class SglangServerInfo(BaseModel):
    """What clients of SGLang ask before they send requests."""

    model_config = ConfigDict(protected_namespaces=())

    version: Annotated[str, Field(description="Of routing-replay.")]
    engine: Literal["routing-replay"]
    model_path: str
    served_model_name: str
    max_req_input_len: int
    enable_return_routed_experts: bool
    weight_version: str


class SglangModelInfo(BaseModel):
    """What clients of SGLang ask about the model."""

    model_config = ConfigDict(protected_namespaces=())

    model_path: str
    tokenizer_path: str
    is_generation: Literal[True]
    weight_version: str


def each(value: _T | Sequence[_T], index: int, count: int, *, name: str) -> _T:
    """Return what a field says for one prompt of a batch.

    Args:
        value: One for all, or a list.
        index: Which prompt.
        count: Prompts.
        name: Of the field.

    Returns:
        The prompt's own value.

    Raises:
        ConfigError: The list has another length.
    """
    if not isinstance(value, list):
        return value  # pyright: ignore[reportReturnType] - lists alone are sequences here
    if len(value) != count:
        raise ConfigError(
            f"{name} has {len(value)} entries for {count} prompts; send one for each, or one for all"
        )
    return value[index]
