"""Routing as one Triton kernel: scores, top-k, weights, and the replay row."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from routing_replay.kernels.routing.method import RoutingMethod, RoutingMethodType

__all__ = [
    "ONE_WARP_EXPERTS",
    "QUICK_BITS",
    "compile_cases",
    "launch_route",
    "quick_reciprocal",
    "route_constexprs",
]

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_NAN_KEY = tl.constexpr(0x7FC00000)
_NO_KEY = tl.constexpr(-0x80000000)
_NO_ID = tl.constexpr(0x7FFFFFFF)
QUICK_BITS = tl.constexpr((127 + 100) << 23)
"""Of 2**100, from where on `quick_reciprocal` is not used."""


@triton.jit
def _flip(bits):
    """Between the bits of a float32 and an int32 that orders as it does."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _order_key(x):
    """An int32 that orders as float32 does: -0.0 as 0.0, every NaN above infinity."""
    return tl.where(x != x, _NAN_KEY, _flip((x + 0.0).to(tl.int32, bitcast=True)))  # noqa: PLR0124


@triton.jit
def _key_value(key):
    """The float32 of an order key."""
    return _flip(key).to(tl.float32, bitcast=True)


@triton.jit
def _exp(x):
    """CUDA's own expf, as in torch, so that probabilities tie where torch's do; the interpreter has no libdevice."""
    return tl.exp(x) if _IS_INTERPRETED else libdevice.exp(x)


@triton.jit
def _approximate_reciprocal(x):
    """To an ulp, by one instruction; the interpreter has no PTX."""
    if _IS_INTERPRETED:
        return tl.div_rn(1.0, x)
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def quick_reciprocal(x):
    """The correctly rounded `1 / x` for x from 1 to 2**100, by two of Newton's steps in place of a branch.

    A proof leaves out the significand of ones alone, where the first guess decides: benchmarks/ops/check_routing.py tries all.

    Args:
        x: float32, any shape.

    Returns:
        float32, of the same shape.

    Runtime: device code; no branch.
    """
    guess = _approximate_reciprocal(x)
    guess = tl.fma(guess, tl.fma(-x, guess, 1.0), guess)
    return tl.fma(guess, tl.fma(-x, guess, 1.0), guess)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + _exp(-x))


@triton.jit
def _sigmoids(x):
    """`_sigmoid` of many: the compiler's division, a branch for each, is for rows where one is out of the quick one's range."""
    denominators = 1.0 + _exp(-x)
    # As integers: NaN and infinity are the largest.
    if tl.max(denominators.to(tl.int32, bitcast=True), axis=0) < QUICK_BITS:
        values = quick_reciprocal(denominators)
    else:
        values = tl.div_rn(1.0, denominators)
    return values


@triton.jit
def _best_id(keys, ids):
    """The smallest id that has the largest key of `[N]`."""
    return tl.min(tl.where(keys == tl.max(keys, axis=0), ids, _NO_ID), axis=0)


@triton.jit
def _softmax(logits, is_expert):
    """Probabilities `[E]`, the logit that their powers are relative to, and the sum of the powers."""
    # The largest key is exact, and one integer reduction finds NaN as well. A row with a NaN is all NaN, as torch's
    # softmax is; so is one of minus infinities.
    top = _key_value(tl.max(_order_key(logits), axis=0))
    powers = tl.where(is_expert, _exp(logits - top), 0.0)
    total = tl.sum(powers, axis=0)
    return tl.div_rn(powers, tl.zeros_like(powers) + total), top, total


