"""This package's own engine as the source of a rollout."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from routing_replay.cli.prompts import PromptFile
from routing_replay.cli.resources import model_folder
from routing_replay.cli.rollout_options import RolloutOptions
from routing_replay.cli.sources import OnFailure, SampleSource
from routing_replay.errors import ConfigError

if TYPE_CHECKING:
    from routing_replay.engine import LLM, CompletionOutput, EngineConfig, SamplingParams
    from routing_replay.trace import RolloutSample

__all__ = ["own_engine"]

_DEFAULTS: Mapping[str, object] = {
    "seed": 0,
    "dtype": "bfloat16",
    "device": "auto",
    "max_num_seqs": 128,
    "max_num_batched_tokens": 4096,
}
_FOREIGN = (
    "url",
    "engine_args",
    "served_model",
    "config",
    "api_key_file",
    "max_concurrency",
    "allow_untested_version",
)


def _given(options: RolloutOptions) -> dict[str, object]:
    """All options, with this engine's defaults in place of those that were not given."""
    values = asdict(options)
    return {k: _DEFAULTS.get(k) if v is None else v for k, v in values.items()}


def _settings(
    given: Mapping[str, object], num_prompts: int
) -> tuple["EngineConfig", list["SamplingParams"]]:
    from routing_replay.engine import EngineConfig, SamplingParams

    def same_named(kind: type) -> dict[str, object]:
        return {f.name: given[f.name] for f in fields(kind) if f.name in given}

    engine = same_named(EngineConfig)
    engine.pop("seed")  # every request has its own
    first, n = given["seed"], given["n"]
    assert isinstance(first, int)
    assert isinstance(n, int)
    params = [
        SamplingParams(
            **{**same_named(SamplingParams), "seed": first + index * n, "logprobs": 0}  # pyright: ignore[reportArgumentType]
        )
        for index in range(num_prompts)
    ]
    return EngineConfig(**engine), params  # pyright: ignore[reportArgumentType]


def _in_order(llm: "LLM", prompts: PromptFile) -> list[str | Mapping[str, Sequence[int]]]:
    """The prompts as the engine takes them; conversations through the model's chat template."""
    needs_text = next(iter((*prompts.texts, *prompts.conversations)), None)
    if llm.tokenizer is None and needs_text is not None:
        raise ConfigError(
            f"prompt {needs_text!r} is text, and the model folder has no tokenizer.json; write prompts as "
            "prompt_token_ids"
        )
    rendered: list[str | Mapping[str, Sequence[int]]] = []
    for name in prompts.names:
        if name in prompts.token_ids:
            rendered.append({"prompt_token_ids": prompts.token_ids[name]})
        elif name in prompts.texts:
            rendered.append(prompts.texts[name])
        else:
            assert llm.tokenizer is not None
            rendered.append(llm.tokenizer.render_chat(prompts.conversations[name]))
    return rendered


def _as_sample(
    key: str, prompt_token_ids: tuple[int, ...], completion: "CompletionOutput"
) -> "RolloutSample":
    from routing_replay.trace import RolloutSample

    assert completion.logprobs is not None
    pairs = zip(completion.logprobs, completion.token_ids, strict=True)
    return RolloutSample(
        key=key,
        prompt_token_ids=prompt_token_ids,
        token_ids=completion.token_ids,
        logprobs=tuple(entry[token].logprob for entry, token in pairs),
        trace=completion.routing,
        text=completion.text,
        finish_reason=completion.finish_reason,
    )


def own_engine(options: RolloutOptions, prompts: PromptFile) -> SampleSource:
    """Start the engine of this package.

    Args:
        options: What to run.
        prompts: The prompts.

    Returns:
        The engine, its canary passed.

    Raises:
        ConfigError: An option or a prompt is not accepted, or belongs to another engine.
    """
    from routing_replay.engine import LLM, usable_device

    foreign = [name for name in _FOREIGN if getattr(options, name) not in (None, False)]
    if foreign:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise ConfigError(
            f"{named}: for --engine vllm or sglang, and the engine is routing-replay; leave out, or name the engine"
        )
    given = _given(options)
    given["device"] = str(usable_device(str(given["device"])))
    config, params = _settings(given, len(prompts.names))
    llm = LLM(
        model_folder(options.model),
        dtype=str(given["dtype"]),
        device=str(given["device"]),
        enable_return_routed_experts=True,
        config=config,
    )
    rendered = _in_order(llm, prompts)

    def samples(on_failure: OnFailure) -> Iterator["RolloutSample"]:
        for index, output in llm.generate_each(rendered, params):
            for completion in output.outputs:
                name = prompts.names[index]
                key = name if options.n == 1 else f"{name}/{completion.index}"
                if completion.error is not None:
                    on_failure(key, completion.error)
                    continue
                yield _as_sample(key, output.prompt_token_ids, completion)

    unused = {"json", "output", "prompts", *_FOREIGN}
    facts = {name: value for name, value in given.items() if name not in unused}
    mode = str(llm.core.config.engine.logprobs_mode)
    return SampleSource(facts={**facts, "logprobs_mode": mode}, samples=samples, close=llm.close)
