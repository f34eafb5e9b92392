"""A multi-token-prediction layer, as in checkpoints of DeepSeek-V3 and GLM-4.5: it drafts the token after the next."""

import torch
from torch import Tensor, nn

from routing_replay.models.config import MoEModelConfig
from routing_replay.models.decoder_layer import DecoderLayer
from routing_replay.models.layers import Linear, RMSNorm
from routing_replay.models.step import RoutingBuffers, StepInputs

__all__ = ["MtpLayer", "shared_names"]


class MtpLayer(nn.Module):
    """From a token's hidden state and the embedding of the token after it, to the hidden state that drafts the next.

    Embedding and output projection are the model's own. Its decoder layer has a MoE block, whose routing is in no trace:
    it is given no buffers to record in or to read from.

    Args:
        config: Sizes and routing of the model.
        batch_invariant: Make the bits of a row independent of the rows beside it.
    """

    def __init__(self, config: MoEModelConfig, *, batch_invariant: bool) -> None:
        super().__init__()
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden_size, eps)
        self.hnorm = RMSNorm(hidden_size, eps)
        self.eh_proj = Linear(2 * hidden_size, hidden_size, batch_invariant=batch_invariant)
        self.block = DecoderLayer(
            config, is_moe=True, moe_layer_idx=None, batch_invariant=batch_invariant
        )
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(hidden_size, eps)})

    def forward(
        self,
        embedded: Tensor,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv_cache: Tensor,
        step: StepInputs,
    ) -> Tensor:
        """Run the layer.

        Args:
            embedded: `[T, H]`, embeddings of the tokens after the rows' own.
            hidden_states: `[T, H]`, the rows' hidden states.
            rotary: Of `rotary_tables`.
            kv_cache: `[2, num_blocks, block_size, kv_heads, head_dim]` of this layer; the step's slots are written.
            step: Where the rows live.

        Returns:
            Hidden states `[T, H]`, for the next depth and for `project_norm`.
        """
        pair = torch.cat((self.enorm(embedded)[0], self.hnorm(hidden_states)[0]), dim=-1)
        out, residual = self.block(
            self.eh_proj(pair), None, rotary, kv_cache, step, RoutingBuffers()
        )
        return residual + out

    def project_norm(self, hidden_states: Tensor) -> Tensor:
        """Normalise `[S, H]` for the model's output projection."""
        return self.shared_head["norm"](hidden_states)[0]


def shared_names(config: MoEModelConfig) -> dict[str, str]:
    """Return the copies of shared weights that a checkpoint holds with its drafting layers.

    Args:
        config: The model's.

    Returns:
        The name of each copy, and that of the weight itself.
    """
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    names: dict[str, str] = {}
    for depth in range(config.num_mtp_layers):
        stem = f"model.layers.{config.num_layers + depth}"
        names[f"{stem}.embed_tokens.weight"] = "model.embed_tokens.weight"
        names[f"{stem}.shared_head.head.weight"] = head
    return names
