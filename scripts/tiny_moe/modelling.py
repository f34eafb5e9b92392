"""Dense experts, losses and sampling for the real Hugging Face model."""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM


class RouterTap:
    """Collects the router logits of every MoE layer during a training forward pass.

    Attributes:
        logits: `[T, E]` per layer, in layer order; cleared by `clear`.
    """

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.logits: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._collect)

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.logits.clear()

    def _collect(self, _module: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        """Keep the logits of one router.

        Args:
            _module: The router.
            _inputs: Its inputs.
            outputs: Logits, weights and ids.
        """
        if torch.is_grad_enabled():
            self.logits.append(outputs[0])


def use_dense_experts(model: Qwen3MoeForCausalLM, *, compiled: bool) -> None:
    """Compute all experts for all tokens, weighted by their mostly zero combine weights.

    The same function as the sparse form, and much faster where experts are this small.

    Args:
        model: Changed in place.
        compiled: Fuse the activation with the weighting through `torch.compile`.
    """
    gated = torch.compile(_gated_experts) if compiled else _gated_experts

    def forward(
        self: nn.Module, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        num_experts, double_size, hidden_size = gate_up.shape
        dense_weights = torch.zeros(
            hidden_states.shape[0], num_experts, dtype=topk_weights.dtype, device=topk_ids.device
        ).scatter(1, topk_ids, topk_weights)
        hidden = F.linear(hidden_states, gate_up.view(num_experts * double_size, hidden_size))
        hidden = gated(hidden.view(-1, num_experts, double_size), dense_weights)
        return F.linear(hidden.flatten(1), down.transpose(0, 1).reshape(hidden_size, -1))

    for layer in model.model.layers:
        layer.mlp.experts.forward = MethodType(forward, layer.mlp.experts)


def _gated_experts(hidden: Tensor, dense_weights: Tensor) -> Tensor:
    """Apply the gated activation and the combine weights.

    Args:
        hidden: `[T, E, 2I]`, gate then up.
        dense_weights: `[T, E]`.

    Returns:
        `[T, E, I]`.
    """
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up * dense_weights.to(hidden.dtype)[:, :, None]


def balance_loss(router_logits: list[Tensor], top_k: int, is_real: Tensor) -> Tensor:
    """Return the mean over layers of the Switch load-balancing loss.

    Taken layer by layer, unlike `load_balancing_loss_func` of transformers, which sums the counts
    of all layers first and is content with an expert that only one layer uses.

    Args:
        router_logits: `[T, E]` per layer.
        top_k: Experts per token.
        is_real: float32 `[T]`, 0 on padding.

    Returns:
        A scalar; 1 where the load is even.
    """
    total = is_real.sum()
    losses: list[Tensor] = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        topk_ids = probabilities.topk(top_k, dim=-1).indices
        chosen = torch.zeros_like(probabilities).scatter(1, topk_ids, 1.0)
        load = (chosen * is_real[:, None]).sum(0) / (total * top_k)
        share = (probabilities * is_real[:, None]).sum(0) / total
        losses.append((load * share).sum() * logits.shape[-1])
    return torch.stack(losses).mean()


def language_loss(logits: Tensor, labels: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """Return the next-token loss and the z-loss of the output logits.

    The z-loss keeps log sum exp near 0, so that the logit of a likely token is small and bfloat16
    holds it exactly enough.

    Args:
        logits: `[B, S, V]` for the tokens before `labels`.
        labels: `[B, S]`; negative where no loss is due.
        z_weight: Factor of the squared log sum exp.

    Returns:
        The mean cross entropy, and the weighted z-loss.
    """
    logits = logits.float().flatten(0, 1)
    labels = labels.flatten()
    is_due = (labels >= 0).float()
    normalizer = logits.logsumexp(-1)
    chosen = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    count = is_due.sum()
    cross_entropy = ((normalizer - chosen) * is_due).sum() / count
    return cross_entropy, z_weight * (normalizer.square() * is_due).sum() / count


@torch.no_grad()
def sample(
    model: Qwen3MoeForCausalLM,
    prompts: list[list[int]],
    *,
    length: int,
    end_id: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """Sample one response per prompt at temperature 1, recomputing the whole row each step.

    Args:
        model: In evaluation mode; moved nowhere.
        prompts: Token ids.
        length: Most tokens of a row, prompt included.
        end_id: Ends a response; part of what is returned.
        generator: On the model's device.

    Returns:
        The responses.
    """
    device = model.device
    rows = torch.full((len(prompts), length), end_id, device=device)
    for row, prompt in enumerate(prompts):
        rows[row, : len(prompt)] = torch.tensor(prompt, device=device)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ends, index = starts.clone(), torch.arange(len(prompts), device=device)
    is_open = torch.ones_like(starts, dtype=torch.bool)
    while bool(is_open.any()):
        width = int(ends.max())
        hidden = model.model(input_ids=rows[:, :width], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[index, ends - 1]).float()
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        rows[index[is_open], ends[is_open]] = tokens[is_open]
        ends = ends + is_open
        is_open &= (tokens != end_id) & (ends < length)
    return [rows[row, int(starts[row]) : int(ends[row])].tolist() for row in range(len(prompts))]
