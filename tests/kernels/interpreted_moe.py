"""Runs of the Triton experts in the interpreter, by name: `TRITON_INTERPRET=1 python interpreted_moe.py NAME`.

A process of its own, because the interpreter is chosen where a kernel is defined. Prints `same` at the end.
"""

import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from routing_replay.kernels import ActivationType, RoutingMethod, RoutingMethodType
from routing_replay.kernels.experts import (
    ExpertWeights,
    SwigluParameters,
    apply_activation,
    combine_reference,
)
from routing_replay.kernels.experts._triton import launch_combine, launch_gemm
from routing_replay.kernels.experts.config import ExpertsChoice, GemmTile
from routing_replay.kernels.experts.order_triton import tile_and_block
from routing_replay.kernels.fused_moe.launches import moe_triton, routed_moe_triton
from routing_replay.kernels.fused_moe.layer import ExpertsLayer
from routing_replay.kernels.fused_moe.reference import moe_reference, routed_moe_reference
from routing_replay.kernels.permutation import PermutationPlan, PermutationShape
from routing_replay.kernels.permutation.reference import plan_reference

SWIGLU = ActivationType.Swiglu
Parts = tuple[Tensor, Tensor, Tensor]


def small_tile(rows: int = 32, depth: int = 16) -> GemmTile:
    return GemmTile(rows=rows, depth=depth, stages=2, warps=4)


def choice(tile_tokens: int = 16) -> ExpertsChoice:
    return ExpertsChoice(engine="portable", tile_tokens=tile_tokens, gemm1=small_tile(64, 32), gemm2=small_tile(64, 32))  # fmt: skip


def plan_of(ids: Tensor, experts: int, tile: int, first: int = 0, local: int | None = None) -> PermutationPlan:  # fmt: skip
    shape = PermutationShape(
        num_tokens=ids.shape[0],
        top_k=ids.shape[1],
        num_experts=experts,
        local_expert_offset=first,
        num_local_experts=experts if local is None else local,
        tile_tokens=tile,
    )
    plan = plan_reference(ids, shape)
    rows, ctas = int(plan.total_num_padded_tokens), int(plan.num_non_exiting_ctas)
    # What a plan leaves undefined must not matter.
    plan.permuted_idx_to_token_idx[rows:] = 1 << 30
    plan.cta_idx_xy_to_batch_idx[ctas:] = 1 << 30
    plan.cta_idx_xy_to_mn_limit[ctas:] = 1 << 30
    return plan


def distinct_ids(tokens: int, experts: int, top_k: int) -> Tensor:
    return torch.rand(tokens, experts).argsort(-1)[:, :top_k].int().contiguous()


def close(out: Tensor, expected: Tensor) -> None:
    """Sums in another order: last places of float32, or one of bfloat16."""
    atol, rtol = (2e-2, 2**-7) if out.dtype is torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(out, expected, atol=atol, rtol=rtol)


