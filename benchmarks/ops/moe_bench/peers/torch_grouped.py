"""Plain torch with its grouped GEMM: what one writes without a kernel library."""

import torch
from torch import Tensor
from torch.nn import functional

from moe_bench.data import LayerInput, LayerWeights
from moe_bench.peers.contract import Configuration, LayerCall
from moe_bench.shapes import LayerShape

__all__ = ["TorchGrouped"]


class TorchGrouped:
    """Sort the pairs by expert, two grouped GEMMs, weighted sum."""

    name = "torch_grouped_mm"

    def refusal(self, shape: LayerShape, num_tokens: int) -> str | None:
        """Only softmax routing with all experts here is written out."""
        del num_tokens
        if not (shape.has_softmax_routing and shape.has_all_experts):
            return "plain torch is written out for softmax routing with all experts on one rank"
        return None

    def configurations(self, shape: LayerShape, num_tokens: int) -> list[Configuration]:
        """There is nothing to choose."""
        del shape, num_tokens
        return [Configuration(label="torch's own")]

    def layer(
        self,
        shape: LayerShape,
        given: LayerInput,
        weights: LayerWeights,
        configuration: Configuration,
    ) -> LayerCall:
        """Bind one layer."""
        del configuration
        top_k = shape.routing.top_k

        def run() -> Tensor:
            scores, ids = torch.softmax(given.logits, -1).topk(top_k, -1)
            scores = scores / scores.sum(-1, keepdim=True)
            return _experts(given.x, weights, ids, scores)

        return LayerCall(run=run)


def _experts(x: Tensor, weights: LayerWeights, ids: Tensor, scores: Tensor) -> Tensor:
    num_tokens, top_k = ids.shape
    experts, inner = weights.gemm1.shape[0], weights.gemm2.shape[2]
    sorted_ids, order = ids.flatten().sort(stable=True)
    every = torch.arange(experts, device=x.device)
    ends = torch.searchsorted(sorted_ids, every, right=True).int()
    projected = functional.grouped_mm(x[order // top_k], weights.gemm1.mT, offs=ends)
    hidden = functional.silu(projected[:, :inner]) * projected[:, inner:]
    rows = functional.grouped_mm(hidden, weights.gemm2.mT, offs=ends)
    place = torch.empty_like(order)
    place[order] = torch.arange(num_tokens * top_k, device=x.device)
    by_token = rows[place].view(num_tokens, top_k, -1)
    return torch.bmm(scores.to(x.dtype).unsqueeze(1), by_token).squeeze(1)
