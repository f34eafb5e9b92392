"""The models that a real vLLM runs here, and the prompts that they get."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB_SIZE = 320


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmModel:
    """A model by the name that results show."""

    name: str
    folder: Path = Path()

    def at(self, folder: Path) -> "VllmModel":
        return replace(self, folder=folder)


MODELS = (VllmModel(name="tiny-moe"), VllmModel(name="random, E32 K4, dense layer 0"))


def save_random_model(folder: Path) -> Path:
    """Write a random Qwen3-MoE whose first layer is dense, its router scores far enough apart that ties are rare."""
    torch.manual_seed(2)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def prompt_lines() -> list[dict[str, object]]:
    """Lengths around vLLM's block of 32 and its chunk of 64, and prompts that share a prefix or are the same."""
    rng = np.random.default_rng(5)
    lengths = (1, 31, 32, 33, 63, 64, 65, 150)
    prompts = {f"{n} tokens": rng.integers(4, VOCAB_SIZE, n).tolist() for n in lengths}
    long = prompts["150 tokens"]
    prompts["same as 150"] = long
    prompts["first 100, then others"] = [*long[:100], *rng.integers(4, VOCAB_SIZE, 20).tolist()]
    return [{"id": key, "prompt_token_ids": ids} for key, ids in prompts.items()]
