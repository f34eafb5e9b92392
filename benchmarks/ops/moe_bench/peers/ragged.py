"""The layer on the `triton_kernels` library: `matmul_ogs` twice, with its own routing and its fused activation."""

import triton
import triton.language as tl
from torch import Tensor

from moe_bench.data import LayerInput, LayerWeights
from moe_bench.peers.contract import Configuration, LayerCall
from moe_bench.peers.sites import Site
from moe_bench.shapes import LayerShape

__all__ = ["TritonKernels"]


@triton.jit
def _silu_times(rows):  # noqa: ANN001, ANN202
    """Activate rows whose columns are gate and up in turn."""
    gate, up = tl.split(tl.reshape(rows, (rows.shape[0], rows.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)


class TritonKernels:
    """The layer; heuristics of the library choose tiles."""

    name = "triton_kernels"

    def __init__(self, site: Site) -> None:
        site.root("sglang")
        from triton_kernels import matmul_ogs
        from triton_kernels.tensor import make_ragged_tensor_metadata
        from triton_kernels.topk import topk

        self._ogs, self._ragged, self._topk = matmul_ogs, make_ragged_tensor_metadata, topk
        function = matmul_ogs.FnSpecs("silu_times", _silu_times, (), reduction_n=2)
        self._activation = matmul_ogs.FusedActivation(function, ())

    def refusal(self, shape: LayerShape, num_tokens: int) -> str | None:
        """Its router is a softmax over experts that are all here."""
        del num_tokens
        if not (shape.has_softmax_routing and shape.has_all_experts):
            return "its router is a softmax over experts that are all on one rank"
        return None

    def configurations(self, shape: LayerShape, num_tokens: int) -> list[Configuration]:
        """Its heuristics choose."""
        del shape, num_tokens
        return [Configuration(label="its heuristics")]

    def layer(
        self,
        shape: LayerShape,
        given: LayerInput,
        weights: LayerWeights,
        configuration: Configuration,
    ) -> LayerCall:
        """Bind one layer."""
        del configuration
        ogs, top_k = self._ogs, shape.routing.top_k
        gemm1, gemm2 = weights.interleaved_gemm1().mT, weights.gemm2.mT

        def run() -> Tensor:
            # A softmax over the selected logits alone: equal to softmax, top-k, division by the sum.
            chosen = self._topk(given.logits, top_k, apply_softmax=True)
            by_token = chosen.mask_metadata.row_sorted_indx
            by_expert = chosen.mask_metadata.col_sorted_indx
            ragged = self._ragged(chosen.mask_metadata.col_sum, by_token.shape[0])
            scores = chosen.vals.flatten()[by_expert]
            plan = ogs.RoutingData(scores, ragged.slice_sizes, given.logits.shape[1], top_k, ragged)
            hidden = ogs.matmul_ogs(
                given.x,
                gemm1,
                None,
                plan,
                gather_indx=ogs.GatherIndx(by_expert, by_token),
                fused_activation=self._activation,
            )
            return ogs.matmul_ogs(
                hidden,
                gemm2,
                None,
                plan,
                scatter_indx=ogs.ScatterIndx(by_token, by_expert),
                gammas=plan.gate_scal,
            )

        return LayerCall(run=run)
