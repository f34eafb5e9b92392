"""Record and force the experts of a Hugging Face Qwen3-MoE, for measurements without the library."""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM


class Routing:
    """The routers of one model, recorded always and forced on request.

    Attributes:
        recorded: `[T, K]` ids per MoE layer of the last forward pass.
    """

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.recorded: list[Tensor] = []
        self._forced: Tensor | None = None
        for layer_idx, layer in enumerate(model.model.layers):
            self._take_over(layer.mlp.gate, layer_idx)

    def run(
        self, model: Qwen3MoeForCausalLM, token_ids: Tensor, forced: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score padded rows.

        Args:
            model: The model that this object was made for.
            token_ids: int64 `[B, S]`, right-padded.
            forced: Ids `[L, B * S, K]` to use instead of the model's own choice.

        Returns:
            float32 log probabilities of the next tokens `[B, S - 1]`, and ids `[L, B * S, K]`.
        """
        self.recorded, self._forced = [], forced
        with torch.no_grad():
            logits = model(input_ids=token_ids, use_cache=False).logits[:, :-1].float()
        logp = logits.log_softmax(-1).gather(2, token_ids[:, 1:, None])[:, :, 0]
        return logp, torch.stack(self.recorded)

    def _take_over(self, router: nn.Module, layer_idx: int) -> None:
        """Replace the forward method of one router by the same formula with given ids.

        Args:
            router: A `Qwen3MoeTopKRouter`.
            layer_idx: Its place in `forced`.
        """

        def forward(module: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden_states = hidden_states.reshape(-1, module.hidden_dim)
            logits = F.linear(hidden_states, module.weight)
            probabilities = F.softmax(logits, dtype=torch.float, dim=-1)
            if self._forced is None:
                topk_ids = probabilities.topk(module.top_k, dim=-1).indices
            else:
                topk_ids = self._forced[layer_idx]
            weights = probabilities.gather(1, topk_ids)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            self.recorded.append(topk_ids)
            return logits, weights.to(logits.dtype), topk_ids

        router.forward = MethodType(forward, router)
