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

__all__ = ["ONE_WARP_EXPERTS", "compile_cases", "launch_route", "route_constexprs"]

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_NAN_KEY = tl.constexpr(0x7FC00000)
_NO_KEY = tl.constexpr(-0x80000000)


@triton.jit
def _order_key(x):
    """An int32 that orders as float32 does: -0.0 as 0.0, every NaN above infinity."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(_is_nan(x), _NAN_KEY, key)


@triton.jit
def _is_nan(x):
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def _key_value(key):
    """The float32 of an order key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _exp(x):
    """CUDA's own expf, as in torch, so that probabilities tie where torch's do; the interpreter has no libdevice."""
    return tl.exp(x) if _IS_INTERPRETED else libdevice.exp(x)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + _exp(-x))


@triton.jit
def _divide(x, by):
    """Divide rows `[R, C]` by `[R]`, rounding as torch does."""
    return tl.div_rn(x, tl.broadcast_to(by[:, None], x.shape))


@triton.jit
def _best(keys, ids, AXIS: tl.constexpr):
    """The largest key along an axis and the smallest id that has it."""
    best = tl.max(keys, axis=AXIS)
    is_best = keys == tl.expand_dims(best, AXIS)
    return best, tl.min(tl.where(is_best, ids, 0x7FFFFFFF), axis=AXIS)


@triton.jit
def _softmax_terms(logits, is_cell):
    """Powers `[R, E]`, the logit that they are relative to `[R]`, and their sum `[R]`."""
    # A row with a NaN is all NaN, as torch's softmax is; so is one of minus infinities.
    has_nan = tl.max(_is_nan(logits).to(tl.int32), axis=1) > 0
    top = tl.where(has_nan, float("nan"), tl.max(logits, axis=1))
    powers = tl.where(is_cell, _exp(logits - top[:, None]), 0.0)
    return powers, top, tl.sum(powers, axis=1)


@triton.jit
def _scores(logits, is_cell, SCORE: tl.constexpr):
    """What a row selects on `[R, E]`; for softmax also what its powers are relative to, and their sum `[R]`."""
    top = tl.zeros((logits.shape[0],), tl.float32)
    total = tl.zeros((logits.shape[0],), tl.float32)
    scores = logits
    if SCORE == 1:
        powers, top, total = _softmax_terms(logits, is_cell)
        scores = _divide(powers, total)
    if SCORE == 2:
        scores = _sigmoid(logits)
    return scores, top, total


@triton.jit
def _keep_best_groups(
    keys, ids, ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr,
    GROUP_SIZE_POW2: tl.constexpr, TOP_GROUPS: tl.constexpr,
):  # fmt: skip
    """Make the experts outside the best groups lose to every expert inside, minus infinity among them."""
    grouped = tl.reshape(keys, (ROWS, GROUPS_POW2, GROUP_SIZE_POW2))
    grouped_ids = tl.reshape(ids, (ROWS, GROUPS_POW2, GROUP_SIZE_POW2))
    first, first_id = _best(grouped, grouped_ids, 2)
    without = tl.where(grouped_ids == tl.expand_dims(first_id, 2), _NO_KEY, grouped)
    second = tl.max(without, axis=2)
    group = tl.broadcast_to(tl.arange(0, GROUPS_POW2)[None, :], (ROWS, GROUPS_POW2))
    rest = _order_key(_key_value(first) + _key_value(second))
    rest = tl.where(group < GROUPS, rest, _NO_KEY)
    chosen = tl.zeros((ROWS, GROUPS_POW2), tl.int1)
    for _ in tl.static_range(TOP_GROUPS):
        _best_key, best_group = _best(rest, group, 1)
        chosen = chosen | (group == best_group[:, None])
        rest = tl.where(group == best_group[:, None], _NO_KEY, rest)
    grouped = tl.where(tl.expand_dims(chosen, 2), grouped, _NO_KEY)
    return tl.reshape(grouped, (ROWS, GROUPS_POW2 * GROUP_SIZE_POW2))


@triton.jit
def _pick(keys, ids, column, TOP_K: tl.constexpr):
    """The ids of the largest keys of each row, in rank order, in columns `[R, K]`."""
    picked = tl.zeros(column.shape, tl.int32)
    for rank in tl.static_range(TOP_K):
        _best_key, best_id = _best(keys, ids, 1)
        picked = tl.where(column == rank, best_id[:, None], picked)
        keys = tl.where(ids == best_id[:, None], _NO_KEY, keys)
    return picked


