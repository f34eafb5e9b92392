"""vLLM's Triton path: `fused_topk` or its grouped top-k, then `fused_experts`."""

import json

import torch
from torch import Tensor

from moe_bench.candidates import Tile, nearest, tile_candidates
from moe_bench.data import LayerInput, LayerWeights
from moe_bench.peers.contract import Configuration, LayerCall
from moe_bench.peers.sglang import DEVICES, sglang_table
from moe_bench.peers.sites import Site, import_despite_missing
from moe_bench.shapes import LayerShape

__all__ = ["VllmTriton"]

_TABLES = "vllm/model_executor/layers/fused_moe/configs"
_SIGMOID = 1
_SERVING = ("cbor2", "openai", "openai_harmony", "zmq")
"""Packages of its HTTP server and processes, which its modules import and its kernels do not use."""


class VllmTriton:
    """The layer as vLLM's unquantised method runs it on Hopper with Triton."""

    name = "vllm_triton"

    def __init__(self, site: Site) -> None:
        self._root = site.root("vllm")
        self._sglang_root = site.root("sglang") if site.has("sglang") else None
        loaded, self.stand_ins = import_despite_missing(_load, root="vllm", known=_SERVING)
        self._override, self._experts, self._topk = loaded

    def refusal(self, shape: LayerShape, num_tokens: int) -> str | None:
        """Nothing is refused."""
        del shape, num_tokens

    def configurations(self, shape: LayerShape, num_tokens: int) -> list[Configuration]:
        """Its own H100 tiles; without them its H200 tiles or its default, the common candidates, and SGLang's tiles."""
        for device in DEVICES:
            table = self._table(shape, device)
            if table is not None:
                label = f"its {device} table"
                own = [Configuration(label=label, values={"up": nearest(table, num_tokens)})]
                if "H100" in device:
                    return own
                break
        else:
            own = [Configuration(label="its default")]
        own += [
            Configuration(label=f"candidate {index}", values={"up": tile})
            for index, tile in enumerate(tile_candidates(shape, num_tokens))
        ]
        if self._sglang_root is not None:
            theirs = sglang_table(self._sglang_root, shape, DEVICES[0], is_down=False)
            if theirs is not None:
                tile = nearest(theirs[1], num_tokens)
                tile.pop("USE_TMA", None)
                own.append(Configuration(label="SGLang's H100 table", values={"up": tile}))
        return own

    def layer(
        self,
        shape: LayerShape,
        given: LayerInput,
        weights: LayerWeights,
        configuration: Configuration,
    ) -> LayerCall:
        """Bind one layer."""
        experts = self._experts
        tile = dict(configuration.values["up"]) if configuration.values else None
        partial: dict[str, object] = {}
        if not shape.has_all_experts:
            to_local = torch.full((shape.routing.num_experts,), -1, dtype=torch.int32, device=given.x.device)  # fmt: skip
            here = shape.num_local_experts
            to_local[:here] = torch.arange(here, dtype=torch.int32, device=given.x.device)
            partial = {"global_num_experts": shape.routing.num_experts, "expert_map": to_local}

        def run() -> Tensor:
            scores, ids = self.route(given.x, given.logits, given.bias, shape)
            if tile is None:
                return experts(given.x, weights.gemm1, weights.gemm2, scores, ids, **partial)
            with self._override(tile):
                return experts(given.x, weights.gemm1, weights.gemm2, scores, ids, **partial)

        return LayerCall(run=run)

    def route(
        self, x: Tensor, logits: Tensor, bias: Tensor | None, shape: LayerShape
    ) -> tuple[Tensor, Tensor]:
        """Return weights and global ids by vLLM's own kernels."""
        routing = shape.routing
        if shape.has_softmax_routing:
            scores, ids, *_ = self._topk(x, logits, routing.top_k, renormalize=True)
            return scores, ids
        return torch.ops._moe_C.grouped_topk(
            logits,
            routing.n_group,
            routing.topk_group,
            routing.top_k,
            True,
            routing.routed_scaling_factor,
            bias,
            _SIGMOID,
        )

    def _table(self, shape: LayerShape, device: str) -> dict[int, Tile] | None:
        name = f"E={shape.num_local_experts},N={shape.intermediate_size},device_name={device}.json"
        path = self._root / _TABLES / name
        if not path.exists():
            return None
        table = json.loads(path.read_text())
        return {int(key): value for key, value in table.items() if key.isdigit()}


def _load() -> tuple[object, ...]:
    """Import what is called; the first import registers the ops."""
    import vllm._custom_ops  # noqa: F401
    from vllm.model_executor.layers.fused_moe import override_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

    return override_config, fused_experts, fused_topk
