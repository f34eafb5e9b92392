"""SGLang's Triton path: its kernel files, called in the order in which its runner calls them.

The engine around the files is not imported: modules of its names say that the machine is Hopper and that every optional
feature is off. Router, align, GEMMs, activation and sum are SGLang's own.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_bench.candidates import Tile, nearest, tile_candidates
from moe_bench.data import LayerInput, LayerWeights
from moe_bench.peers.contract import Configuration, LayerCall
from moe_bench.peers.sites import NoSettings, Site, load_file, stand_in_modules, switched_off
from moe_bench.shapes import LayerShape

__all__ = ["SglangKernels", "SglangTriton", "sglang_table"]

DEVICES = ("NVIDIA_H100_80GB_HBM3", "NVIDIA_H200")
_OPS = "sglang/kernels/ops/moe"
_TABLES = "sglang/srt/layers/moe/moe_runner/triton_utils/configs"
_FEW_TOKENS_TO_SUM = 32


def sglang_table(
    root: Path, shape: LayerShape, device: str, *, is_down: bool
) -> tuple[str, dict[int, Tile]] | None:
    """Return SGLang's own tiles for a shape, in its order of search: this Triton's folder, then the newest.

    Args:
        root: Where the pack is.
        shape: The layer.
        device: Name of a GPU in its file names.
        is_down: The tiles of GEMM 2.

    Returns:
        The folder's name and the tiles by number of tokens, or None.
    """
    suffix = "_down" if is_down else ""
    name = f"E={shape.num_local_experts},N={shape.intermediate_size},device_name={device}{suffix}"
    folders = sorted(
        (root / _TABLES).glob("triton_*"),
        key=lambda folder: [int(part) for part in folder.name.split("_")[1:]],
        reverse=True,
    )
    own = root / _TABLES / f"triton_{triton.__version__.replace('.', '_')}"
    for folder in (own, *folders):
        path = folder / f"{name}.json"
        if path.exists():
            table = json.loads(path.read_text())
            return folder.name, {int(key): value for key, value in table.items()}
    return None


class SglangKernels:
    """The files and the op library, loaded once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        torch.ops.load_library(str(root / "sgl_kernel" / "sm90" / "common_ops.abi3.so"))
        self.ops = torch.ops.sgl_kernel
        stand_in_modules(_engine())
        self.gemms = load_file(root / _OPS / "fused_moe_triton_kernels.py", "sglang_gemms")
        self._small_align = load_file(root / _OPS / "moe_align_small_numel.py", "sglang_align")
        self._gate = load_file(root / _OPS / "moe_fused_gate.py", "sglang_gate")

    def route(self, logits: Tensor, bias: Tensor | None, shape: LayerShape) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return weights and global ids, by the router that the engine takes on a GPU without FlashInfer."""
        routing = shape.routing
        if shape.has_softmax_routing:
            return self._gate.moe_fused_gate(logits, None, routing.top_k, "softmax")
        return self._gate.moe_fused_gate(
            logits,
            bias,
            routing.top_k,
            "sigmoid",
            routed_scaling_factor=routing.routed_scaling_factor,
            apply_routed_scaling_factor_on_output=True,
            num_expert_group=routing.n_group,
            topk_group=routing.topk_group,
        )

    def align(self, ids: Tensor, tile_rows: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return sorted pairs, the expert of each tile, and the padded count; -1 goes to a bucket of its own."""
        pairs, buckets = ids.numel(), num_experts + 1
        rows = pairs * tile_rows if pairs < buckets else pairs + buckets * (tile_rows - 1)
        rows = (rows + 3) // 4 * 4
        empty = lambda size: torch.empty(size, dtype=torch.int32, device=ids.device)  # noqa: E731
        order, experts, padded = empty(rows), empty(triton.cdiv(rows, tile_rows)), empty(1)
        small = self._small_align
        if pairs <= small.SMALL_NUMEL_LIMIT and buckets > 64:
            small.moe_align_small_numel(ids, buckets, tile_rows, order, experts, padded)
        else:
            self.ops.moe_align_block_size(ids, buckets, tile_rows, order, experts, padded, empty(buckets + 1), True, False)  # fmt: skip
        return order, experts, padded


@cache
def _kernels(root: Path) -> SglangKernels:
    return SglangKernels(root)


class SglangTriton:
    """The layer; `is_fused` is its opt-in SwiGLU in the epilogue of GEMM 1, on interleaved weight rows."""

    def __init__(self, site: Site, *, is_fused: bool) -> None:
        self.name = "sglang_fused_swiglu" if is_fused else "sglang_triton"
        self._is_fused = is_fused
        self.kernels = _kernels(site.root("sglang"))

    def refusal(self, shape: LayerShape, num_tokens: int) -> str | None:
        """Nothing is refused."""
        del shape, num_tokens

    def configurations(self, shape: LayerShape, num_tokens: int) -> list[Configuration]:
        """Its own H100 tiles; without them its H200 tiles and the common candidates."""
        found: list[Configuration] = []
        for device in DEVICES:
            up = sglang_table(self.kernels.root, shape, device, is_down=False)
            if up is None:
                continue
            values = {"up": nearest(up[1], num_tokens)}
            down = sglang_table(self.kernels.root, shape, device, is_down=True)
            if down is not None:
                same_rows = {"BLOCK_SIZE_M": values["up"]["BLOCK_SIZE_M"]}
                values["down"] = nearest(down[1], num_tokens) | same_rows
            found.append(Configuration(label=f"its {device} table, {up[0]}", values=values))
            break
        if not found or "H100" not in found[0].label:
            found += [
                Configuration(label=f"candidate {index}", values={"up": tile})
                for index, tile in enumerate(tile_candidates(shape, num_tokens))
            ]
        return found

    def layer(
        self,
        shape: LayerShape,
        given: LayerInput,
        weights: LayerWeights,
        configuration: Configuration,
    ) -> LayerCall:
        """Bind one layer."""
        kernels = self.kernels
        gemm1 = weights.interleaved_gemm1() if self._is_fused else weights.gemm1
        experts = _experts(kernels, configuration, shape, is_fused=self._is_fused)
        to_local = None
        if not shape.has_all_experts:
            to_local = torch.full((shape.routing.num_experts,), -1, dtype=torch.int32, device=given.x.device)  # fmt: skip
            here = shape.num_local_experts
            to_local[:here] = torch.arange(here, dtype=torch.int32, device=given.x.device)

        def run() -> Tensor:
            scores, ids = kernels.route(given.logits, given.bias, shape)
            local = ids if to_local is None else to_local[ids]
            return experts(given.x, gemm1, weights.gemm2, local, scores)

        return LayerCall(run=run)


