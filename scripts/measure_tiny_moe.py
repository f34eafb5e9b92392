"""Measure `tiny-moe` with transformers alone: what the demo should show, before any of our code.

    python scripts/measure_tiny_moe.py [--model DIR] [--seeds 1 2 3 4 5]

The rollout is the model in bfloat16 (optionally with its expert weights rounded to fp8 e4m3, one
scale per output row), the trainer the same weights in float32, both on the CPU. Responses are
sampled at temperature 1 in bfloat16 and scored by both in one pass over each sequence. Prints one
line per seed and one for all seeds together.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_moe.corpus import END, format_prompt
from tiny_moe.routers import Routing
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from routing_replay.assets import tiny_moe_path
from routing_replay.assets.arithmetic import Problem, is_solved, make_problems

_FP8_MAX = 448.0
_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Figures of each sequence of one seed.

    Attributes:
        solved: bool `[B]`.
        tokens: Response tokens, `[B]`.
        native: k3 summed over the response, trainer with its own experts, `[B]`.
        replayed: The same with the rollout's experts, `[B]`.
        extreme: Tokens with a ratio beyond 2, native and replayed, `[2, B]`.
        mismatched: (token, layer) pairs whose expert sets differ, `[B]`.
        pairs: All (token, layer) pairs, `[B]`.
        usage: Tokens that chose each expert in the rollout, `[L, E]`.
    """

    solved: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    native: NDArray[np.float64]
    replayed: NDArray[np.float64]
    extreme: NDArray[np.int64]
    mismatched: NDArray[np.int64]
    pairs: NDArray[np.int64]
    usage: NDArray[np.int64]


def main() -> None:
    """Parse the options, measure each seed and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--num-problems", type=int, default=128)
    parser.add_argument("--fp8-experts", action="store_true")
    options = parser.parse_args()
    folder = options.model or tiny_moe_path()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rollout = load(folder, torch.bfloat16)
    trainer = load(folder, torch.float32)
    if options.fp8_experts:
        round_experts_to_fp8(rollout)
    routings = Routing(rollout), Routing(trainer)
    parts: list[Scores] = []
    for seed in options.seeds:
        problems = make_problems(options.num_problems, seed)
        responses = sample_responses(rollout, tokenizer, problems, seed)
        scores = score(rollout, trainer, routings, tokenizer, problems, responses)
        parts.append(scores)
        print(json.dumps({"seed": seed, **summarize(scores)}), flush=True)
    print(json.dumps({"seed": "all", **summarize(join(parts))}), flush=True)


def load(folder: Path, dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    """Load the model on the CPU.

    Args:
        folder: A checkpoint.
        dtype: Of the weights.

    Returns:
        The model in evaluation mode.
    """
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def round_experts_to_fp8(model: Qwen3MoeForCausalLM) -> None:
    """Round the expert weights to e4m3 with one scale per output row, and store them as they were.

    Args:
        model: Changed in place.
    """
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            scale = weight.data.float().abs().amax(-1, keepdim=True) / _FP8_MAX
            rounded = (weight.data.float() / scale).to(torch.float8_e4m3fn).float() * scale
            weight.data.copy_(rounded)


def sample_responses(
    model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, problems: tuple[Problem, ...], seed: int
) -> list[list[int]]:
    """Sample one response per problem at temperature 1.

    Args:
        model: The rollout.
        tokenizer: Encodes the prompts.
        problems: What to ask.
        seed: Of the sampler.

    Returns:
        Token ids with the end token, where one was sampled.
    """
    torch.manual_seed(seed)
    end = tokenizer.token_to_id(END)
    prompts = [tokenizer.encode(format_prompt(problem.question)).ids for problem in problems]
    width = max(len(prompt) for prompt in prompts)
    rows = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        outputs = model.generate(
            input_ids=rows,
            attention_mask=mask,
            max_new_tokens=96,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
    responses: list[list[int]] = []
    for row in outputs[:, width:].tolist():
        responses.append(row[: row.index(end) + 1] if end in row else row)
    return responses


def score(
    rollout: Qwen3MoeForCausalLM,
    trainer: Qwen3MoeForCausalLM,
    routings: tuple[Routing, Routing],
    tokenizer: Tokenizer,
    problems: tuple[Problem, ...],
    responses: list[list[int]],
) -> Scores:
    """Score the responses with the rollout, the trainer, and the trainer under replay.

    Args:
        rollout: The low-precision model.
        trainer: The float32 model.
        routings: Their routers, in this order.
        tokenizer: Encodes and decodes.
        problems: What was asked.
        responses: One per problem.

    Returns:
        The figures of each sequence.
    """
    num_layers, num_experts = rollout.config.num_hidden_layers, rollout.config.num_experts
    columns: list[NDArray[np.float64]] = []
    usage = torch.zeros(num_layers, num_experts, dtype=torch.int64)
    for begin in range(0, len(problems), _BATCH):
        batch = slice(begin, begin + _BATCH)
        prompts = [tokenizer.encode(format_prompt(p.question)).ids for p in problems[batch]]
        rows, is_row, is_sampled = pad_rows(prompts, responses[batch])
        logp_rollout, ids = routings[0].run(rollout, rows)
        logp_native, own_ids = routings[1].run(trainer, rows)
        logp_replayed, _ = routings[1].run(trainer, rows, forced=ids)
        is_same = (ids.sort(-1).values == own_ids.sort(-1).values).all(-1)
        is_same = is_same.view(num_layers, *rows.shape)
        used = torch.nn.functional.one_hot(ids, num_experts).sum(2)
        usage += (used * is_row.flatten()[None, :, None]).sum(1)
        figures: list[Tensor] = [is_sampled.sum(1)]
        for logp in (logp_native, logp_replayed):
            difference = (logp - logp_rollout).double()
            k3 = torch.expm1(difference) - difference
            figures.append((k3 * is_sampled).sum(1))
            figures.append(((difference.abs() > np.log(2.0)) & is_sampled).sum(1))
        figures.append((~is_same & is_row).sum((0, 2)))
        figures.append(is_row.sum(1) * num_layers)
        columns.append(torch.stack([figure.double() for figure in figures]).numpy())
    table = np.concatenate(columns, axis=1)
    texts = [tokenizer.decode(response) for response in responses]
    solved = [is_solved(problem, text) for problem, text in zip(problems, texts, strict=True)]
    return Scores(
        solved=np.asarray(solved),
        tokens=table[0].astype(np.int64),
        native=table[1],
        replayed=table[3],
        extreme=table[[2, 4]].astype(np.int64),
        mismatched=table[5].astype(np.int64),
        pairs=table[6].astype(np.int64),
        usage=usage.numpy(),
    )


def pad_rows(prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Join prompts and responses into right-padded rows.

    Args:
        prompts: Token ids.
        responses: Token ids.

    Returns:
        Rows `[B, S]`; which positions were inputs (all but the last token) `[B, S]`; which next
        tokens were sampled `[B, S - 1]`.
    """
    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    width = max(len(sequence) for sequence in sequences)
    rows = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences])
    position = torch.arange(width)
    ends = torch.tensor([len(sequence) for sequence in sequences])[:, None]
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    is_row = position < ends - 1
    is_sampled = (position[:-1] >= starts - 1) & (position[:-1] < ends - 1)
    return rows, is_row, is_sampled