@triton.jit
def _keep_best_groups(
    keys, GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr, GROUP_SIZE_POW2: tl.constexpr, TOP_GROUPS: tl.constexpr
):  # fmt: skip
    """Make the experts outside the best groups lose to every expert inside, minus infinity among them."""
    grouped = tl.reshape(keys, (GROUPS_POW2, GROUP_SIZE_POW2))
    first = tl.max(grouped, axis=1)
    is_first = grouped == first[:, None]
    # The second is the first again where two have it.
    others = tl.max(tl.where(is_first, _NO_KEY, grouped), axis=1)
    second = tl.where(tl.sum(is_first.to(tl.int32), axis=1) > 1, first, others)
    group = tl.arange(0, GROUPS_POW2)
    score = _order_key(_key_value(first) + _key_value(second))
    score = tl.where(group < GROUPS, score, _NO_KEY)
    # Counted, not searched for: the groups' ranks do not wait for each other.
    is_larger = score[None, :] > score[:, None]
    is_earlier = (score[None, :] == score[:, None]) & (group[None, :] < group[:, None])
    rank = tl.sum((is_larger | is_earlier).to(tl.int32), axis=1)
    kept = tl.where((rank < TOP_GROUPS)[:, None], grouped, _NO_KEY)
    return tl.reshape(kept, keys.shape)


@triton.jit
def _force(picked, replay_in_ptr, row, column, is_picked, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr):  # fmt: skip
    """Given ids in place of picked ones, and which of them count: in range, and the first of their kind."""
    given_ptr = replay_in_ptr + row * TOP_K
    given = tl.load(given_ptr + column, mask=is_picked, other=-1).to(tl.int32)
    picked = tl.where(tl.load(given_ptr) == -1, picked, given)
    # A row's shared experts have columns of their own, which a given id must not take for itself.
    picked = tl.where((picked >= NUM_EXPERTS) & (picked < NUM_EXPERTS + NUM_SHARED), -1, picked)
    usable = is_picked & (picked >= 0) & (picked < NUM_EXPERTS)
    for earlier in tl.static_range(TOP_K - 1):
        other = tl.sum(tl.where(column == earlier, picked, 0), axis=0)
        usable = usable & ~((column > earlier) & (picked == other))
    return picked, usable


