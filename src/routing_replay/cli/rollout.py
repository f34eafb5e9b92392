"""`routing-replay rollout`: generate from a file of prompts, and store what a trainer needs."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from routing_replay.cli.prompts import PromptFile, load_prompts
from routing_replay.cli.provenance import versions
from routing_replay.cli.resources import check_device, check_new_folder, model_folder
from routing_replay.errors import ConfigError, RoutingReplayError

if TYPE_CHECKING:
    from routing_replay.engine import LLM, CompletionOutput, EngineConfig, SamplingParams
    from routing_replay.trace import RolloutSample

__all__ = ["RolloutOptions", "run_rollout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """Generate from a file of prompts; store tokens, logprobs and traces in a folder.

    Example: routing-replay rollout tiny-moe prompts.jsonl -o rollout/ --n 4 --max-tokens 128
    """

    model: Positional[Annotated[str, arg(metavar="MODEL")]]
    """A Hugging Face folder or hub name, or tiny-moe for the embedded model."""

    prompts: Positional[Annotated[Path, arg(metavar="PROMPTS")]]
    """JSON lines with "prompt", "messages" or "prompt_token_ids" and optionally "id"; or a .txt, one prompt a line."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="DIR")]
    """A folder that does not exist, or is empty."""

    n: int = 1
    """Completions of each prompt."""

    temperature: float = 1.0
    """0 takes the most probable token."""

    top_p: float = 1.0
    """Sample from the smallest set of tokens that reaches this probability."""

    top_k: int = 0
    """Sample from this many tokens; 0 for all."""

    min_p: float = 0.0
    """Sample from tokens at least this probable relative to the most probable one."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""

    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""

    frequency_penalty: float = 0.0
    """Subtracted once for each time that a token is in the output."""

    max_tokens: int = 256
    """Most tokens of a completion."""

    min_tokens: int = 0
    """Tokens before which nothing ends a completion."""

    stop: tuple[str, ...] = ()
    """Strings that end a completion."""

    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, besides the model's own."""

    ignore_eos: bool = False
    """Go on after the model's own end tokens."""

    seed: int = 0
    """Completion j of prompt i has the seed SEED + i * N + j."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The engine's precision."""

    device: str = "cpu"
    """A torch device."""

    max_num_seqs: int = 128
    """Most completions that run at once."""

    max_num_batched_tokens: int = 4096
    """Most tokens of a step."""

    max_model_len: int | None = None
    """Longest prompt with its completion; the model's limit, at most 8192, if not given."""

    batch_invariant: bool = False
    """Make logprobs independent of what runs beside, bit for bit; slower."""

    codec: Literal["raw", "raw+zstd", "packed", "packed+zstd"] = "raw+zstd"
    """How traces are stored; the packed ones are smaller and drop the order of a row's experts."""

    json: bool = False
    """Print a JSON summary."""


def _same_named(options: RolloutOptions, kind: type) -> dict[str, object]:
    """The options that are fields of an engine's dataclass."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in asdict(options).items() if name in names}


def _settings(
    options: RolloutOptions, num_prompts: int
) -> tuple["EngineConfig", list["SamplingParams"]]:
    from routing_replay.engine import EngineConfig, SamplingParams

    sampling = _same_named(options, SamplingParams)
    engine = _same_named(options, EngineConfig)
    engine.pop("seed")  # every request has its own
    params = [
        SamplingParams(
            **{**sampling, "seed": options.seed + index * options.n, "logprobs": 0}  # pyright: ignore[reportArgumentType]
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


@dataclass(slots=True)
class _Tally:
    """What has been stored so far, and what could not be captured."""

    num_samples: int = 0
    num_tokens: int = 0
    failures: dict[str, str] = field(default_factory=dict[str, str])


def _generate(
    llm: "LLM",
    options: RolloutOptions,
    prompts: PromptFile,
    params: Sequence["SamplingParams"],
    tally: _Tally,
) -> None:
    """Generate into the output folder, counting as samples come to be there."""
    from routing_replay.trace import RolloutWriter

    rendered = _in_order(llm, prompts)
    facts = {
        **{
            name: value for name, value in asdict(options).items() if name not in ("json", "output")
        },
        "prompts": str(options.prompts),
        "num_prompts": len(prompts.names),
        "logprobs_mode": str(llm.core.config.engine.logprobs_mode),
        "versions": versions("torch", "numpy"),
    }
    with RolloutWriter(options.output, facts=facts, codec=options.codec) as writer:
        for index, output in llm.generate_each(rendered, params):
            for completion in output.outputs:
                name = prompts.names[index]
                key = name if options.n == 1 else f"{name}/{completion.index}"
                if completion.error is not None:
                    tally.failures[key] = str(completion.error)
                    continue
                writer.append(_as_sample(key, output.prompt_token_ids, completion))
                tally.num_samples += 1
                tally.num_tokens += len(completion.token_ids)


def run_rollout(options: RolloutOptions) -> int:
    """Generate and store.

    Args:
        options: What to run.

    Returns:
        0, or 1 if the routing of a completion could not be captured; the others are stored.

    Raises:
        ConfigError: An option or a prompt is not accepted; nothing has been written.
    """
    from routing_replay.engine import LLM

    prompts = load_prompts(options.prompts)
    check_new_folder(options.output)
    check_device(options.device)
    config, params = _settings(options, len(prompts.names))
    started = time.perf_counter()
    llm = LLM(
        model_folder(options.model),
        dtype=options.dtype,
        device=options.device,
        enable_return_routed_experts=True,
        config=config,
    )
    tally = _Tally()
    try:
        _generate(llm, options, prompts, params, tally)
    except RoutingReplayError:
        if not tally.num_samples and options.output.exists():
            shutil.rmtree(options.output)  # it was new or empty, and nothing worth keeping is in it
        raise
    failures = tally.failures
    seconds = time.perf_counter() - started
    if options.json:
        summary = {
            "output": str(options.output),
            "num_samples": tally.num_samples,
            "num_tokens": tally.num_tokens,
            "num_failed": len(failures),
            "failures": failures,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(summary))
    else:
        print(
            f"{tally.num_samples} samples, {tally.num_tokens} tokens in {seconds:.1f} s -> {options.output}"
        )
        for key, reason in failures.items():
            print(f"FAILED {key}: {reason}")
        print(f"next: routing-replay audit {options.output} --model {options.model}")
    return 1 if failures else 0
