"""The options of `routing-replay rollout`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

__all__ = ["RolloutOptions"]


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

    engine: Literal["routing-replay", "vllm", "sglang"] = "routing-replay"
    """Who generates: this package's own engine, vLLM (in this process, or at --url), or SGLang (at --url)."""

    url: Annotated[str | None, arg(metavar="URL")] = None
    """A running server, such as http://host:8000."""

    engine_args: Annotated[str | None, arg(metavar="JSON")] = None
    """Further arguments of vllm.LLM, such as '{"tensor_parallel_size": 8, "distributed_executor_backend": "ray"}'."""

    served_model: Annotated[str | None, arg(metavar="NAME")] = None
    """The name under which a vLLM server serves the model; without it, the one model that it serves."""

    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """The config.json of the model of a server, where MODEL is not at hand."""

    api_key_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """A file that holds the server's key."""

    max_concurrency: Annotated[int | None, arg(metavar="INT")] = None
    """Most requests under way at a server; 64 if not given."""

    allow_untested_version: bool = False
    """Accept a version of vLLM or SGLang that this package does not know."""

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

    seed: int | None = None
    """Completion j of prompt i has the seed SEED + i * N + j; 0 if not given."""

    dtype: Literal["bfloat16", "float32"] | None = None
    """The engine's precision; bfloat16 if not given, and vLLM's own choice with vLLM."""

    device: str | None = None
    """A torch device; a GPU where torch sees one, else cpu, if not given."""

    max_num_seqs: int | None = None
    """Most completions that run at once; 128 if not given, and vLLM's own choice with vLLM."""

    max_num_batched_tokens: int | None = None
    """Most tokens of a step; 4096 if not given, and vLLM's own choice with vLLM."""

    max_model_len: int | None = None
    """Longest prompt with its completion; the model's limit, at most 8192, if not given."""

    batch_invariant: bool = False
    """Make logprobs independent of what runs beside, bit for bit; slower."""

    codec: Literal["raw", "raw+zstd", "packed", "packed+zstd"] = "raw+zstd"
    """How traces are stored; the packed ones are smaller and drop the order of a row's experts."""

    json: bool = False
    """Print a JSON summary."""
