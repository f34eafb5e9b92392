"""Given routing as one Triton kernel: taken apart, checked, recorded."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's stubs describe neither launches nor the values inside a kernel.

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["compile_cases", "launch_given"]

_BLOCK_ELEMENTS = 128


@triton.jit
def _given_kernel(
    given_ptr, given_weights_ptr, ids_ptr, weights_ptr, replay_ptr, num_tokens, num_experts,
    TOP_K: tl.constexpr, TOP_K_POW2: tl.constexpr, IS_PACKED: tl.constexpr, HAS_REPLAY: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Rows of ids as given; weights 0 where an id is no expert or came before in its row."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.broadcast_to(tl.arange(0, TOP_K_POW2)[None, :], (BLOCK_T, TOP_K_POW2))
    is_cell = (row < num_tokens)[:, None] & (column < TOP_K)
    at = row.to(tl.int64)[:, None] * TOP_K + column
    ids = tl.load(given_ptr + at, mask=is_cell, other=-1)
    if IS_PACKED:
        weights = (ids << 16).to(tl.float32, bitcast=True)
        ids = ids >> 16
    else:
        weights = tl.load(given_weights_ptr + at, mask=is_cell, other=0.0).to(tl.float32)
    usable = (ids >= 0) & (ids < num_experts)
    for earlier in tl.static_range(TOP_K - 1):
        other = tl.sum(tl.where(column == earlier, ids, 0), axis=1)
        usable = usable & ~((column > earlier) & (ids == other[:, None]))
    tl.store(ids_ptr + at, ids, mask=is_cell)
    tl.store(weights_ptr + at, tl.where(usable, weights, 0.0), mask=is_cell)
    if HAS_REPLAY:
        fits = (ids >= -32768) & (ids <= 32767)
        tl.store(replay_ptr + at, tl.where(fits, ids, -1).to(tl.int16), mask=is_cell)


def _constexprs(top_k: int, *, is_packed: bool, has_replay: bool) -> dict[str, Any]:
    top_k_pow2 = triton.next_power_of_2(top_k)
    return {
        "TOP_K": top_k,
        "TOP_K_POW2": top_k_pow2,
        "IS_PACKED": is_packed,
        "HAS_REPLAY": has_replay,
        "BLOCK_T": max(1, _BLOCK_ELEMENTS // top_k_pow2),
    }


def launch_given(
    given: Tensor,
    given_weights: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    routing_replay_out: Tensor | None,
    *,
    num_experts: int,
) -> None:
    """Take given routing apart and record it, in one launch.

    Args:
        given: int32 `[T, K]`, contiguous: ids, or `(id << 16) | bits of the bfloat16 weight`.
        given_weights: bfloat16 or float32 `[T, K]`, contiguous; None where they are packed.
        ids: int32 `[T, K]`, contiguous; overwritten with the ids as given.
        weights: float32 `[T, K]`, contiguous; overwritten; 0 for an id that is no expert or came before in its row.
        routing_replay_out: int16 `[>= T, K]`, contiguous, or None; rows `[0, T)` are overwritten with the ids as given, -1 for
            one that is no int16.
        num_experts: Experts on all ranks.

    Runtime: one launch, none for no tokens; no sync; allocates nothing; CUDA-graph safe; bitwise deterministic; no gradients.
    """
    num_tokens, top_k = given.shape
    if num_tokens == 0:
        return
    constexprs = _constexprs(
        top_k, is_packed=given_weights is None, has_replay=routing_replay_out is not None
    )
    _given_kernel[(triton.cdiv(num_tokens, constexprs["BLOCK_T"]),)](
        given,
        given_weights,
        ids,
        weights,
        routing_replay_out,
        num_tokens,
        num_experts,
        num_warps=1,
        **constexprs,
    )


def compile_cases() -> Sequence[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Examples for the compile tests: (name, kernel, signature, constexprs).

    Returns:
        Packed and separate weights, with and without a replay buffer.
    """
    signature = {
        "given_ptr": "*i32",
        "given_weights_ptr": "*bf16",
        "ids_ptr": "*i32",
        "weights_ptr": "*fp32",
        "replay_ptr": "*i16",
        "num_tokens": "i32",
        "num_experts": "i32",
    }
    packed = _constexprs(8, is_packed=True, has_replay=True)
    separate = _constexprs(6, is_packed=False, has_replay=False)
    return [
        ("packed", _given_kernel, signature, {**packed, "given_weights_ptr": None}),
        ("separate", _given_kernel, signature, {**separate, "replay_ptr": None}),
    ]