def _experts(
    kernels: SglangKernels, configuration: Configuration, shape: LayerShape, *, is_fused: bool
) -> Callable[..., Tensor]:
    """Return align, GEMM 1, activation, GEMM 2 and sum with fixed tiles."""
    up = dict(configuration.values["up"])
    down = dict(configuration.values.get("down", {}))
    up_tma, down_tma = bool(up.pop("USE_TMA", 0)), bool(down.pop("USE_TMA", 0))
    is_partial = not shape.has_all_experts
    plain = {
        "compute_type": tl.bfloat16,
        "use_fp8_w8a8": False,
        "use_int8_w8a8": False,
        "use_int8_w8a16": False,
        "use_int4_w4a16": False,
        "per_channel_quant": False,
        "filter_expert": is_partial,
    }
    multiply = kernels.gemms.invoke_fused_moe_kernel

    def run(x: Tensor, gemm1: Tensor, gemm2: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        (tokens, top_k), (num_experts, rows_out, hidden) = ids.shape, gemm1.shape
        tile_rows = up["BLOCK_SIZE_M"]
        plan = kernels.align(ids, tile_rows, num_experts)
        padding = min(tokens * top_k, num_experts + 1) * (tile_rows - 1) if down_tma else 0
        rows = tokens * top_k + padding
        activated = x.new_empty(rows, rows_out // 2)
        projected = activated if is_fused else x.new_empty(rows, rows_out)
        multiply(x, gemm1, None, projected, None, None, None, scores, ids, *plan, False, top_k, up,
                 c_sorted=down_tma, b_use_tma=up_tma, fuse_swiglu=is_fused, **plain)  # fmt: skip
        if not is_fused and is_partial:
            owner = plan[1] if down_tma else ids
            kernels.gemms.act_and_mul_triton(projected, activated, up, ids, owner, down_tma)
        elif not is_fused:
            kernels.ops.silu_and_mul(activated, projected)
        by_pair = x.new_empty(tokens, top_k, hidden)
        multiply(activated, gemm2, None, by_pair, None, None, None, scores, ids, *plan, True, 1, down or up,
                 a_use_tma=down_tma, b_use_tma=down_tma, router_topk=top_k, **plain)  # fmt: skip
        return _summed(kernels, by_pair, x)

    return run


def _summed(kernels: SglangKernels, by_pair: Tensor, like: Tensor) -> Tensor:
    """Add the experts of a token with the kernel that the engine would take."""
    output = torch.empty_like(like)
    if by_pair.shape[1] == 2:
        return torch.add(by_pair[:, 0], by_pair[:, 1], out=output)
    if by_pair.shape[0] <= _FEW_TOKENS_TO_SUM:
        kernels.gemms.moe_sum_reduce_triton(by_pair, output, 1.0)
    else:
        kernels.ops.moe_sum_reduce(by_pair, output, 1.0)
    return output


def _engine() -> dict[str, dict[str, object]]:
    """Return the modules that the kernel files import, for a Hopper GPU, bf16 and no option."""

    def on(*_: object) -> bool:
        return True

    def same(function: object) -> object:
        return function

    def no_padding(_: object) -> int:
        return 0

    quantizers = ("per_token_group_quant_fp8", "scaled_fp8_quant", "sglang_per_token_group_quant_fp8")  # fmt: skip
    int8 = ("per_token_group_quant_int8", "per_token_quant_int8", "sglang_per_token_group_quant_int8")  # fmt: skip
    return {
        "sglang.kernels.jit.utils": {
            "is_arch_support_pdl": on,
            "cache_once": same,
            "load_jit": switched_off,
            "make_cpp_args": switched_off,
            "get_jit_cuda_arch": lambda: SimpleNamespace(major=9, minor=0),
        },
        "sglang.kernels.kernel_api_logging": {"debug_kernel_api": same},
        "sglang.kernels.ops.moe": {"moe_route_radix": SimpleNamespace(covered=switched_off)},
        "sglang.kernels.ops.quantization.fp8_kernel": dict.fromkeys(quantizers, switched_off),
        "sglang.kernels.ops.quantization.int8_kernel": dict.fromkeys(int8, switched_off),
        "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": switched_off},
        "sglang.srt.environ": {"envs": NoSettings()},
        "sglang.srt.layers.moe.utils": {"get_moe_padding_size": no_padding},
        "sglang.srt.utils": {
            "cpu_has_amx_support": switched_off,
            "is_cpu": switched_off,
            "is_cuda": on,
            "is_hip": switched_off,
            "is_sm90_supported": on,
        },
    }
