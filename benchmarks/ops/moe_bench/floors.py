"""The least time that a layer can take on one H100: bytes that must move, operations that must be done."""

from dataclasses import dataclass

from moe_bench.shapes import LayerShape

__all__ = ["BF16_TFLOP_PER_S", "READ_TB_PER_S", "Floor", "Work", "floor_of", "work_of"]

READ_TB_PER_S = 3.106
"""A read-only stream of 1.2 GB on an H100 80GB HBM3 (700 W), measured."""

BF16_TFLOP_PER_S = 782.0
"""An 8192^3 product of random bfloat16 in a short burst on the same machine, measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one layer must do, whoever does it.

    Attributes:
        touched_experts: Local experts with at least one token (a mean over layers).
        num_bytes: Weights of those experts once, rows that they read once, and the output.
        num_flops: Multiplications and additions of both GEMMs, without padding.
    """

    touched_experts: float
    num_bytes: float
    num_flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The larger of two times.

    Attributes:
        us: Microseconds.
        bound: `memory` or `compute`.
    """

    us: float
    bound: str


def work_of(
    shape: LayerShape,
    *,
    num_tokens: int,
    touched_experts: float,
    local_pairs: float,
    rows_read: float,
    weight_bytes: int,
    activation_bytes: int,
) -> Work:
    """Count bytes and operations of one layer.

    Args:
        shape: The layer.
        num_tokens: T.
        touched_experts: Local experts that the ids name.
        local_pairs: (token, expert) pairs whose expert is here: `T * K` where all experts are.
        rows_read: Tokens with at least one such pair.
        weight_bytes: Bytes of one weight, of the real dtype.
        activation_bytes: Bytes of one activation.

    Returns:
        The work; router logits are left out, as they are everywhere in these tables.
    """
    weights_of_expert = 3 * shape.hidden_size * shape.intermediate_size
    rows = (rows_read + num_tokens) * shape.hidden_size
    return Work(
        touched_experts=touched_experts,
        num_bytes=touched_experts * weights_of_expert * weight_bytes + rows * activation_bytes,
        num_flops=2.0 * local_pairs * weights_of_expert,
    )


def floor_of(work: Work) -> Floor:
    """Return the least time of a layer's work.

    Args:
        work: Bytes and operations.

    Returns:
        The larger of the two times, and which it is.
    """
    memory_us = work.num_bytes / READ_TB_PER_S / 1e6
    compute_us = work.num_flops / BF16_TFLOP_PER_S / 1e6
    if memory_us >= compute_us:
        return Floor(us=memory_us, bound="memory")
    return Floor(us=compute_us, bound="compute")