@triton.jit
def _force(picked, replay_in_ptr, row, column, is_out, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr):  # fmt: skip
    """Given ids in place of picked ones, and which of them count: in range, and the first of their kind."""
    given_ptr = replay_in_ptr + row.to(tl.int64)[:, None] * TOP_K
    given = tl.load(given_ptr + column, mask=is_out, other=-1).to(tl.int32)
    first = tl.load(given_ptr + tl.zeros_like(column), mask=is_out, other=-1).to(tl.int32)
    picked = tl.where(first == -1, picked, given)
    usable = is_out & (picked >= 0) & (picked < NUM_EXPERTS)
    for earlier in tl.static_range(TOP_K - 1):
        other = tl.sum(tl.where(column == earlier, picked, 0), axis=1)
        usable = usable & ~((column > earlier) & (picked == other[:, None]))
    return picked, usable


@triton.jit
def _weigh(
    picked_logits, usable, top, total, scale, SCORE: tl.constexpr, WEIGHT: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    """Combine weights `[R, K]` of the picked experts; 0 where an id does not count."""
    weights = picked_logits
    if SCORE == 1:
        weights = _divide(_exp(picked_logits - top[:, None]), total)
    if (SCORE == 2) | (WEIGHT == 2):
        weights = _sigmoid(picked_logits)
    if WEIGHT == 1:
        highest = tl.max(picked_logits, axis=1)
        powers = tl.where(usable, _exp(picked_logits - highest[:, None]), 0.0)
        weights = _divide(powers, tl.sum(powers, axis=1))
    weights = tl.where(usable, weights, 0.0)
    sums = tl.sum(weights, axis=1)
    if NORMALIZE == 1:
        # A row without any id that counts has no weight to share out; dividing would make it NaN.
        has_usable = tl.max(usable.to(tl.int32), axis=1) > 0
        weights = _divide(weights, tl.where(has_usable, sums, 1.0))
    if NORMALIZE == 2:
        weights = _divide(weights, sums + 1e-20)
    if NORMALIZE == 3:
        exact = weights.to(tl.float64) * scale / (sums.to(tl.float64) + 1e-20)[:, None]
        weights = exact.to(tl.float32)
    else:
        weights = weights * scale
    return weights


@triton.jit
def route_rows(
    logits_ptr, bias_ptr, replay_in_ptr, weights_ptr, ids_ptr, replay_out_ptr, num_tokens, logits_stride, scale,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr, COLUMNS_POW2: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr, GROUP_SIZE_POW2: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SCORE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_REPLAY_IN: tl.constexpr, HAS_REPLAY_OUT: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Route this program's rows, store what is asked for, and return the ids `[BLOCK_T, COLUMNS_POW2]`.

    SCORE: 0 logits, 1 softmax, 2 sigmoid. WEIGHT: 0 the score, 1 softmax of the picked, 2 sigmoid of the picked.
    BIAS: 0 none, 1 on scores for selection, 2 on logits. NORMALIZE: 0 no, 1 divide by the sum, 2 by the sum + 1e-20, 3 as
    2, in float64. Columns: K picked experts, then the fused shared ones, then padding.
    """
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // GROUPS
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = row < num_tokens
    slot = tl.arange(0, GROUPS_POW2 * GROUP_SIZE_POW2)
    in_group = slot % GROUP_SIZE_POW2
    expert = (slot // GROUP_SIZE_POW2) * GROUP_SIZE + in_group
    is_expert = (in_group < GROUP_SIZE) & (slot // GROUP_SIZE_POW2 < GROUPS)
    is_cell = is_row[:, None] & is_expert[None, :]
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    logits = tl.load(row_ptr[:, None] + expert[None, :], mask=is_cell, other=-float("inf")).to(tl.float32)  # fmt: skip
    bias = tl.zeros(slot.shape, tl.float32)
    if BIAS != 0:
        bias = tl.load(bias_ptr + expert, mask=is_expert, other=0.0).to(tl.float32)
    if BIAS == 2:
        logits += bias[None, :]
    scores, top, total = _scores(logits, is_cell, SCORE)
    if BIAS == 1:
        scores += bias[None, :]
    keys = tl.where(is_expert[None, :], _order_key(scores), _NO_KEY)
    # A slot that is no expert must lose every tie.
    ids = tl.broadcast_to(tl.where(is_expert, expert, NUM_EXPERTS + slot)[None, :], keys.shape)
    if GROUPS > 1:
        keys = _keep_best_groups(keys, ids, BLOCK_T, GROUPS, GROUPS_POW2, GROUP_SIZE_POW2, TOP_GROUPS)  # fmt: skip
    column = tl.broadcast_to(tl.arange(0, COLUMNS_POW2)[None, :], (BLOCK_T, COLUMNS_POW2))
    picked = _pick(keys, ids, column, TOP_K)
    is_out = is_row[:, None] & (column < TOP_K)
    usable = is_out
    if HAS_REPLAY_IN:
        picked, usable = _force(picked, replay_in_ptr, row, column, is_out, NUM_EXPERTS, TOP_K)
    # The logits of the picked experts once more: they are in the cache now.
    safe = tl.where(usable, picked, 0)
    picked_logits = tl.load(row_ptr[:, None] + safe, mask=usable, other=-float("inf")).to(tl.float32)  # fmt: skip
    if BIAS == 2:
        picked_logits += tl.load(bias_ptr + safe, mask=usable, other=0.0).to(tl.float32)
    weights = _weigh(picked_logits, usable, top, total, scale, SCORE, WEIGHT, NORMALIZE)
    if HAS_REPLAY_OUT:
        replay = row.to(tl.int64)[:, None] * TOP_K + column
        tl.store(replay_out_ptr + replay, picked.to(tl.int16), mask=is_out)
    # Every row goes to the fused shared experts with weight 1.
    picked = tl.where(column < TOP_K, picked, NUM_EXPERTS - TOP_K + column)
    weights = tl.where(column < TOP_K, weights, 1.0)
    out = row.to(tl.int64)[:, None] * (TOP_K + NUM_SHARED) + column
    is_stored = is_row[:, None] & (column < TOP_K + NUM_SHARED)
    tl.store(weights_ptr + out, weights, mask=is_stored)
    tl.store(ids_ptr + out, picked, mask=is_stored)
    return picked


@triton.jit
def wait_for_earlier_kernel(PDL: tl.constexpr):
    """Under programmatic dependent launch: let the next kernel start, and wait for the memory of the one before."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        # The next kernel waits for all of this one before it reads; all it can do now is take its place.
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, replay_in_ptr, weights_ptr, ids_ptr, replay_out_ptr, num_tokens, logits_stride, scale,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr, COLUMNS_POW2: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr, GROUP_SIZE_POW2: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SCORE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_REPLAY_IN: tl.constexpr, HAS_REPLAY_OUT: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernel(PDL)
    route_rows(
        logits_ptr, bias_ptr, replay_in_ptr, weights_ptr, ids_ptr, replay_out_ptr, num_tokens, logits_stride, scale,
        NUM_EXPERTS, TOP_K, NUM_SHARED, COLUMNS_POW2, GROUPS, GROUPS_POW2, GROUP_SIZE_POW2, TOP_GROUPS,
        SCORE, WEIGHT, BIAS, NORMALIZE, HAS_REPLAY_IN, HAS_REPLAY_OUT, BLOCK_T,
    )  # fmt: skip


ONE_WARP_EXPERTS = 512
"""Up to as many experts a row is routed by one warp: more need synchronisation, which costs more than it saves."""

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
    """Give the constexprs of `route_rows`.

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
    return {
        "NUM_EXPERTS": method.num_experts,
        "TOP_K": method.top_k,
        "NUM_SHARED": method.num_fused_shared_experts,
        "COLUMNS_POW2": triton.next_power_of_2(method.num_columns),
        "GROUPS": method.n_group,
        "GROUPS_POW2": triton.next_power_of_2(method.n_group),
        "GROUP_SIZE_POW2": triton.next_power_of_2(group_size),
        "TOP_GROUPS": method.topk_group,
        "SCORE": _SCORE.get(method.type, 0),
        "WEIGHT": _WEIGHT.get(method.type, 0),
        "BIAS": (2 if method.has_router_bias else 1) if has_bias else 0,
        "NORMALIZE": _normalization(method, in_float64=in_float64),
        "HAS_REPLAY_IN": has_in,
        "HAS_REPLAY_OUT": has_out,
        "BLOCK_T": 1,
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
        num_tokens,
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
        "num_tokens": "i32",
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
