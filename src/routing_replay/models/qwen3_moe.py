"""Qwen3-MoE: decoder layers of paged attention and a MoE block or, where the config says so, a dense MLP."""

from collections.abc import Iterator

from torch import Tensor, nn

from routing_replay.models.config import MoEModelConfig
from routing_replay.models.layers import (
    DenseMlp,
    MoEBlock,
    PagedAttention,
    RMSNorm,
    RotaryEmbedding,
)
from routing_replay.models.step import RoutingBuffers, StepInputs

__all__ = ["Qwen3MoEModel"]


class _DecoderLayer(nn.Module):
    def __init__(self, config: MoEModelConfig, layer_idx: int) -> None:
        super().__init__()
        # The position on the trace's layer axis is fixed here, by the config: no counter that a second model could shift.
        self.moe_layer_idx = (
            config.moe_layer_ids.index(layer_idx) if layer_idx in config.moe_layer_ids else None
        )
        self.self_attn = PagedAttention(config)
        self.mlp = DenseMlp(config) if self.moe_layer_idx is None else MoEBlock(config)
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
    """

    def __init__(self, config: MoEModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, step: StepInputs, kv_cache: Tensor, routing: RoutingBuffers) -> Tensor:
        """Run a step.

        Args:
            step: The tokens, and where they live.
            kv_cache: `[num_layers, 2, num_blocks, block_size, kv_heads, head_dim]`; the step's slots are written.
            routing: Where MoE layers record their experts and find given ones.

        Returns:
            float32 logits `[S, vocab_size]` of `step.sample_rows`.

        Runtime: host syncs and allocations are those of the backend of `bf16_moe`.
        """
        hidden_states = self.embed_tokens(step.token_ids)
        angles = self.rotary.angles(step.positions, hidden_states.dtype)
        for layer_idx, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, angles, kv_cache[layer_idx], step, routing)
        hidden_states = self.norm(hidden_states[step.sample_rows])
        # In bfloat16, logits of magnitude 16 would be rounded by up to 1/16: more than all routing differences do.
        return hidden_states.float() @ self.lm_head.weight.float().t()

    def checkpoint_names(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of a Hugging Face checkpoint with the place that it is loaded into.

        Yields:
            The checkpoint's name, and a view of the parameter that it fills.
        """
        size = self.config.moe_intermediate_size
        for name, parameter in self.named_parameters():
            prefix, _, leaf = name.rpartition(".")
            if leaf in ("gate_up_proj", "down_proj"):
                for expert_idx, weight in enumerate(parameter):
                    stem = f"model.{prefix}.experts.{expert_idx}"
                    if leaf == "down_proj":
                        yield f"{stem}.down_proj.weight", weight
                    else:
                        yield f"{stem}.gate_proj.weight", weight[:size]
                        yield f"{stem}.up_proj.weight", weight[size:]
            else:
                yield name if name.startswith("lm_head.") else f"model.{name}", parameter
