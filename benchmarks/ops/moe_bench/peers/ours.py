"""This library's own layer, with and without a replay buffer."""

import torch
from torch import Tensor

from moe_bench.data import LayerInput, LayerWeights
from moe_bench.peers.contract import Configuration, LayerCall
from moe_bench.shapes import LayerShape
from routing_replay.kernels import bf16_moe

__all__ = ["Ours"]


class Ours:
    """`bf16_moe` as a user calls it; the tables of the package choose tiles."""

    def __init__(self, *, is_recording: bool, backend: str = "triton") -> None:
        self.name = "ours_recording" if is_recording else "ours"
        self._is_recording = is_recording
        self._backend = backend

    def refusal(self, shape: LayerShape, num_tokens: int) -> str | None:
        """Nothing is refused."""
        del shape, num_tokens

    def configurations(self, shape: LayerShape, num_tokens: int) -> list[Configuration]:
        """The one that the package chooses."""
        del shape, num_tokens
        return [Configuration(label=f"backend {self._backend}, the package's tables")]

    def layer(
        self,
        shape: LayerShape,
        given: LayerInput,
        weights: LayerWeights,
        configuration: Configuration,
    ) -> LayerCall:
        """Bind one layer."""
        del configuration
        recorded = None
        if self._is_recording:
            recorded = torch.full(given.topk_ids.shape, -1, dtype=torch.int16, device=given.x.device)  # fmt: skip
        routing = shape.routing

        def run() -> Tensor:
            output = bf16_moe(
                given.logits,
                given.bias,
                given.x,
                weights.gemm1,
                weights.gemm2,
                routing.num_experts,
                routing.top_k,
                routing.n_group,
                routing.topk_group,
                shape.intermediate_size,
                0,
                shape.num_local_experts,
                routing.routed_scaling_factor,
                routing.type,
                routing_replay_out=recorded,
                backend=self._backend,
            )
            assert isinstance(output, Tensor)
            return output

        return LayerCall(run=run, recorded=recorded)
