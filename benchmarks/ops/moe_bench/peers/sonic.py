"""SonicMoE: its router, its metadata kernel and its two projections, for inference."""

import torch
from torch import Tensor

from moe_bench.data import LayerInput, LayerWeights
from moe_bench.peers.contract import Configuration, LayerCall
from moe_bench.peers.sites import Site
from moe_bench.shapes import LayerShape

__all__ = ["SonicMoE"]

_FEWEST_TOKENS = 1024
_TILES = {(128, 192, True), (128, 128, True), (256, 128, False), (128, 256, False)}
"""Rows, columns and ping-pong schedule. Its whole list builds for many minutes; these are the ones it picks on Hopper."""


class SonicMoE:
    """The layer; its autotuner chooses among four tiles per GEMM."""

    name = "sonic_moe"

    def __init__(self, site: Site) -> None:
        site.root("sonic")
        import quack.gemm_interface as gemms
        import sonicmoe.functional as layer
        from sonicmoe.enums import ActivationType

        for tuned in (gemms.gemm_gated_tuned, gemms.gemm_tuned):
            tuned.configs = [c for c in tuned.configs if _is_taken(c.kwargs["config"])]
            tuned._precompile = _nothing
        self._layer, self._activation = layer, ActivationType("swiglu")

    def refusal(self, shape: LayerShape, num_tokens: int) -> str | None:
        """It is made for many rows per expert."""
        if not (shape.has_softmax_routing and shape.has_all_experts):
            return "its router is a softmax over experts that are all on one rank"
        if num_tokens < _FEWEST_TOKENS:
            return f"its tiles have 128 rows of tokens; measured from T={_FEWEST_TOKENS} on"
        return None

    def configurations(self, shape: LayerShape, num_tokens: int) -> list[Configuration]:
        """Its autotuner chooses at the first call."""
        del shape, num_tokens
        return [Configuration(label="its autotuner, 4 tiles per GEMM")]

    def layer(
        self,
        shape: LayerShape,
        given: LayerInput,
        weights: LayerWeights,
        configuration: Configuration,
    ) -> LayerCall:
        """Bind one layer."""
        del configuration
        layer, activation = self._layer, self._activation
        experts, top_k = shape.num_local_experts, shape.routing.top_k
        tokens = given.x.shape[0]
        gemm1, gemm2 = weights.gemm1.permute(1, 2, 0), weights.gemm2.permute(1, 2, 0)
        router = layer.TC_Softmax_Topk_Router_Function

        def integers(count: int) -> Tensor:
            return torch.empty(count, dtype=torch.int32, device=given.x.device)

        @torch.no_grad()
        def run() -> Tensor:
            pairs = tokens * top_k
            scores, ids = router.apply(given.logits, experts, top_k, False, True)
            by_expert, back, gathered = integers(pairs), integers(pairs), integers(pairs)
            counts, offsets = integers(experts), integers(experts + 1)
            layer.TC_topk_router_metadata_triton(ids, experts, counts, offsets, gathered, by_expert, back)  # fmt: skip
            places = (gathered, by_expert, back, None, False)
            projected, hidden = layer._UpProjection.apply(
                given.x, gemm1, None, offsets, pairs, top_k, *places, activation, True, True
            )
            return layer._DownProjection.apply(
                projected, hidden, gemm2, None, scores, offsets, tokens, top_k, *places, activation
            )

        return LayerCall(run=run)


def _is_taken(configuration: object) -> bool:
    """Whether the autotuner may try a configuration."""
    c = configuration
    is_hopper = c.device_capacity == 9 and not c.swap_ab and c.cluster_m == 2
    return is_hopper and (c.tile_m, c.tile_n, c.pingpong) in _TILES


def _nothing(*_: object, **__: object) -> None:
    """Build nothing ahead."""
