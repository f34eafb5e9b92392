"""Train `tiny-moe`, the embedded model: tokenizer, data, training, and its score at temperature 1.

Needs torch, transformers and tokenizers, and a GPU for anything but a smoke test. All randomness comes from `--seed`;
where `--seconds` ends the training, the number of steps depends on the machine.

    python scripts/train_tiny_moe.py --out /tmp/tiny_moe
"""

import argparse
import json
import math
import platform
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from routing_replay.assets.arithmetic import (
    TRAINING_SEED_START,
    is_solved,
    make_problems,
    write_solution,
)

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
PAD_ID, END_ID = 0, 1
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROBLEMS_PER_SEED = 1000
MAX_SEQUENCE = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides a training run; the defaults are those of the embedded model."""

    num_layers: int = 8
    num_experts: int = 64
    top_k: int = 8
    hidden_size: int = 128
    intermediate_size: int = 32
    vocab_size: int = 512
    seed: int = 0
    slip_rate: float = 0.13
    num_examples: int = 1_000_000
    seq_len: int = 160
    batch_size: int = 512
    num_steps: int = 8000
    seconds: float = 390.0
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    balance_coefficient: float = 0.01
    num_scored: int = 1024


def draw_examples(seed: int, slip_rate: float) -> list[tuple[str, str]]:
    """Return `PROBLEMS_PER_SEED` pairs of prompt and completion."""
    rng = random.Random(seed)
    return [
        (
            f"<|user|>{problem.question}<|assistant|>",
            f"{write_solution(problem, rng, slip_rate=slip_rate)}<|end|>",
        )
        for problem in make_problems(PROBLEMS_PER_SEED, seed)
    ]


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """Train a byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts: list[str] = []
    for index in range(20):
        for prompt, completion in draw_examples(TRAINING_SEED_START + index, 0.0):
            texts += [
                prompt.removeprefix("<|user|>").removesuffix("<|assistant|>"),
                completion.removesuffix("<|end|>"),
            ]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "pad_token": SPECIAL_TOKENS[PAD_ID],
        "eos_token": SPECIAL_TOKENS[END_ID],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode_examples(tokenizer: Tokenizer, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return token ids int16 `[N, seq_len]`, padded, and the index of the first completion token `[N]`."""
    first_seed = TRAINING_SEED_START
    seeds = range(first_seed, first_seed + max(1, recipe.num_examples // PROBLEMS_PER_SEED))
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(partial(draw_examples, slip_rate=recipe.slip_rate), seeds, chunksize=8)
        pairs = [pair for examples in drawn for pair in examples]
    token_ids = torch.full((len(pairs), recipe.seq_len), PAD_ID, dtype=torch.int16)
    starts = torch.zeros(len(pairs), dtype=torch.int16)
    kept = 0
    for first in range(0, len(pairs), 50_000):
        chunk = pairs[first : first + 50_000]
        prompts = tokenizer.encode_batch([prompt for prompt, _ in chunk])
        completions = tokenizer.encode_batch([completion for _, completion in chunk])
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = prompt.ids + completion.ids
            if len(ids) <= recipe.seq_len:
                token_ids[kept, : len(ids)] = torch.tensor(ids, dtype=torch.int16)
                starts[kept] = len(prompt.ids)
                kept += 1
    return token_ids[:kept], starts[:kept]


def dense_experts(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute every expert for every token, exactly: for experts this small two large GEMMs beat a grouped one."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    num_experts = gate_up.shape[0]
    weights = hidden_states.new_zeros(hidden_states.shape[0], num_experts)
    weights = weights.scatter(1, top_k_index, top_k_weights.to(weights.dtype))
    projected = (hidden_states @ gate_up.flatten(0, 1).t()).unflatten(1, (num_experts, -1))
    gate, up = projected.chunk(2, dim=-1)
    activated = nn.functional.silu(gate) * up * weights.unsqueeze(-1)
    return activated.flatten(1) @ down.transpose(1, 2).flatten(0, 1)


def build_model(recipe: Recipe) -> Qwen3MoeForCausalLM:
    """Make a randomly initialised Qwen3-MoE."""
    torch.manual_seed(recipe.seed)
    config = Qwen3MoeConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=4 * recipe.hidden_size,
        moe_intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        initializer_range=0.05,
    )
    return Qwen3MoeForCausalLM(config)


def balance_loss(router_outputs: list[tuple[Tensor, ...]], is_real: Tensor) -> Tensor:
    """Switch-style load balancing over real tokens, averaged over layers; 1 is perfectly even."""
    losses: list[Tensor] = []
    for logits, _, indices in router_outputs:
        probs = logits.float().softmax(-1)[is_real].mean(0)
        chosen = indices[is_real].flatten()
        counts = torch.zeros_like(probs).index_add_(
            0, chosen, torch.ones_like(chosen, dtype=probs.dtype)
        )
        losses.append(probs.numel() * (counts / counts.sum() * probs).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def score(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, num_problems: int, seed: int) -> float:
    """Return the share of held-out problems solved by sampling at temperature 1, without a KV cache."""
    device = model.device
    problems = make_problems(num_problems, seed)
    prompts = [tokenizer.encode(f"<|user|>{p.question}<|assistant|>").ids for p in problems]
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    tokens = torch.full((num_problems, MAX_SEQUENCE), PAD_ID, device=device)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = torch.tensor(ids)
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.arange(num_problems, device=device)
    is_done = torch.zeros(num_problems, dtype=torch.bool, device=device)
    ends = lengths.clone()
    while not bool(is_done.all()) and int(ends.max()) < MAX_SEQUENCE:
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(tokens[:, : int(ends.max())], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[rows, ends - 1]).float()
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        tokens[rows, ends] = sampled.where(~is_done, tokens[rows, ends])
        is_done |= sampled == END_ID
        ends = ends + (~is_done).long()
    texts = [
        tokenizer.decode(tokens[row, lengths[row] : ends[row]].tolist())
        for row in range(num_problems)
    ]
    return sum(map(is_solved, problems, texts)) / num_problems


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Warm up over 200 steps, then follow a cosine to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.learning_rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * cosine)


def train(
    model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, recipe: Recipe, device: str
) -> dict[str, object]:
    """Train in place; return the loss curve, the score and how long it took."""
    token_ids, starts = (part.to(device) for part in encode_examples(tokenizer, recipe))
    model.to(torch.device(device)).train()
    compute = torch.compile(dense_experts) if device == "cuda" else dense_experts
    router_outputs: list[tuple[Tensor, ...]] = []
    for layer in model.model.layers:
        layer.mlp.experts.forward = partial(compute, layer.mlp.experts)
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: router_outputs.append(out))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    columns = torch.arange(recipe.seq_len, device=device)
    curve: list[dict[str, float]] = []
    started = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        # Whichever budget ends first sets the pace, so that the learning rate always reaches its end.
        elapsed = time.monotonic() - started
        progress = max(step / recipe.num_steps, elapsed / recipe.seconds)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, progress)
        picked = torch.randint(len(token_ids), (recipe.batch_size,), generator=generator).to(device)
        batch, first = token_ids[picked].long(), starts[picked].long()
        router_outputs.clear()
        with torch.autocast(device, torch.bfloat16):
            logits = model(batch, use_cache=False).logits
        is_target = (batch[:, 1:] != PAD_ID) & (columns[1:] >= first[:, None])
        loss = nn.functional.cross_entropy(
            logits[:, :-1][is_target].float(), batch[:, 1:][is_target]
        )
        balance = balance_loss(router_outputs, (batch != PAD_ID).flatten())
        (loss + recipe.balance_coefficient * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            point = {"step": step, "loss": loss.item(), "balance": balance.item()}
            curve.append({name: round(value, 4) for name, value in point.items()})
            print(json.dumps({"seconds": round(elapsed), **curve[-1]}), flush=True)
    return {
        "steps": step,
        "seconds": round(time.monotonic() - started, 1),
        "solved_at_temperature_1": score(model.eval(), tokenizer, recipe.num_scored, seed=11),
        "loss_curve": curve,
    }


def main() -> None:
    """Train, score and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model into")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out: Path = arguments.pop("out")
    recipe = Recipe(**arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer(recipe)
    save_tokenizer(tokenizer, out)
    model = build_model(recipe)
    result = train(model, tokenizer, recipe, device)
    for layer in model.model.layers:
        del layer.mlp.experts.forward
    model.to(torch.bfloat16).save_pretrained(out)
    record = {
        "recipe": asdict(recipe),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **result,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
