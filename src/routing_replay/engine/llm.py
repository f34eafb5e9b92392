"""`LLM`: offline generation, under vLLM's names."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from routing_replay.engine.config import EngineConfig
from routing_replay.engine.core import EngineCore
from routing_replay.engine.outputs import CompletionOutput, Logprob, RequestOutput
from routing_replay.engine.request import Request
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.engine.tokenizer import ModelTokenizer, load_tokenizer
from routing_replay.errors import ConfigError
from routing_replay.trace import RoutingTrace

__all__ = ["LLM", "Prompt"]

Prompt = str | Sequence[int] | Mapping[str, Sequence[int]]
"""Text, token ids, or vLLM's `{"prompt_token_ids": [...]}`."""

_T = TypeVar("_T")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class LLM:
    """An engine that generates offline and returns the routing with the tokens.

    Args:
        model: A Hugging Face Qwen3-MoE folder; one without a tokenizer takes token-id prompts.
        dtype: `"bfloat16"` or `"float32"`.
        device: A torch device.
        enable_return_routed_experts: Capture the routing of every request; None leaves it to `config`.
        config: All other settings.

    Raises:
        ConfigError: A setting is not accepted, or the folder cannot be read.
        UnsupportedModelError: The model is of another family.
        CaptureError: The start-up canary failed: a layer does not record its routing.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        enable_return_routed_experts: bool | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r}; accepted are {', '.join(map(repr, _DTYPES))}")
        config = config or EngineConfig()
        if enable_return_routed_experts is not None:
            config = replace(config, enable_return_routed_experts=enable_return_routed_experts)
        folder = Path(model)
        self.tokenizer: ModelTokenizer | None = load_tokenizer(folder)
        self.core = EngineCore(
            folder, dtype=_DTYPES[dtype], device=torch.device(device), config=config
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        replay: RoutingTrace | Sequence[RoutingTrace | None] | None = None,
    ) -> list[RequestOutput]:
        """Generate one completion for each prompt.

        Args:
            prompts: One prompt, or a sequence of them (a sequence of integers is one prompt).
            sampling_params: For all prompts, or one each.
            replay: Traces to force, one for each prompt (None: native). A trace starts at token 0, belongs to the
                prompt's tokens as far as it covers them (checked), and covers every token that can become an input:
                `prompt + max_tokens - 1` rows. Generated tokens take its rows whatever they turn out to be.

        Returns:
            Finished requests, in the order of the prompts. A request whose routing was not captured has
            `finish_reason="error"`, and its `routing` raises.

        Raises:
            ConfigError: A prompt or a setting is not accepted; nothing has been generated.
            TraceMismatchError: A trace belongs to other tokens or another model, or is too short.

        Runtime: synchronous; safe against interruption: blocks and rows of dropped requests are freed.
        """
        items = _as_prompts(prompts)
        params = _one_each(
            "sampling_params", sampling_params or SamplingParams(), SamplingParams, items
        )
        traces = _one_each("replay", replay, RoutingTrace, items)
        requests: list[Request] = []
        for item, settings, trace in zip(items, params, traces, strict=True):
            text, token_ids = self._tokens_of(item)
            request = self.core.make_request(
                token_ids, settings or SamplingParams(), prompt=text, replay=trace
            )
            requests.append(request)
        finished = self.core.run(requests)
        return [self._output(request, finished[request.request_id]) for request in requests]

    def chat(
        self,
        messages: Sequence[Sequence[Mapping[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate the assistant's next turn of each conversation.

        Args:
            messages: Conversations of `{"role": ..., "content": ...}`.
            sampling_params: For all conversations, or one each.

        Returns:
            As `generate`.

        Raises:
            ConfigError: The model has no tokenizer or chat template, or as `generate`.
        """
        if self.tokenizer is None:
            raise ConfigError(
                "the model folder has no tokenizer.json; pass token ids to generate()"
            )
        return self.generate(
            [self.tokenizer.render_chat(turns) for turns in messages], sampling_params
        )

    def _tokens_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError(
                    "the model folder has no tokenizer.json, so that text prompts cannot be read; pass token ids"
                )
            return prompt, self.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            if set(prompt) != {"prompt_token_ids"}:
                raise ConfigError(
                    f"a prompt has keys {sorted(prompt)}; accepted is {{'prompt_token_ids': [...]}}"
                )
            prompt = prompt["prompt_token_ids"]
        return None, [int(token) for token in prompt]

    def _output(self, request: Request, captured: RoutingTrace | None) -> RequestOutput:
        token_ids = tuple(request.output_ids)
        with_logprobs = request.params.logprobs is not None
        logprobs = (
            tuple(self._with_text(entry) for entry in request.logprobs) if with_logprobs else None
        )
        total = (
            None
            if logprobs is None
            else sum(entry[token].logprob for entry, token in zip(logprobs, token_ids, strict=True))
        )
        completion = CompletionOutput(
            index=0,
            text="" if self.tokenizer is None else self.tokenizer.decode(token_ids),
            token_ids=token_ids,
            cumulative_logprob=total,
            logprobs=logprobs,
            finish_reason=request.finish_reason or "error",
            stop_reason=request.stop_reason,
            error=request.error,
            captured=captured,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=tuple(request.token_ids[: request.num_prompt_tokens]),
            outputs=(completion,),
            num_cached_tokens=request.num_cached,
        )

    def _with_text(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        if self.tokenizer is None:
            return entry
        decode = self.tokenizer.decode
        return {
            token: replace(value, decoded_token=decode([token])) for token, value in entry.items()
        }


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a text, a mapping, or a non-empty sequence of integers is one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [prompts]  # pyright: ignore[reportReturnType] - a sequence of integers, as just seen
    return items  # pyright: ignore[reportReturnType]


def _one_each(
    name: str, value: _T | Sequence[_T | None] | None, kind: type[_T], prompts: Sequence[Prompt]
) -> list[_T | None]:
    """Spread one value over all prompts, or check that there is one for each."""
    if value is None or isinstance(value, kind):
        return [value] * len(prompts)
    values: list[_T | None] = list(value)  # pyright: ignore[reportArgumentType]
    if len(values) != len(prompts):
        raise ConfigError(
            f"{name} has {len(values)} entries for {len(prompts)} prompts; pass one for each, or one for all"
        )
    return values