@triton.jit
def pick_experts(
    logits_ptr, bias_ptr, replay_in_ptr, row, logits_stride,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, COLUMNS_POW2: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr, GROUP_SIZE_POW2: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SCORE: tl.constexpr, BIAS: tl.constexpr, HAS_REPLAY_IN: tl.constexpr, NUM_SHARED: tl.constexpr,
):  # fmt: skip
    """Pick or take a row's ids `[COLUMNS_POW2]`, and tell which count; for softmax, also its largest logit and the sum.

    SCORE: 0 logits, 1 softmax, 2 sigmoid. BIAS: 0 none, 1 on scores for selection, 2 on logits. Each group has its own slots.
    """
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // GROUPS
    slot = tl.arange(0, GROUPS_POW2 * GROUP_SIZE_POW2)
    in_group = slot % GROUP_SIZE_POW2
    expert = (slot // GROUP_SIZE_POW2) * GROUP_SIZE + in_group
    is_expert = (in_group < GROUP_SIZE) & (slot // GROUP_SIZE_POW2 < GROUPS)
    at = logits_ptr + row * logits_stride + expert
    scores = tl.load(at, mask=is_expert, other=-float("inf")).to(tl.float32)
    bias = tl.zeros(slot.shape, tl.float32)
    if BIAS != 0:
        bias = tl.load(bias_ptr + expert, mask=is_expert, other=0.0).to(tl.float32)
    top = 0.0
    total = 0.0
    if BIAS == 2:
        scores += bias
    if SCORE == 1:
        scores, top, total = _softmax(scores, is_expert)
    if SCORE == 2:
        scores = _sigmoids(scores)
    if BIAS == 1:
        scores += bias
    keys = tl.where(is_expert, _order_key(scores), _NO_KEY)
    # A slot that is no expert must lose every tie.
    ids = tl.where(is_expert, expert, NUM_EXPERTS + slot)
    if GROUPS > 1:
        keys = _keep_best_groups(keys, GROUPS, GROUPS_POW2, GROUP_SIZE_POW2, TOP_GROUPS)
    column = tl.arange(0, COLUMNS_POW2)
    picked = tl.zeros((COLUMNS_POW2,), tl.int32)
    for rank in tl.static_range(TOP_K):
        best = _best_id(keys, ids)
        picked = tl.where(column == rank, best, picked)
        keys = tl.where(ids == best, _NO_KEY, keys)
    usable = column < TOP_K
    if HAS_REPLAY_IN:
        picked, usable = _force(
            picked, replay_in_ptr, row, column, usable, NUM_EXPERTS, TOP_K, NUM_SHARED
        )
    return picked, usable, top, total


@triton.jit
def _weigh(
    picked_logits, usable, top, total, scale, SCORE: tl.constexpr, WEIGHT: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    """Combine weights `[COLUMNS_POW2]` of the picked experts; 0 where an id does not count.

    WEIGHT: 0 the score, 1 softmax of the picked, 2 sigmoid of the picked. NORMALIZE: 0 no, 1 divide by the sum, 2 by the
    sum + 1e-20, 3 as 2, in float64.
    """
    weights = picked_logits
    ones = tl.full(weights.shape, 1.0, tl.float32)
    if SCORE == 1:
        weights = tl.div_rn(_exp(picked_logits - top), ones * total)
    if (SCORE == 2) | (WEIGHT == 2):
        weights = _sigmoid(picked_logits)
    if WEIGHT == 1:
        powers = tl.where(usable, _exp(picked_logits - tl.max(picked_logits, axis=0)), 0.0)
        weights = tl.div_rn(powers, ones * tl.sum(powers, axis=0))
    weights = tl.where(usable, weights, 0.0)
    total_weight = tl.sum(weights, axis=0)
    if NORMALIZE == 1:
        # A row without any id that counts has no weight to share out; dividing would make it NaN.
        has_usable = tl.max(usable.to(tl.int32), axis=0) > 0
        weights = tl.div_rn(weights, ones * tl.where(has_usable, total_weight, 1.0))
    if NORMALIZE == 2:
        weights = tl.div_rn(weights, ones * (total_weight + 1e-20))
    if NORMALIZE == 3:
        exact = weights.to(tl.float64) * scale / (total_weight.to(tl.float64) + 1e-20)
        return exact.to(tl.float32)
    return weights * scale


@triton.jit
def store_row(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, replay_out_ptr, row, logits_stride, scale, picked, usable, top, total,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr, COLUMNS_POW2: tl.constexpr,
    SCORE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, NORMALIZE: tl.constexpr, HAS_REPLAY_OUT: tl.constexpr,
):  # fmt: skip
    """Weigh what a row has picked, and store ids, weights and the replay row."""
    column = tl.arange(0, COLUMNS_POW2)
    # The logits of the picked experts once more: they are in the cache now.
    safe = tl.where(usable, picked, 0)
    logits = tl.load(logits_ptr + row * logits_stride + safe, mask=usable, other=-float("inf")).to(
        tl.float32
    )
    if BIAS == 2:
        logits += tl.load(bias_ptr + safe, mask=usable, other=0.0).to(tl.float32)
    weights = _weigh(logits, usable, top, total, scale, SCORE, WEIGHT, NORMALIZE)
    if HAS_REPLAY_OUT:
        tl.store(replay_out_ptr + row * TOP_K + column, picked.to(tl.int16), mask=column < TOP_K)
    # Every row goes to the fused shared experts with weight 1.
    weights = tl.where(column < TOP_K, weights, 1.0)
    out = row * (TOP_K + NUM_SHARED) + column
    tl.store(weights_ptr + out, weights, mask=column < TOP_K + NUM_SHARED)
    tl.store(ids_ptr + out, with_shared(picked, NUM_EXPERTS, TOP_K), mask=column < TOP_K + NUM_SHARED)  # fmt: skip


@triton.jit
def with_shared(picked, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr):
    """The ids of a row, those of fused shared experts after those it picked."""
    column = tl.arange(0, picked.shape[0])
    return tl.where(column < TOP_K, picked, NUM_EXPERTS - TOP_K + column)


@triton.jit
def wait_for_earlier_kernel(PDL: tl.constexpr):
    """Under programmatic dependent launch: wait for the memory of the kernel before, and let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        # The next kernel waits for all of this one before it reads; all it can do now is take its place.
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, replay_in_ptr, weights_ptr, ids_ptr, replay_out_ptr, logits_stride, scale,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr, COLUMNS_POW2: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr, GROUP_SIZE_POW2: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SCORE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_REPLAY_IN: tl.constexpr, HAS_REPLAY_OUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for each row."""
    row = tl.program_id(0).to(tl.int64)
    wait_for_earlier_kernel(PDL)
    picked, usable, top, total = pick_experts(
        logits_ptr, bias_ptr, replay_in_ptr, row, logits_stride, NUM_EXPERTS, TOP_K, COLUMNS_POW2, GROUPS, GROUPS_POW2,
        GROUP_SIZE_POW2, TOP_GROUPS, SCORE, BIAS, HAS_REPLAY_IN, NUM_SHARED,
    )  # fmt: skip
    store_row(
        logits_ptr, bias_ptr, weights_ptr, ids_ptr, replay_out_ptr, row, logits_stride, scale, picked, usable, top, total,
        NUM_EXPERTS, TOP_K, NUM_SHARED, COLUMNS_POW2, SCORE, WEIGHT, BIAS, NORMALIZE, HAS_REPLAY_OUT,
    )  # fmt: skip


ONE_WARP_EXPERTS = 512
"""Up to as many experts a row is routed by one warp: more need synchronisation, which costs more than it saves."""

_WARP = 32
_SCORE = {
    RoutingMethodType.Default: 1,
    RoutingMethodType.RenormalizeNaive: 1,
    RoutingMethodType.DeepSeekV3: 2,
    RoutingMethodType.SigmoidRenorm: 2,
    RoutingMethodType.MiniMax2: 2,
    RoutingMethodType.Sigmoid: 2,
}
_WEIGHT = {
    RoutingMethodType.Renormalize: 1,
    RoutingMethodType.Llama4: 2,
    RoutingMethodType.TopKSigmoid: 2,
}


def _normalization(method: RoutingMethod, *, in_float64: bool) -> int:
    if in_float64:
        return 3
    if method.type is RoutingMethodType.RenormalizeNaive:
        return 1
    return 2 if method.divides_by_sum else 0


def route_constexprs(
    method: RoutingMethod, *, has_bias: bool, has_in: bool, has_out: bool, in_float64: bool = False
) -> dict[str, Any]:
    """Give the constexprs of routing.

    Args:
        method: How logits become ids and weights.
        has_bias: Whether there is a bias,
        has_in: ids to force,
        has_out: and a buffer to record into.
        in_float64: Scale and divide in float64.

    Returns:
        Values by name.
    """
    group_size = method.num_experts // method.n_group
    groups_pow2 = triton.next_power_of_2(method.n_group)
    return {
        "NUM_EXPERTS": method.num_experts,
        "TOP_K": method.top_k,
        "NUM_SHARED": method.num_fused_shared_experts,
        # A warp at least where columns are compared: it reduces integers in one instruction.
        "COLUMNS_POW2": max(_WARP if has_in else 1, triton.next_power_of_2(method.num_columns)),
        "GROUPS": method.n_group,
        "GROUPS_POW2": groups_pow2,
        "GROUP_SIZE_POW2": max(_WARP // groups_pow2, triton.next_power_of_2(group_size)),
        "TOP_GROUPS": method.topk_group,
        "SCORE": _SCORE.get(method.type, 0),
        "WEIGHT": _WEIGHT.get(method.type, 0),
        "BIAS": (2 if method.has_router_bias else 1) if has_bias else 0,
        "NORMALIZE": _normalization(method, in_float64=in_float64),
        "HAS_REPLAY_IN": has_in,
        "HAS_REPLAY_OUT": has_out,
    }


def launch_route(
    router_logits: Tensor,
    method: RoutingMethod,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    routing_bias: Tensor | None,
    routing_replay_in: Tensor | None,
    routing_replay_out: Tensor | None,
    in_float64: bool = False,
    launch_pdl: bool = False,
) -> None:
    """Fill weights, ids and replay rows in one launch: a program of one warp for each token.

    Args:
        router_logits: `[T, E]` float32, bfloat16 or float16, rows of consecutive elements.
        method: How logits become ids and weights.
        topk_weights: `[T, K + S]`, any float dtype, contiguous; overwritten.
        topk_ids: int32 `[T, K + S]`, contiguous; overwritten.
        routing_bias: `[E]`, or None.
        routing_replay_in: int16 `[>= T, K]` ids to force, or None.
        routing_replay_out: int16 `[>= T, K]`, or None; rows `[0, T)` are overwritten.
        in_float64: Scale and divide by the sum in float64, as FlashInfer's `fused_topk_deepseek` does.
        launch_pdl: Start before the kernel ahead in the stream has ended (programmatic dependent launch, sm_90 on). The
            next kernel may then do the same; everything that this one reads or writes it touches after that kernel's end.

    Runtime: one launch, none for no tokens; no sync; allocates nothing; CUDA-graph safe; bitwise deterministic; no
        gradients.
    """
    num_tokens = router_logits.shape[0]
    if num_tokens == 0:
        return
    _route_kernel[(num_tokens,)](
        router_logits,
        routing_bias,
        routing_replay_in,
        topk_weights,
        topk_ids,
        routing_replay_out,
        router_logits.stride(0),
        method.routed_scaling_factor,
        num_warps=1 if method.num_experts <= ONE_WARP_EXPERTS else 4,
        **route_constexprs(
            method,
            has_bias=routing_bias is not None,
            has_in=routing_replay_in is not None,
            has_out=routing_replay_out is not None,
            in_float64=in_float64,
        ),
        PDL=launch_pdl,
        launch_pdl=launch_pdl,
    )


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        Every kind of score, weight, bias and normalisation, with and without replay.
    """
    signature = {
        "logits_ptr": "*fp32",
        "bias_ptr": "*fp32",
        "replay_in_ptr": "*i16",
        "weights_ptr": "*fp32",
        "ids_ptr": "*i32",
        "replay_out_ptr": "*i16",
        "logits_stride": "i32",
        "scale": "fp32",
    }
    grouped = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
    methods = {kind.name: RoutingMethod(type=kind, num_experts=128, top_k=1 if kind is RoutingMethodType.Llama4 else 8)
               for kind in RoutingMethodType}  # fmt: skip
    methods["grouped"] = RoutingMethod(
        type=RoutingMethodType.DeepSeekV3, num_experts=256, top_k=8, **grouped
    )
    methods["shared"] = RoutingMethod(
        type=RoutingMethodType.DeepSeekV3, num_experts=160, top_k=6, num_fused_shared_experts=2
    )
    cases = [
        (name, signature, route_constexprs(method, has_bias=method.takes_bias, has_in=False, has_out=True))
        for name, method in methods.items()
    ]  # fmt: skip
    for name in ("RenormalizeNaive", "grouped"):
        method = methods[name]
        forced = route_constexprs(method, has_bias=method.takes_bias, has_in=True, has_out=False)
        cases.append((f"{name}_forced", {**signature, "logits_ptr": "*bf16"}, forced))
    compatible = route_constexprs(
        methods["grouped"], has_bias=True, has_in=False, has_out=True, in_float64=True
    )
    cases.append(("grouped_float64", {**signature, "weights_ptr": "*bf16"}, compatible))
    return [(name, _route_kernel, types, {**case, "PDL": False}) for name, types, case in cases]
