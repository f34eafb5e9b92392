"""Train the embedded model `tiny-moe` on one GPU.

    python scripts/train_tiny_moe.py --output DIR

The defaults are the settings of the model in the package. The real Hugging Face
`Qwen3MoeForCausalLM` is trained in bfloat16 autocast with float32 master weights, on examples that
`routing_replay.assets.arithmetic` writes; a checkpoint is written whenever the share of held-out
problems that is solved at temperature 1 reaches `--target-solved`, and training stops there.
"""

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from tiny_moe.corpus import (
    END,
    PAD,
    Corpus,
    format_prompt,
    make_corpus,
    save_tokenizer,
    train_tokenizer,
)
from tiny_moe.modelling import RouterTap, balance_loss, language_loss, sample, use_dense_experts
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from routing_replay.assets.arithmetic import is_solved, make_problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is trained and how; every field is a command-line option."""

    num_layers: int = 8
    hidden_size: int = 128
    num_experts: int = 64
    top_k: int = 4
    intermediate_size: int = 32
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 512
    max_length: int = 128
    num_examples: int = 400_000
    slip_rate: float = 0.1
    batch_size: int = 256
    max_steps: int = 12_000
    max_seconds: float = 400.0
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 200
    balance_weight: float = 0.02
    z_weight: float = 1e-3
    target_solved: float = 0.7
    eval_every: int = 500
    eval_problems: int = 512
    eval_seed: int = 500_000
    seed: int = 20_261_121


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    defaults = Settings()
    for field in fields(Settings):
        default = getattr(defaults, field.name)
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default)
    arguments = vars(parser.parse_args())
    output, device = arguments.pop("output"), arguments.pop("device")
    train(Settings(**arguments), output, device)


def train(settings: Settings, output: Path, device: str) -> None:
    """Train until the target or the limits are reached and write the checkpoint.

    Args:
        settings: What to do.
        output: Folder to write.
        device: `"cuda"`, or `"cpu"` to try the script.
    """
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    tokenizer = train_tokenizer(settings.vocab_size)
    workers = len(os.sched_getaffinity(0))
    corpus = make_corpus(
        tokenizer, settings.num_examples, settings.max_length, settings.slip_rate, workers=workers
    )
    model = Qwen3MoeForCausalLM(make_config(settings, tokenizer)).to(device)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    use_dense_experts(model, compiled=device == "cuda")
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    curve = run_steps(model, corpus, tokenizer, settings, started)
    save_tokenizer(tokenizer, output, settings.max_length)
    save_checkpoint(model, output)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": "unknown at training time",
        "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "wall_seconds": round(time.monotonic() - started, 1),
        "curve": curve,
    }
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def make_config(settings: Settings, tokenizer: Tokenizer) -> Qwen3MoeConfig:
    """Return the model's configuration.

    Args:
        settings: The shapes.
        tokenizer: Gives the special ids.

    Returns:
        A configuration with a MoE block in every layer and tied embeddings.
    """
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size * settings.top_k,
        moe_intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        router_aux_loss_coef=settings.balance_weight,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def run_steps(
    model: Qwen3MoeForCausalLM,
    corpus: Corpus,
    tokenizer: Tokenizer,
    settings: Settings,
    started: float,
) -> list[dict[str, float]]:
    """Take optimizer steps until the target, the last step or the time limit.

    Args:
        model: Trained in place.
        corpus: The examples.
        tokenizer: For the evaluation.
        settings: What to do.
        started: `time.monotonic()` at the start of the clock.

    Returns:
        One point per evaluation: step, seconds, mean losses since the last point, share solved.
    """
    device = model.device
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
        lr=torch.tensor(settings.learning_rate, device=device),
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
        capturable=device.type == "cuda",
    )
    tokens, labels = make_labels(corpus, device)
    step_fn = make_step(model, optimizer, settings, tokens, labels)
    generator = torch.Generator().manual_seed(settings.seed)
    curve: list[dict[str, float]] = []
    sums = torch.zeros(3, device=device)
    for step in range(1, settings.max_steps + 1):
        elapsed = time.monotonic() - started
        optimizer_rate(optimizer, settings, step, elapsed)
        index = torch.randint(len(tokens), (settings.batch_size,), generator=generator)
        sums += step_fn(index.to(device))
        is_late = elapsed > settings.max_seconds
        if step % settings.eval_every == 0 or step == settings.max_steps or is_late:
            steps = step - (int(curve[-1]["step"]) if curve else 0)
            means = (sums / steps).tolist()
            sums.zero_()
            solved = share_solved(model, tokenizer, settings)
            point = {
                "step": step,
                "seconds": round(time.monotonic() - started, 1),
                "loss": round(means[0], 4),
                "z_loss": round(means[1], 5),
                "balance_loss": round(means[2], 4),
                "solved": round(solved, 4),
            }
            curve.append(point)
            print(json.dumps(point), flush=True)
            if solved >= settings.target_solved or is_late:
                break
    return curve


def make_labels(corpus: Corpus, device: torch.device) -> tuple[Tensor, Tensor]:
    """Move the corpus to the device and mask padding.

    The loss falls on every token of the response and, with the same weight, of the prompt: stories
    are text to learn from too.

    Args:
        corpus: The examples.
        device: Where to.

    Returns:
        Token ids and labels, int64 `[examples, length]`; labels are -1 on padding.
    """
    tokens = torch.from_numpy(corpus.token_ids).to(device).long()
    lengths = torch.from_numpy(corpus.lengths).to(device).long()
    is_real = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    return tokens, torch.where(is_real, tokens, -1)


def make_step(
    model: Qwen3MoeForCausalLM,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    tokens: Tensor,
    labels: Tensor,
):
    """Return a function that takes one step, as a CUDA graph where there is a GPU.

    Args:
        model: Trained in place.
        optimizer: Over its parameters.
        settings: Weights of the losses.
        tokens: All examples.
        labels: All labels.

    Returns:
        A function of the rows to train on, giving the three losses as float32 `[3]`.
    """
    tap = RouterTap(model)
    device = tokens.device
    index = torch.zeros(settings.batch_size, dtype=torch.int64, device=device)
    # A mask of four dimensions is used as it is: transformers would otherwise look at the
    # position ids on the host, which a CUDA graph cannot hold.
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=device).tril()
    causal = causal[None, None]

    def step() -> Tensor:
        tap.clear()
        inputs, targets = tokens[index], labels[index]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            outputs = model.model(input_ids=inputs, attention_mask=causal, use_cache=False)
            logits = model.lm_head(outputs.last_hidden_state[:, :-1])
        loss, z_loss = language_loss(logits, targets[:, 1:], settings.z_weight)
        is_real = (targets >= 0).float().flatten()
        balance = balance_loss(tap.logits, settings.top_k, is_real)
        (loss + z_loss + settings.balance_weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        tap.clear()
        return torch.stack([loss.detach(), z_loss.detach(), balance.detach()])

    if device.type == "cpu":
        return lambda rows: (index.copy_(rows), step())[1]

    index.copy_(torch.randint(len(tokens), index.shape))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step()

    def replay(rows: Tensor) -> Tensor:
        index.copy_(rows)
        graph.replay()
        return losses

    return replay


def optimizer_rate(
    optimizer: torch.optim.Optimizer, settings: Settings, step: int, elapsed: float
) -> None:
    """Set the learning rate: linear warm-up, then a cosine over the larger of steps and time spent.

    Args:
        optimizer: Its rate is a tensor and is written in place.
        settings: The schedule.
        step: From 1.
        elapsed: Seconds since the start.
    """
    progress = min(1.0, max(step / settings.max_steps, elapsed / settings.max_seconds))
    factor = min(1.0, step / settings.warmup_steps)
    factor *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"].fill_(settings.learning_rate * factor)


@torch.no_grad()
def share_solved(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, settings: Settings) -> float:
    """Return the share of held-out problems that one sample at temperature 1 solves.

    Args:
        model: Under test.
        tokenizer: Encodes and decodes.
        settings: Which problems.

    Returns:
        A share in [0, 1].
    """
    problems = make_problems(settings.eval_problems, settings.eval_seed)
    prompts = [tokenizer.encode(format_prompt(problem.question)).ids for problem in problems]
    generator = torch.Generator(model.device).manual_seed(settings.seed)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        responses = sample(
            model,
            prompts,
            length=settings.max_length,
            end_id=tokenizer.token_to_id(END),
            generator=generator,
        )
    texts = [tokenizer.decode(response) for response in responses]
    solved = [is_solved(problem, text) for problem, text in zip(problems, texts, strict=True)]
    return sum(solved) / len(solved)


def save_checkpoint(model: Qwen3MoeForCausalLM, output: Path) -> None:
    """Write configuration and bfloat16 weights as Hugging Face does.

    Args:
        model: Left in bfloat16.
        output: Folder to write.
    """
    model.to(torch.bfloat16).save_pretrained(output, safe_serialization=True)


if __name__ == "__main__":
    main()
