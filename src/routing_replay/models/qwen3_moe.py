"""Qwen3-MoE: decoder layers of paged attention and a MoE block or, where the config says so, a dense MLP."""

import torch
from torch import Tensor, nn

from routing_replay.models.config import MoEModelConfig
from routing_replay.models.layers import (
    DenseMlp,
    Linear,
    MoEBlock,
    PagedAttention,
    RMSNorm,
    RotaryEmbedding,
)
from routing_replay.models.step import RoutingBuffers, StepInputs

__all__ = ["Qwen3MoEModel"]


class _DecoderLayer(nn.Module):
    def __init__(self, config: MoEModelConfig, layer_idx: int, *, batch_invariant: bool) -> None:
        super().__init__()
        # The position on the trace's layer axis is fixed here, by the config: no counter that a second model could shift.
        self.moe_layer_idx = (
            config.moe_layer_ids.index(layer_idx) if layer_idx in config.moe_layer_ids else None
        )
        self.self_attn = PagedAttention(config, batch_invariant=batch_invariant)
        make_mlp = DenseMlp if self.moe_layer_idx is None else MoEBlock
        self.mlp = make_mlp(config, batch_invariant=batch_invariant)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        angles: tuple[Tensor, Tensor],
        kv_cache: Tensor,
        step: StepInputs,
        routing: RoutingBuffers,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), angles, kv_cache, step)
        hidden_states = hidden_states + attended
        replay_out = replay_in = None
        if self.moe_layer_idx is not None:
            if routing.device_cache is not None:
                replay_out = routing.device_cache.layer(self.moe_layer_idx)
            if routing.replay_buffer is not None:
                replay_in = routing.replay_buffer.layer(self.moe_layer_idx)
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.mlp(normed, replay_out, replay_in)


class Qwen3MoEModel(nn.Module):
    """A Qwen3-MoE decoder over a paged KV cache.

    Args:
        config: Sizes and routing of the model.
        batch_invariant: Make the bits of a row independent of the rows beside it.
    """

    def __init__(self, config: MoEModelConfig, *, batch_invariant: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            _DecoderLayer(config, layer_idx, batch_invariant=batch_invariant)
            for layer_idx in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        # Not tied to the embedding in memory: it is float32 in every dtype, see compute_logits.
        self.lm_head = Linear(
            config.hidden_size, config.vocab_size, batch_invariant=batch_invariant
        )

    def forward(self, step: StepInputs, kv_cache: Tensor, routing: RoutingBuffers) -> Tensor:
        """Run a step.

        Args:
            step: The tokens, and where they live.
            kv_cache: `[num_layers, 2, num_blocks, block_size, kv_heads, head_dim]`; the step's slots are written.
            routing: Where MoE layers record their experts and find given ones.

        Returns:
            Hidden states `[T, H]` after the last norm, for `compute_logits`.

        Runtime: host syncs and allocations are those of the backend of `bf16_moe`.
        """
        hidden_states = self.embed_tokens(step.token_ids)
        angles = self.rotary.angles(step.positions, hidden_states.dtype)
        for layer_idx, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, angles, kv_cache[layer_idx], step, routing)
        return self.norm(hidden_states)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Project hidden states onto the vocabulary, in float32.

        In bfloat16, logits of magnitude 16 would be rounded by up to 1/16: more than all routing differences do.

        Args:
            hidden_states: `[S, H]`, rows of what `forward` returned.

        Returns:
            float32 `[S, vocab_size]`.

        Runtime: no host sync; allocates S*vocab_size*4 bytes; CUDA-graph safe; bitwise deterministic for one shape.
        """
        return self.lm_head(hidden_states.float())

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the rows between layers, and of the values of all weights."""
        return self.embed_tokens.weight.dtype

    def cast(self, dtype: torch.dtype, *, gemm_dtype: torch.dtype) -> "Qwen3MoEModel":
        """Set the data types of the weights.

        Args:
            dtype: Of embedding, norms and all rows between layers.
            gemm_dtype: In which the weights of GEMMs are kept.

        Returns:
            This model; its output projection is float32.
        """
        self.to(dtype)
        for module in self.modules():
            if isinstance(module, Linear | MoEBlock):
                module.to(gemm_dtype)
        self.lm_head.to(torch.float32)
        return self

    def checkpoint_places(self) -> dict[str, list[Tensor]]:
        """Return, for every tensor of a Hugging Face checkpoint, the places that it is loaded into.

        Returns:
            Views of parameters by the checkpoint's name. A tied embedding has two places.
        """
        size = self.config.moe_intermediate_size
        places: dict[str, list[Tensor]] = {}
        for name, parameter in self.named_parameters():
            prefix, _, leaf = name.rpartition(".")
            if leaf in ("gate_up_proj", "down_proj"):
                for expert_idx, weight in enumerate(parameter):
                    stem = f"model.{prefix}.experts.{expert_idx}"
                    if leaf == "down_proj":
                        places[f"{stem}.down_proj.weight"] = [weight]
                    else:
                        places[f"{stem}.gate_proj.weight"] = [weight[:size]]
                        places[f"{stem}.up_proj.weight"] = [weight[size:]]
            elif name != "lm_head.weight":
                places[f"model.{name}"] = [parameter]
        if self.config.tie_word_embeddings:
            places["model.embed_tokens.weight"].append(self.lm_head.weight)
        else:
            places["lm_head.weight"] = [self.lm_head.weight]
        return places

    def fused_places(self) -> dict[str, list[Tensor]]:
        """Return the places of expert weights under the names of Transformers 5, one tensor for a layer's experts."""
        places: dict[str, list[Tensor]] = {}
        for name, parameter in self.named_parameters():
            prefix, _, leaf = name.rpartition(".")
            if leaf in ("gate_up_proj", "down_proj"):
                places[f"model.{prefix}.experts.{leaf}"] = [parameter]
        return places
