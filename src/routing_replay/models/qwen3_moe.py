"""Qwen3-MoE: decoder layers of paged attention and a MoE block or, where the config says so, a dense MLP."""

import torch
from torch import Tensor, nn

from routing_replay.errors import ConfigError
from routing_replay.kernels import route_and_plan_workspace
from routing_replay.models.config import MoEModelConfig
from routing_replay.models.decoder_layer import DecoderLayer
from routing_replay.models.layers import Linear, MoEBlock, RMSNorm, rotary_tables
from routing_replay.models.lm_head import LmHead
from routing_replay.models.mtp import MtpLayer
from routing_replay.models.places import checkpoint_places, fused_places
from routing_replay.models.step import RoutingBuffers, StepInputs

__all__ = ["Qwen3MoEModel"]


class Qwen3MoEModel(nn.Module):
    """A Qwen3-MoE decoder over a paged KV cache; `prepare` it before its first step.

    Args:
        config: Sizes and routing of the model.
        batch_invariant: Make the bits of a row independent of the rows beside it.
        with_mtp: Have the layers that draft tokens, too.

    Attributes:
        is_offloaded: Whether the weights are away, see `offload_weights`.
        workspace: What the MoE layers share on a GPU, `kernels.route_and_plan_workspace`; None elsewhere. A step that was
            aborted leaves it dirty: zero it in place before the next.
    """

    def __init__(
        self, config: MoEModelConfig, *, batch_invariant: bool = False, with_mtp: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.is_offloaded = False
        self.workspace: Tensor | None = None
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # The position on the trace's layer axis is fixed here, by the config: no counter that a second model could shift.
        order = {layer_idx: place for place, layer_idx in enumerate(config.moe_layer_ids)}
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                is_moe=layer_idx in order,
                moe_layer_idx=order.get(layer_idx),
                batch_invariant=batch_invariant,
            )
            for layer_idx in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mtp_layers = nn.ModuleList(
            MtpLayer(config, batch_invariant=batch_invariant)
            for _ in range(config.num_mtp_layers if with_mtp else 0)
        )
        self.lm_head = LmHead(
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

        Raises:
            ConfigError: The weights are offloaded.

        Runtime: host syncs and allocations are those of the backends of `bf16_moe` and of attention; CUDA-graph safe
            where they are.
        """
        self._check_awake()
        hidden_states, residual = self.embed_tokens(step.token_ids), None
        for layer_idx, layer in enumerate(self.layers):
            hidden_states, residual = layer(
                hidden_states, residual, self.rotary, kv_cache[layer_idx], step, routing
            )
        return self.norm(hidden_states, residual)[0]

    def draft(
        self, step: StepInputs, hidden_states: Tensor, kv_cache: Tensor, *, depth: int = 0
    ) -> Tensor:
        """Run a layer that drafts; its routing is recorded nowhere.

        Args:
            step: That of the rows, with the token after each row's own as its `token_ids`.
            hidden_states: `[T, H]` of the rows: what `forward` returned, or the draft one depth before.
            kv_cache: `[2, num_blocks, block_size, kv_heads, head_dim]` of this layer; the step's slots are written.
            depth: Which layer.

        Returns:
            Hidden states `[T, H]`, for `compute_draft_logits` and the next depth.

        Raises:
            ConfigError: The model has no such layer, or the weights are offloaded.

        Runtime: that of one decoder layer.
        """
        self._check_awake()
        embedded = self.embed_tokens(step.token_ids)
        return self._mtp_layer(depth)(embedded, hidden_states, self.rotary, kv_cache, step)

    def compute_draft_logits(self, hidden_states: Tensor, *, depth: int = 0) -> Tensor:
        """Project drafting hidden states onto the vocabulary: row t speaks of token t + 2 at depth 0.

        Args:
            hidden_states: `[S, H]`, rows of what `draft` returned.
            depth: Of that call.

        Returns:
            float32 `[S, vocab_size]`.

        Raises:
            ConfigError: The model has no such layer.

        Runtime: that of `compute_logits`, and a norm.
        """
        return self.lm_head(self._mtp_layer(depth).project_norm(hidden_states))

    def _mtp_layer(self, depth: int) -> MtpLayer:
        if not 0 <= depth < len(self.mtp_layers):
            raise ConfigError(
                f"depth={depth}, but the model was loaded with {len(self.mtp_layers)} layers that draft (config.json "
                f"has {self.config.num_mtp_layers}); load it with with_mtp=True"
            )
        layer = self.mtp_layers[depth]
        assert isinstance(layer, MtpLayer)
        return layer

    def _check_awake(self) -> None:
        if self.is_offloaded:
            raise ConfigError("the model's weights are offloaded; call restore_weights first")

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Project hidden states onto the vocabulary, in float32.

        In bfloat16, logits of magnitude 16 would be rounded by up to 1/16: more than all routing differences do.

        Args:
            hidden_states: `[S, H]`, rows of what `forward` returned.

        Returns:
            float32 `[S, vocab_size]`.

        Runtime: no host sync; allocates S*vocab_size*4 bytes; CUDA-graph safe; bitwise deterministic for one shape.
        """
        return self.lm_head(hidden_states)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the rows between layers, and of the values of all weights."""
        return self.embed_tokens.weight.dtype

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of all positions, of `rotary_tables`."""
        assert self._rotary is not None, "prepare() makes the tables"
        return self._rotary

    def cast(
        self, dtype: torch.dtype, *, gemm_dtype: torch.dtype, head_dtype: torch.dtype
    ) -> "Qwen3MoEModel":
        """Set the data types of the weights.

        Args:
            dtype: Of embedding, norms and all rows between layers.
            gemm_dtype: In which the weights of GEMMs are kept.
            head_dtype: In which the output projection's weight is kept.

        Returns:
            This model.
        """
        self.to(dtype)
        for module in self.modules():
            if isinstance(module, Linear | MoEBlock):
                module.to(gemm_dtype)
        self.lm_head.to(head_dtype)
        return self

    def tie(self) -> None:
        """Make embedding and output projection one tensor, where the config ties them and their dtypes are the same."""
        embedding = self.embed_tokens.weight
        assert isinstance(embedding, nn.Parameter)
        if self.config.tie_word_embeddings and self.lm_head.weight.dtype == embedding.dtype:
            self.lm_head.weight = embedding

    def prepare(self, *, max_position: int) -> None:
        """Make what is no weight: the tables of rotary embedding, and the workspace of the MoE layers on a GPU.

        Args:
            max_position: Positions that a step may hold, `[0, max_position)`.

        Runtime: call it once, outside of CUDA graphs, when the weights are on their device.
        """
        config, device = self.config, self.embed_tokens.weight.device
        self._rotary = rotary_tables(
            config.head_dim,
            config.rope_theta,
            num_positions=max_position,
            dtype=self.dtype,
            device=device,
        )
        if device.type != "cuda":
            return
        self.workspace = route_and_plan_workspace(config.num_experts, device=device)
        for module in self.modules():
            if isinstance(module, MoEBlock):
                module.workspace = self.workspace

    def checkpoint_places(self) -> dict[str, list[Tensor]]:
        """Return, for every tensor of a Hugging Face checkpoint, the places that it is loaded into.

        Returns:
            Contiguous views of parameters by the checkpoint's name.
        """
        return checkpoint_places(self.config, self.named_parameters())

    def fused_places(self) -> dict[str, list[Tensor]]:
        """Return the places of expert weights under the names of Transformers 5, one tensor for a layer's experts.

        Returns:
            Parameters by name.
        """
        return fused_places(self.config, self.named_parameters())