def join(parts: list[Scores]) -> Scores:
    """Put the sequences of several seeds together.

    Args:
        parts: At least one.

    Returns:
        All sequences; usage is summed.
    """
    return Scores(
        solved=np.concatenate([part.solved for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        native=np.concatenate([part.native for part in parts]),
        replayed=np.concatenate([part.replayed for part in parts]),
        extreme=np.concatenate([part.extreme for part in parts], axis=1),
        mismatched=np.concatenate([part.mismatched for part in parts]),
        pairs=np.concatenate([part.pairs for part in parts]),
        usage=np.sum([part.usage for part in parts], axis=0),
    )


def summarize(scores: Scores, *, resamples: int = 2000) -> dict[str, object]:
    """Reduce the figures of many sequences.

    Args:
        scores: Of one seed or of several.
        resamples: Bootstrap draws of whole sequences, paired.

    Returns:
        Rounded figures; the interval is the central 95 % of KL_replay / KL_native.
    """
    rng = np.random.default_rng(0)
    num_sequences, tokens = len(scores.tokens), int(scores.tokens.sum())
    draws = rng.integers(num_sequences, size=(resamples, num_sequences))
    ratios = scores.replayed[draws].sum(1) / scores.native[draws].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    share = scores.usage / scores.usage.sum(1, keepdims=True)
    return {
        "sequences": num_sequences,
        "tokens": tokens,
        "solved": round(float(scores.solved.mean()), 4),
        "mismatch": round(float(scores.mismatched.sum() / scores.pairs.sum()), 5),
        "kl_native": float(f"{scores.native.sum() / tokens:.4g}"),
        "kl_replayed": float(f"{scores.replayed.sum() / tokens:.4g}"),
        "ratio": round(float(scores.replayed.sum() / scores.native.sum()), 4),
        "ratio_95": [round(float(low), 4), round(float(high), 4)],
        "extreme_native": float(f"{scores.extreme[0].sum() / tokens:.4g}"),
        "extreme_replayed": float(f"{scores.extreme[1].sum() / tokens:.4g}"),
        "min_expert_share_of_even": round(float(share.min() * share.shape[1]), 4),
    }


if __name__ == "__main__":
    main()
