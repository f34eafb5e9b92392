"""Routers of all entrants, alone and with the plan of the grouped GEMMs, as calls on logits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bench.peers.contract import PeerError
from moe_bench.peers.sglang import SglangTriton
from moe_bench.peers.sites import Site, import_despite_missing
from moe_bench.peers.vllm import VllmTriton
from moe_bench.shapes import LayerShape
from routing_replay.kernels import plan_permutation, route
from routing_replay.kernels.permutation import route_and_plan, route_and_plan_workspace

__all__ = ["LOADERS", "Router", "RouterInput", "load_all"]

Results = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterInput:
    """What a router gets, and the buffer that a recording one writes.

    Attributes:
        logits: float32 `[T, E]`.
        bias: float32 `[E]` where the router has one.
        recorded: int16 `[T, K]`.
    """

    logits: Tensor
    bias: Tensor | None
    recorded: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """One way to route.

    Attributes:
        name: Name in the tables.
        makes_plan: Whether pairs are also sorted by expert and tile.
        is_recording: Whether the ids go to the replay buffer.
        run: Returns weights `[T, K]`, ids `[T, K]`, and what the plan consists of.
    """

    name: str
    makes_plan: bool
    run: Callable[[RouterInput], Results]
    is_recording: bool = False


def ours(shape: LayerShape, tile_tokens: int, site: Site) -> Iterator[Router]:
    """This library's ops: alone, recording, and with the plan in one launch and in two."""
    del site
    method = shape.routing

    def alone(given: RouterInput) -> Results:
        return route(given.logits, method, routing_bias=given.bias)

    def recording(given: RouterInput) -> Results:
        return route(given.logits, method, routing_bias=given.bias, routing_replay_out=given.recorded)  # fmt: skip

    def two_launches(given: RouterInput) -> Results:
        weights, ids = alone(given)
        plan = plan_permutation(ids, num_experts=method.num_experts, tile_tokens=tile_tokens, are_distinct=True)  # fmt: skip
        return weights, ids, plan.permuted_idx_to_token_idx

    workspace = route_and_plan_workspace(method.num_experts, device="cuda")

    def planned(given: RouterInput, recorded: Tensor | None) -> Results:
        weights, ids, plan = route_and_plan(
            given.logits,
            method,
            tile_tokens=tile_tokens,
            routing_bias=given.bias,
            routing_replay_out=recorded,
            workspace=workspace,
        )
        return weights, ids, plan.permuted_idx_to_token_idx

    yield Router(name="ours", makes_plan=False, run=alone)
    yield Router(name="ours, recording", makes_plan=False, run=recording, is_recording=True)
    yield Router(name="ours", makes_plan=True, run=lambda given: planned(given, None))
    yield Router(name="ours, recording", makes_plan=True, run=lambda given: planned(given, given.recorded), is_recording=True)  # fmt: skip
    yield Router(name="ours, in two ops", makes_plan=True, run=two_launches)


def plain_torch(shape: LayerShape, tile_tokens: int, site: Site) -> Iterator[Router]:
    """Softmax, top-k and division as torch ops."""
    del tile_tokens, site
    if not shape.has_softmax_routing:
        raise PeerError("plain torch is written out for softmax routing")

    def run(given: RouterInput) -> Results:
        weights, ids = torch.softmax(given.logits, -1).topk(shape.routing.top_k, -1)
        return weights / weights.sum(-1, keepdim=True), ids

    yield Router(name="torch", makes_plan=False, run=run)