def check_gemm(
    activation: ActivationType | None,
    *,
    sizes: tuple[int, int] = (40, 24),
    tile_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    swiglu: bool = False,
    with_bias: bool = False,
    scaled: bool = False,
    top_k: int = 2,
    tile: GemmTile | None = None,
) -> None:
    """One GEMM against a product for each row of the plan; padding, and what lies past the end, hold NaN."""
    width, columns = sizes
    tokens, experts = 17, 5
    ids = distinct_ids(tokens, experts, top_k)
    plan = plan_of(ids, experts, tile_tokens, first=1, local=3)
    is_gated = activation is not None and activation.is_gated
    rows = columns * (2 if is_gated else 1)
    gather = activation is not None
    x = torch.randn(tokens if gather else plan.shape.max_padded_tokens, width).to(dtype)
    limits = [int(limit) for limit in plan.cta_idx_xy_to_mn_limit[: int(plan.num_non_exiting_ctas)]]
    used = [row for tile, limit in enumerate(limits) for row in range(tile * tile_tokens, limit)]
    if not gather:
        unused = torch.ones(len(x), dtype=torch.bool)
        unused[used] = False
        x[unused] = float("nan")
    weights = (torch.randn(3, rows, width) / 4).to(weights_dtype or dtype)
    bias = torch.randn(3, rows) if with_bias else None
    parameters = SwigluParameters()
    if swiglu:
        parameters = SwigluParameters(alpha=torch.rand(3) + 1, beta=torch.rand(3), limit=torch.rand(3))  # fmt: skip
    scales = torch.rand(tokens) if scaled else None
    out = torch.full((plan.shape.max_padded_tokens, columns), float("nan"), dtype=dtype)
    launch_gemm(
        x,
        weights,
        out,
        plan,
        tile=tile or small_tile(),
        gather=gather,
        activation=activation,
        parameters=parameters,
        bias=bias,
        row_scales=scales,
    )
    expected = torch.full_like(out, float("nan"))
    for row in used:
        expert = int(plan.cta_idx_xy_to_batch_idx[row // tile_tokens])
        token = int(plan.permuted_idx_to_token_idx[row]) if gather else row
        source = x[token] if scales is None else (x[token].float() * scales[token]).to(dtype)
        value = (weights[expert].float() @ source.float()).to(dtype)
        if bias is not None:
            value = value + bias[expert].to(dtype)
        if activation is not None:
            which = torch.tensor([expert])
            value = apply_activation(value[None], activation, parameters, which)[0].to(dtype)
        expected[row] = value
    assert torch.equal(out.isnan(), expected.isnan()), "padding was written, or a row was not"
    close(out.nan_to_num(0.0), expected.nan_to_num(0.0))


def gemm() -> None:
    for activation in (*ActivationType, None):
        for tile_tokens in (16, 128):
            check_gemm(activation, tile_tokens=tile_tokens, with_bias=activation is not SWIGLU)
    check_gemm(SWIGLU, swiglu=True, with_bias=True)
    check_gemm(SWIGLU, swiglu=True, tile_tokens=128)
    check_gemm(ActivationType.Relu2, tile_tokens=12)  # a tile that is no power of two
    check_gemm(None, tile_tokens=8, sizes=(1, 1))
    check_gemm(SWIGLU, sizes=(33, 65), tile=small_tile(64, 32))
    check_gemm(SWIGLU, scaled=True, top_k=1)
    check_gemm(SWIGLU, scaled=True, top_k=1, tile_tokens=128)


def gemm_bfloat16() -> None:
    bf16 = torch.bfloat16
    for tile_tokens in (16, 128):
        check_gemm(SWIGLU, dtype=bf16, tile_tokens=tile_tokens, with_bias=True, swiglu=True)
        check_gemm(None, dtype=bf16, tile_tokens=tile_tokens, with_bias=True)
        check_gemm(SWIGLU, dtype=bf16, weights_dtype=torch.float32, tile_tokens=tile_tokens)
    check_gemm(SWIGLU, dtype=bf16, scaled=True, top_k=1)


def combine() -> None:
    for tokens, top_k, columns in ((1, 1, 8), (5, 3, 40), (17, 8, 300)):
        ids = torch.randint(-1, 6, (tokens, top_k)).int()
        ids[0] = -1
        plan = plan_of(ids, 6, 16, first=2, local=3)
        index = plan.expanded_idx_to_permuted_idx
        rows = torch.full((plan.shape.max_padded_tokens, columns), float("nan"))
        rows[index[index >= 0].long()] = torch.randn(int((index >= 0).sum()), columns)
        weights = torch.randn(tokens, top_k)
        weights[(index < 0).reshape(tokens, top_k)] = float("nan")
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.full((tokens, columns), float("nan"), dtype=dtype)
            launch_combine(rows.to(dtype), weights, index, out)
            assert (out[0] == 0).all()
            close(out, combine_reference(rows.to(dtype), weights, index))
            wide = torch.full((tokens, columns + 3), float("nan"), dtype=dtype)
            launch_combine(rows.to(dtype), weights, index, wide[:, :columns])
            assert torch.equal(wide[:, :columns], out)
            assert wide[:, columns:].isnan().all()


def make_layer(
    experts: int = 8,
    hidden: int = 40,
    intermediate: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    shared: int = 0,
    **more: object,
) -> ExpertsLayer:
    weights = ExpertWeights(
        gemm1_weights=(torch.randn(experts + shared, 2 * intermediate, hidden) / 6).to(dtype),
        gemm2_weights=(torch.randn(experts + shared, hidden, intermediate) / 5).to(dtype),
        gemm1_bias=torch.randn(experts + shared, 2 * intermediate) / 4,
        gemm2_bias=torch.randn(experts + shared, hidden) / 4,
    )
    fields: dict[str, object] = {"weights": weights, "activation": SWIGLU, "parameters": SwigluParameters(),
                                 "num_experts": experts + shared, "local_expert_offset": 0, "choice": choice(), **more}  # fmt: skip
    return ExpertsLayer(**fields)  # pyright: ignore[reportArgumentType]


def method(kind: RoutingMethodType = RoutingMethodType.RenormalizeNaive, top_k: int = 2, **more: object) -> RoutingMethod:  # fmt: skip
    return RoutingMethod(type=kind, num_experts=8, top_k=top_k, **more)  # pyright: ignore[reportArgumentType]


def buffer(tokens: int, top_k: int = 2) -> Tensor:
    return torch.full((tokens + 3, top_k), -1, dtype=torch.int16)


def finish(parts: Parts, like: Tensor) -> Tensor:
    """Sum into memory that holds NaN, as `bf16_moe` does."""
    out = torch.full_like(like, float("nan"))
    launch_combine(*parts, out)
    return out


def run(logits: Tensor, hidden: Tensor, layer: ExpertsLayer, routing: RoutingMethod, recorded: Tensor | None = None, forced: Tensor | None = None) -> Tensor:  # fmt: skip
    parts = moe_triton(logits, hidden, routing, layer, routing_bias=None, routing_replay_out=recorded, routing_replay_in=forced)  # fmt: skip
    return finish(parts, hidden)


def expected_of(logits: Tensor, hidden: Tensor, layer: ExpertsLayer, routing: RoutingMethod, forced: Tensor | None = None) -> Tensor:  # fmt: skip
    parts = moe_reference(logits, hidden, routing, layer, routing_bias=None, routing_replay_out=None, routing_replay_in=forced)  # fmt: skip
    return combine_reference(*parts)


def moe() -> None:
    layer, routing = make_layer(), method()
    for tokens in (1, 5, 65):
        logits, hidden = torch.randn(tokens, 8), torch.randn(tokens, 40)
        recorded = buffer(tokens)
        out = run(logits, hidden, layer, routing, recorded)
        close(out, expected_of(logits, hidden, layer, routing))
        assert recorded[:tokens].tolist() == logits.argsort(-1, descending=True)[:, :2].tolist()
        assert (recorded[tokens:] == -1).all()
        if tokens == 65:
            continue
        assert torch.equal(out, run(logits, hidden, layer, routing)), "recording changed a bit"
        assert torch.equal(out, run(logits, hidden, layer, routing, forced=recorded)), "forcing changed a bit"  # fmt: skip
        changed = recorded.clone()
        changed[tokens // 2, 1] = next(e for e in range(8) if e not in recorded[tokens // 2].tolist())  # fmt: skip
        differs = (run(logits, hidden, layer, routing, forced=changed) != out).any(1)
        assert differs.tolist() == [row == tokens // 2 for row in range(tokens)]


def moe_variants() -> None:
    logits, hidden = torch.randn(9, 8), torch.randn(9, 40)
    shared = make_layer(shared=1)
    routing = method(num_fused_shared_experts=1)
    close(run(logits, hidden, shared, routing), expected_of(logits, hidden, shared, routing))
    llama = make_layer(use_routing_scales_on_input=True)
    routing = method(RoutingMethodType.Llama4, 1)
    out = run(logits, hidden, llama, routing)
    close(out, expected_of(logits, hidden, llama, routing))
    other = make_layer()
    plain = ExpertsLayer(weights=llama.weights, activation=SWIGLU, parameters=other.parameters, num_experts=8,
                         local_expert_offset=0, choice=choice())  # fmt: skip
    assert (run(logits, hidden, plain, routing) - out).abs().max() > 1e-3
    forced = torch.tensor([[3, 3], [-2, 3], [8, 3], [32767, 5], [-1, 0], [5, 6], [6, 5], [7, 7], [0, 1]], dtype=torch.int16)  # fmt: skip
    layer, routing = make_layer(), method()
    recorded = buffer(9)
    out = run(logits, hidden, layer, routing, recorded, forced)
    close(out, expected_of(logits, hidden, layer, routing, forced))
    native = logits[4].argsort(descending=True)[:2].tolist()
    given = forced.tolist()
    assert recorded[:9].tolist() == [*given[:4], native, *given[5:]]
    bf16 = make_layer(dtype=torch.bfloat16)
    out = run(logits, hidden.bfloat16(), bf16, routing)
    close(out, expected_of(logits, hidden.bfloat16(), bf16, routing))
    rows = torch.randn(9, 40)
    strided = torch.empty(9, 43)[:, :40].copy_(rows)
    assert torch.equal(run(logits, strided, layer, routing), run(logits, rows, layer, routing))


def expert_parallel() -> None:
    logits, hidden = torch.randn(9, 8), torch.randn(9, 40)
    logits[:, 6:] = -100.0  # the last rank gets nothing
    layer, routing = make_layer(), method()
    whole = buffer(9)
    expected = run(logits, hidden, layer, routing, whole)
    total = torch.zeros_like(expected)
    for first in range(0, 8, 2):
        here = slice(first, first + 2)
        weights = ExpertWeights(
            gemm1_weights=layer.weights.gemm1_weights[here],
            gemm2_weights=layer.weights.gemm2_weights[here],
            gemm1_bias=layer.weights.gemm1_bias[here],  # pyright: ignore[reportOptionalSubscript]
            gemm2_bias=layer.weights.gemm2_bias[here],  # pyright: ignore[reportOptionalSubscript]
        )
        part = ExpertsLayer(weights=weights, activation=SWIGLU, parameters=layer.parameters, num_experts=8,
                            local_expert_offset=first, choice=choice())  # fmt: skip
        recorded = buffer(9)
        out = run(logits, hidden, part, routing, recorded)
        assert torch.equal(recorded, whole), "every rank records all ids"
        assert (out[~((whole[:9] >= first) & (whole[:9] < first + 2)).any(1)] == 0).all()
        total += out
    close(total, expected)


def unfinalized() -> None:
    logits, hidden = torch.randn(5, 8), torch.randn(5, 40)
    layer, routing = make_layer(), method()
    parts = moe_triton(logits, hidden, routing, layer, routing_bias=None, routing_replay_out=None, routing_replay_in=None)  # fmt: skip
    rows, weights, index = parts
    shape = PermutationShape(num_tokens=5, top_k=2, num_experts=8, local_expert_offset=0, num_local_experts=8, tile_tokens=16)  # fmt: skip
    assert rows.shape == (shape.max_padded_tokens, 40)
    assert sorted(index.tolist()) == sorted(set(index.tolist()))
    total = (rows[index.long()].reshape(5, 2, -1) * weights[..., None]).sum(1)
    close(total, expected_of(logits, hidden, layer, routing))
    nothing = moe_triton(logits[:0], hidden[:0], routing, layer, routing_bias=None, routing_replay_out=buffer(0), routing_replay_in=None)  # fmt: skip
    assert [tuple(part.shape) for part in nothing] == [(0, 40), (0, 2), (0,)]
    assert finish(nothing, hidden[:0]).shape == (0, 40)


def routed() -> None:
    hidden = torch.randn(9, 40)
    layer = make_layer()
    ids = torch.tensor([[0, 7], [3, 3], [-1, 2], [8, 1], [-1, -1], [4, 5], [5, 4], [70000, 6], [65536, 2]]).int()  # fmt: skip
    weights = torch.rand(9, 2)
    for given in (weights, weights.bfloat16()):
        recorded, expected_record = buffer(9), buffer(9)
        parts = routed_moe_triton(ids, given, hidden, layer, routing_replay_out=recorded)
        expected = routed_moe_reference(ids, given, hidden, layer, routing_replay_out=expected_record)  # fmt: skip
        assert torch.equal(recorded, expected_record)
        assert torch.equal(parts[1], expected[1])
        assert (parts[2] < 0).tolist() == (expected[2] < 0).tolist()
        close(finish(parts, hidden), combine_reference(*expected))
        assert (finish(parts, hidden)[4] == 0).all()
    assert recorded[7:9].tolist() == [[-1, 6], [-1, 2]]
    ids = ids.clamp(max=8)
    packed = (ids << 16) | (weights.bfloat16().view(torch.int16).int() & 0xFFFF)
    again = buffer(9)
    apart = finish(routed_moe_triton(ids, weights.bfloat16(), hidden, layer, routing_replay_out=None), hidden)  # fmt: skip
    together = finish(routed_moe_triton(packed, None, hidden, layer, routing_replay_out=again), hidden)  # fmt: skip
    assert torch.equal(apart, together)
    assert again[:9].tolist() == ids.tolist()


@triton.jit
def order_kernel(out_ptr, num_tiles, BLOCKS: tl.constexpr, GROUP: tl.constexpr):  # noqa: ANN001
    pid = tl.program_id(0)
    tile, block = tile_and_block(pid, num_tiles, BLOCKS, GROUP)
    tl.store(out_ptr + 2 * pid, tile)
    tl.store(out_ptr + 2 * pid + 1, block)


def order() -> None:
    """Every (tile, block) is taken once, also in a last group that is not full; tiles of a group share a block."""
    for tiles, blocks, group in ((1, 3, 8), (8, 3, 8), (19, 3, 8), (5, 4, 1), (6, 1, 4)):
        out = torch.full((tiles * blocks, 2), -1, dtype=torch.int32)
        order_kernel[(tiles * blocks,)](out, tiles, BLOCKS=blocks, GROUP=group)
        expected = [
            [tile, block]
            for first in range(0, tiles, group)
            for block in range(blocks)
            for tile in range(first, min(first + group, tiles))
        ]
        assert out.tolist() == expected


NAMES: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (order, gemm, gemm_bfloat16, combine, moe, moe_variants, expert_parallel, unfinalized, routed)
}  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    NAMES[sys.argv[1]]()
    sys.stdout.write("same\n")
