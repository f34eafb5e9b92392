"""Random Qwen3-MoE checkpoints, small enough to make in a test."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

VOCAB_SIZE = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """What differs between the checkpoints."""

    num_experts: int
    top_k: int
    num_layers: int
    dense_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = True

    @property
    def label(self) -> str:
        dense = "".join(f"-d{i}" for i in self.dense_layers)
        return f"E{self.num_experts}-K{self.top_k}-L{self.num_layers}{dense}-norm{self.norm_topk_prob:d}"


SHAPES = (
    TinyShape(num_experts=8, top_k=2, num_layers=2),
    TinyShape(num_experts=16, top_k=4, num_layers=4, dense_layers=(0,)),
    TinyShape(num_experts=32, top_k=8, num_layers=3, norm_topk_prob=False),
    TinyShape(num_experts=256, top_k=1, num_layers=2, norm_topk_prob=False),
)


def save_tiny_model(folder: Path, shape: TinyShape, *, max_shard_size: str = "5GB") -> Path:
    """Write a random checkpoint whose router scores are spread far enough that ties are rare."""
    torch.manual_seed(1)
    transformers_logging.disable_progress_bar()
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.norm_topk_prob,
        mlp_only_layers=list(shape.dense_layers),
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
