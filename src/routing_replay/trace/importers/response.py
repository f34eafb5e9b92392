"""Whole responses of engines, as they come over HTTP: find the routing, the tokens, and the format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from routing_replay.errors import RoutingDiagnosisError, TraceFormatError
from routing_replay.trace._model_routing import ModelRouting
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.importers._finding import Finding
from routing_replay.trace.importers.sglang import import_sglang
from routing_replay.trace.importers.trainers import import_megatron, import_nemo_rl
from routing_replay.trace.importers.vllm import import_vllm, import_vllm_split

__all__ = ["ImportedChoice", "import_response"]

_Object = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportedChoice:
    """One completion of a response.

    Attributes:
        index: Its position.
        source: Whose form the routing had: `"vllm"`, `"sglang"`, `"nemo-rl"` or `"megatron"`.
        prompt_token_ids: The prompt.
        token_ids: The completion.
        logprobs: Of each completion token, or None where the response has none.
        trace: The routing.
    """

    index: int
    source: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    trace: RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What was found of one completion before its routing is imported."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    source: str
    load: Callable[[], RoutingTrace]


def import_response(
    response: Mapping[str, object] | Sequence[object],
    *,
    routing: ModelRouting,
    prompt_token_ids: Sequence[int] | None = None,
    start: int = 0,
) -> list[ImportedChoice]:
    """Import every completion of a response.

    Knows vLLM's `/v1/completions`, `/v1/chat/completions` (with `return_token_ids`) and `/inference/v1/generate`, in all
    three forms of the routing; SGLang's `/generate` and its OpenAI routes' `sglext`; NeMo-RL's messages; Megatron's
    `moe_topk_indices`.

    Args:
        response: The decoded JSON.
        routing: The model.
        prompt_token_ids: The prompt, where the response does not repeat it.
        start: The request's `routed_experts_prompt_start` or `routed_experts_start_len`.

    Returns:
        One entry for each completion, in order.

    Raises:
        RoutingDiagnosisError: The routing of a completion cannot be right, or is not there.
        TraceFormatError: The response is of no known form, or lacks token ids.
    """
    prompt = None if prompt_token_ids is None else tuple(prompt_token_ids)
    choices: list[_Choice] = []
    for body in response if isinstance(response, Sequence) else [response]:
        reader = _Reader(_object(body, "response"), routing, prompt, start)
        choices += reader.choices()
    return [
        ImportedChoice(
            index=index,
            source=choice.source,
            prompt_token_ids=choice.prompt,
            token_ids=choice.completion,
            logprobs=choice.logprobs,
            trace=choice.load(),
        )
        for index, choice in enumerate(choices)
    ]


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the completions of one JSON object."""

    body: _Object
    routing: ModelRouting
    prompt: tuple[int, ...] | None
    start: int

    def choices(self) -> list[_Choice]:
        """Every completion, whoever sent it."""
        if "meta_info" in self.body:
            return [self._sglang()]
        listed = self.body.get("choices")
        if not isinstance(listed, list) or not listed:
            raise TraceFormatError(
                f"the response has keys {sorted(self.body)}; accepted are responses with choices (vLLM, OpenAI form) or "
                "meta_info (SGLang)"
            )
        return [
            self._choice(_object(item, f"choices[{index}]"), index)
            for index, item in enumerate(listed)
        ]

    def _sglang(self) -> _Choice:
        meta = _object(self.body["meta_info"], "meta_info")
        prompt = self._prompt(self.body.get("input_ids"), self.body.get("prompt_token_ids"))
        completion = _tokens(self.body.get("output_ids"), "output_ids")
        start = meta.get("routed_experts_start_len", self.start)
        scored = meta.get("output_token_logprobs")
        logprobs = None
        if isinstance(scored, list):
            logprobs = tuple(float(cast("list[float]", entry)[0]) for entry in scored)
        field = _present(meta.get("routed_experts"), "meta_info.routed_experts")
        return _Choice(
            prompt=prompt,
            completion=completion,
            logprobs=logprobs,
            source="sglang",
            load=lambda: import_sglang(
                field,  # pyright: ignore[reportArgumentType] - checked by the importer
                token_ids=[*prompt, *completion],
                routing=self.routing,
                start_len=cast("int", start),
            ),
        )

    def _choice(self, choice: _Object, index: int) -> _Choice:
        message = choice.get("message")
        spoken = _object(message, "message") if isinstance(message, dict) else {}
        prompt = self._prompt(
            choice.get("prompt_token_ids"),
            self.body.get("prompt_token_ids"),
            spoken.get("prompt_token_ids"),
        )
        found = choice.get("token_ids") or spoken.get("generation_token_ids")
        completion = _tokens(found, f"choices[{index}].token_ids")
        source, load = self._routing(choice, spoken, index, prompt, completion)
        return _Choice(
            prompt=prompt,
            completion=completion,
            logprobs=_logprobs(choice.get("logprobs")),
            source=source,
            load=load,
        )

    def _routing(
        self,
        choice: _Object,
        message: _Object,
        index: int,
        prompt: tuple[int, ...],
        completion: tuple[int, ...],
    ) -> tuple[str, Callable[[], RoutingTrace]]:
        """Whose form the routing has, and how to import it."""
        tokens = [*prompt, *completion]
        told = message.get("routed_experts", choice.get("routed_experts"))
        if isinstance(told, str) and told.startswith("nrlre1:"):
            return "nemo-rl", lambda: import_nemo_rl(told, token_ids=tokens, routing=self.routing)
        indices = choice.get("moe_topk_indices")
        if indices is not None:
            return "megatron", lambda: import_megatron(
                cast("list[object]", indices), token_ids=tokens, routing=self.routing
            )
        extension = self.body.get("sglext")
        if isinstance(extension, dict) and told is None:
            field = _present(self._of_first(extension, index), "sglext.routed_experts")
            return "sglang", lambda: import_sglang(
                cast("str", field), token_ids=tokens, routing=self.routing, start_len=self.start
            )
        of_prompt = self.body.get("prompt_routed_experts")
        if of_prompt is not None:
            return "vllm", lambda: import_vllm_split(
                cast("str", of_prompt),
                cast("str | None", told),
                prompt_token_ids=prompt,
                token_ids=tokens,
                routing=self.routing,
            )
        field = _present(told, f"choices[{index}].routed_experts")
        return "vllm", lambda: import_vllm(
            cast("str", field), token_ids=tokens, routing=self.routing, prompt_start=self.start
        )

    def _of_first(self, extension: _Object, index: int) -> object:
        """SGLang's OpenAI routes return the routing of the first completion alone."""
        return extension.get("routed_experts") if index == 0 else None

    def _prompt(self, *candidates: object) -> tuple[int, ...]:
        for candidate in candidates:
            if candidate is not None:
                return _tokens(candidate, "prompt_token_ids")
        if self.prompt is None:
            raise TraceFormatError(
                "the response does not hold prompt_token_ids; ask the engine for them (vLLM: return_token_ids), or pass "
                "them as prompt_token_ids"
            )
        return self.prompt