def sglang(shape: LayerShape, tile_tokens: int, site: Site) -> Iterator[Router]:
    """Its Triton router, its older CUDA top-k, and its align kernels."""
    kernels = SglangTriton(site, is_fused=False).kernels
    top_k, experts = shape.routing.top_k, shape.routing.num_experts

    def router(given: RouterInput) -> Results:
        return kernels.route(given.logits, given.bias, shape)

    def planned(given: RouterInput) -> Results:
        weights, ids = router(given)
        return weights, ids, *kernels.align(ids, tile_tokens, experts)

    def cuda_topk(given: RouterInput) -> Results:
        weights = given.logits.new_empty(len(given.logits), top_k)
        ids = torch.empty_like(weights, dtype=torch.int32)
        kernels.ops.topk_softmax(weights, ids, given.logits, True, 0.0, None)
        return weights, ids

    yield Router(name="SGLang moe_fused_gate", makes_plan=False, run=router)
    yield Router(name="SGLang moe_fused_gate and align", makes_plan=True, run=planned)
    if shape.has_softmax_routing:
        yield Router(name="sgl-kernel topk_softmax", makes_plan=False, run=cuda_topk)


def vllm(shape: LayerShape, tile_tokens: int, site: Site) -> Iterator[Router]:
    """Its top-k kernels, and its align kernel."""
    peer = VllmTriton(site)
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    def router(given: RouterInput) -> Results:
        return peer.route(given.logits, given.logits, given.bias, shape)

    def planned(given: RouterInput) -> Results:
        weights, ids = router(given)
        return weights, ids, *moe_align_block_size(ids, tile_tokens, shape.routing.num_experts)

    name = "topk_softmax" if shape.has_softmax_routing else "grouped_topk"
    yield Router(name=f"vLLM {name}", makes_plan=False, run=router)
    yield Router(name=f"vLLM {name} and align", makes_plan=True, run=planned)


def flashinfer(shape: LayerShape, tile_tokens: int, site: Site) -> Iterator[Router]:
    """`fused_topk_deepseek`, which has no plan; its kernel is built by nvcc at the first call."""
    del tile_tokens
    site.root("flashinfer")
    if shape.has_softmax_routing:
        raise PeerError("fused_topk_deepseek routes as DeepSeek-V3 does, not by softmax")
    topk, _ = import_despite_missing(_fused_topk_deepseek, root="flashinfer")
    routing = shape.routing

    def run(given: RouterInput, recorded: Tensor | None) -> Results:
        weights = given.logits.new_empty(len(given.logits), routing.top_k)
        ids = torch.empty_like(weights, dtype=torch.int32)
        numbers = (routing.n_group, routing.topk_group, routing.top_k, routing.routed_scaling_factor)  # fmt: skip
        topk(given.logits, given.bias, *numbers, weights, ids, True, recorded)
        return weights, ids

    name = "FlashInfer fused_topk_deepseek"
    yield Router(name=name, makes_plan=False, run=lambda given: run(given, None))
    yield Router(name=f"{name}, recording", makes_plan=False, run=lambda given: run(given, given.recorded), is_recording=True)  # fmt: skip


def _fused_topk_deepseek() -> Callable[..., None]:
    from flashinfer.fused_moe import fused_topk_deepseek

    return fused_topk_deepseek


Loader = Callable[[LayerShape, int, Site], Iterator[Router]]

LOADERS: dict[str, Loader] = {
    "ours": ours,
    "torch": plain_torch,
    "sglang": sglang,
    "vllm": vllm,
    "flashinfer": flashinfer,
}
"""What makes the routers of each entrant for a shape and a tile; each raises where it has none."""


def load_all(
    names: Sequence[str],
    shape: LayerShape,
    tile_tokens: int,
    site: Site,
    absent: Callable[[str, str], None],
) -> list[Router]:
    """Load the named routers.

    Args:
        names: Keys of `LOADERS`.
        shape: How is routed.
        tile_tokens: Rows of a tile of the plan.
        site: Where the packs are.
        absent: Called with the name and the reason where one does not load.

    Returns:
        The routers that load.
    """
    found: list[Router] = []
    for name in names:
        try:
            found += LOADERS[name](shape, tile_tokens, site)
        except Exception as err:
            absent(name, f"{type(err).__name__}: {' '.join(str(err).split())}"[:600])
    return found
