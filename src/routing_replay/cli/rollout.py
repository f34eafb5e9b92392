"""`routing-replay rollout`: generate from a file of prompts, and store what a trainer needs."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from routing_replay.errors import ConfigError

__all__ = ["RolloutOptions", "load_prompts", "run_rollout"]

EMBEDDED = "tiny-moe"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """Generate from a file of prompts; store tokens, logprobs and traces in a folder.

    Example: routing-replay rollout tiny-moe prompts.jsonl -o rollout/ --n 4 --max-tokens 128
    """

    model: Positional[str]
    """A Hugging Face folder or hub name, or tiny-moe for the embedded model."""

    prompts: Positional[Path]
    """JSON lines with "prompt", "messages" or "prompt_token_ids" and optionally "id"; or a .txt, one prompt a line."""

    output: Annotated[Path, arg(aliases=["-o"])]
    """A folder that does not exist yet."""

    n: int = 1
    """Completions of each prompt."""

    temperature: float = 1.0
    """0 takes the most probable token."""

    top_p: float = 1.0
    """Sample from the smallest set of tokens that reaches this probability."""

    top_k: int = 0
    """Sample from this many tokens; 0 for all."""

    max_tokens: int = 256
    """Most tokens of a completion."""

    seed: int = 0
    """Seed of the first completion; prompt i, completion j gets seed + i * n + j."""

    dtype: str = "bfloat16"
    """bfloat16 or float32."""

    device: str = "cpu"
    """A torch device."""

    codec: str = "raw+zstd"
    """How traces are stored: raw, raw+zstd, or packed, packed+zstd, which drop the order of a row's experts."""

    json: bool = False
    """Print a JSON summary."""


def _prompt_of(line: str, where: str) -> tuple[str | None, object]:
    try:
        value = json.loads(line)
    except ValueError as err:
        raise ConfigError(f"{where} is not JSON ({err}); each line is one object") from err
    kinds = ("prompt", "messages", "prompt_token_ids")
    found = [kind for kind in kinds if isinstance(value, Mapping) and kind in value]
    if len(found) != 1:
        raise ConfigError(
            f"{where} has {found or 'none'} of {', '.join(kinds)}; accepted is an object with exactly one of them"
        )
    name = value.get("id")
    if found[0] == "prompt_token_ids":
        return name, {"prompt_token_ids": value["prompt_token_ids"]}
    return name, value[found[0]]


def load_prompts(path: Path) -> dict[str, object]:
    """Read a file of prompts.

    Args:
        path: `.txt` with one prompt a line, or `.jsonl`.

    Returns:
        Prompts by name: a text, a list of messages, or `{"prompt_token_ids": [...]}`; the name is the line's `id`, or
        its number.

    Raises:
        ConfigError: The file cannot be read, has no prompt, or a line is not as above.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"prompts={path}; accepted is a file *.jsonl or *.txt")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as err:
        raise ConfigError(f"prompts={path} cannot be read ({err}); pass an existing file") from err
    prompts: dict[str, object] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, prompt = (None, line)
        if path.suffix == ".jsonl":
            name, prompt = _prompt_of(line, f"{path} line {number}")
        key = str(number if name is None else name)
        if key in prompts:
            raise ConfigError(f"{path} line {number}: id {key!r} is there already; ids are unique")
        prompts[key] = prompt
    if not prompts:
        raise ConfigError(f"{path} holds no prompt; write one a line")
    return prompts


def _render(llm: object, prompts: Sequence[object]) -> list[object]:
    """Conversations as text, through the model's chat template."""
    from routing_replay.engine import LLM

    assert isinstance(llm, LLM)
    rendered: list[object] = []
    for prompt in prompts:
        if isinstance(prompt, list):
            if llm.tokenizer is None:
                raise ConfigError(
                    "the model folder has no tokenizer.json; write prompts as prompt_token_ids"
                )
            prompt = llm.tokenizer.render_chat(prompt)  # noqa: PLW2901 - the same prompt, as text
        rendered.append(prompt)
    return rendered


def run_rollout(options: RolloutOptions) -> int:
    """Generate and store.

    Args:
        options: What to run.

    Returns:
        0, or 1 if the routing of a completion could not be captured; the others are stored.

    Raises:
        ConfigError: An option or a prompt is not accepted; nothing has been written.
    """
    from routing_replay.assets import tiny_moe_path
    from routing_replay.engine import LLM, SamplingParams
    from routing_replay.trace import RolloutSample, RolloutWriter

    prompts = load_prompts(options.prompts)
    started = time.perf_counter()
    model = tiny_moe_path() if options.model == EMBEDDED else options.model
    llm = LLM(model, dtype=options.dtype, device=options.device, enable_return_routed_experts=True)
    params = [
        SamplingParams(
            n=options.n,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            max_tokens=options.max_tokens,
            logprobs=0,
            seed=options.seed + index * options.n,
        )
        for index in range(len(prompts))
    ]
    rendered = _render(llm, list(prompts.values()))
    facts = {
        "model": str(options.model),
        "dtype": options.dtype,
        "num_prompts": len(prompts),
        "n": options.n,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
        "codec": options.codec,
        "versions": {name: version(name) for name in ("routing-replay", "torch")},
    }
    keys = list(prompts)
    num_samples = num_tokens = num_failed = 0
    with RolloutWriter(options.output, facts=facts, codec=options.codec) as writer:
        for index, output in llm.generate_each(rendered, params):  # pyright: ignore[reportArgumentType]
            for completion in output.outputs:
                if completion.error is not None:
                    num_failed += 1
                    continue
                assert completion.logprobs is not None
                pairs = zip(completion.logprobs, completion.token_ids, strict=True)
                writer.append(
                    RolloutSample(
                        key=keys[index] if options.n == 1 else f"{keys[index]}/{completion.index}",
                        prompt_token_ids=output.prompt_token_ids,
                        token_ids=completion.token_ids,
                        logprobs=tuple(entry[token].logprob for entry, token in pairs),
                        trace=completion.routing,
                        text=completion.text,
                        finish_reason=completion.finish_reason,
                    )
                )
                num_samples += 1
                num_tokens += len(completion.token_ids)
    seconds = time.perf_counter() - started
    summary = {
        "output": str(options.output),
        "num_samples": num_samples,
        "num_tokens": num_tokens,
        "num_failed": num_failed,
        "seconds": round(seconds, 3),
    }
    if options.json:
        print(json.dumps(summary))
    else:
        print(
            f"{num_samples} samples, {num_tokens} tokens in {seconds:.1f} s -> {options.output}"
            + (f"; {num_failed} failed to capture" if num_failed else "")
        )
        print(f"next: routing-replay audit {options.output} --model {options.model}")
    return 1 if num_failed else 0