def _object(value: object, name: str) -> _Object:
    if not isinstance(value, Mapping):
        raise TraceFormatError(f"{name} is a {type(value).__name__}; accepted is a JSON object")
    return cast("_Object", value)


def _tokens(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
        given = "missing" if value is None else f"a {type(value).__name__}, or holds no integers"
        raise TraceFormatError(
            f"{name} is {given}; routing is bound to token ids: ask the engine for them (vLLM: return_token_ids; SGLang "
            "returns output_ids)"
        )
    return tuple(cast("Sequence[int]", value))


def _present(value: object, name: str) -> object:
    """Refuse a field that the engine left out."""
    if value is None:
        raise RoutingDiagnosisError(
            f"{name} is missing",
            (
                Finding(
                    code="no_routing",
                    message=f"{name} is null or not there",
                    cause="the server was started without --enable-return-routed-experts, the request did not ask (SGLang: "
                    "return_routed_experts), or a proxy dropped the field (SGLang's OpenAI routes return it for the first "
                    "completion alone)",
                    upstream=("sglang#20696",),
                ),
            ),
        )
    return value


def _logprobs(value: object) -> tuple[float, ...] | None:
    """The logprobs of the completion's tokens in either of OpenAI's forms."""
    if not isinstance(value, dict):
        return None
    listed = value.get("token_logprobs")
    if isinstance(listed, list):
        return tuple(float(item) for item in listed)
    content = value.get("content")
    if isinstance(content, list):
        return tuple(float(_object(entry, "logprobs.content")["logprob"]) for entry in content)  # pyright: ignore[reportArgumentType]
    return None
