"""Runs of the norm and rotation kernels in the interpreter: `TRITON_INTERPRET=1 python interpreted_norm_rotary.py NAME`.

Squares of the values sum up exactly in any order, so that rows in 16 bits come out bit for bit; in float32 the last place
may differ, as `rsqrt` does.
"""

import sys
from collections.abc import Callable

import torch
from exact_interpreter import repair_interpreter
from torch import Tensor

from routing_replay.kernels.norm import add_rms_norm_reference
from routing_replay.kernels.norm._triton import launch_add_rms_norm
from routing_replay.kernels.rotary import norm_rotate_store_reference
from routing_replay.kernels.rotary._triton import launch_norm_rotate_store

EPS = 1e-6


def even_values(*shape: int, dtype: torch.dtype) -> Tensor:
    """Multiples of 1/8 up to 2 that are exact in every dtype, as are the sums of their squares."""
    return (torch.randint(-16, 17, shape) / 8).to(dtype)


def norm() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, size in ((3, 64), (2, 96), (1, 2048), (4, 7)):
            x, residual = (even_values(rows, size, dtype=dtype) for _ in range(2))
            weight = torch.randn(size).to(dtype)
            for other in (residual, None):
                normed = torch.full_like(x, float("nan"))
                total = torch.full_like(x, 77.0)
                launch_add_rms_norm(x, other, weight, EPS, normed, total)
                expected, expected_total = add_rms_norm_reference(x, other, weight, EPS)
                if other is None:
                    assert (total == 77).all()
                else:
                    assert torch.equal(total, expected_total)
                # The mean of a size that is no power of two is rounded once more, and rsqrt is not exact.
                step = {torch.float32: 3e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
                torch.testing.assert_close(normed, expected, atol=0, rtol=step)
                equal = (normed == expected).float().mean()
                assert equal > (0.5 if dtype is torch.float32 else 0.99)


def step_of(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rows, block_size, positions = 6, 4, 40
    angles = torch.randn(positions, head_dim)
    return {
        "qkv": even_values(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype),
        "q_weight": torch.randn(head_dim).to(dtype),
        "k_weight": torch.randn(head_dim).to(dtype),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "positions": torch.tensor([0, 39, 7, 7, 1, 0]),
        "kv_cache": torch.full((2, 5, block_size, kv_heads, head_dim), 77.0, dtype=dtype),
        "slot_mapping": torch.tensor([19, 0, -1, 4, 6, -1]),
    }


def run(step: dict[str, Tensor], heads: int, norms: str) -> tuple[Tensor, Tensor]:
    kv_cache = step["kv_cache"].clone()
    head_dim = kv_cache.shape[4]
    query = torch.full((len(step["qkv"]), heads, head_dim), float("nan"), dtype=kv_cache.dtype)
    q_weight, k_weight = (step[f"{name}_weight"] if name in norms else None for name in "qk")
    launch_norm_rotate_store(
        step["qkv"], q_weight, k_weight, EPS, step["cos"], step["sin"], positions=step["positions"],
        kv_cache=kv_cache, slot_mapping=step["slot_mapping"], query=query,
    )  # fmt: skip
    return query, kv_cache


def rotary() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for heads, kv_heads, head_dim in ((8, 1, 64), (6, 2, 12), (4, 4, 128)):
            step = step_of(heads, kv_heads, head_dim, dtype)
            for norms in ("", "qk", "q", "k"):
                query, kv_cache = run(step, heads, norms)
                expected_cache = step["kv_cache"].clone()
                q_weight, k_weight = (step[f"{name}_weight"] if name in norms else None for name in "qk")  # fmt: skip
                expected = norm_rotate_store_reference(
                    step["qkv"], q_weight, k_weight, EPS, step["cos"], step["sin"], positions=step["positions"],
                    kv_cache=expected_cache, slot_mapping=step["slot_mapping"], num_heads=heads, num_kv_heads=kv_heads,
                )  # fmt: skip
                # Values pass as they are, and slots that are not named keep what they held.
                assert torch.equal(kv_cache[1], expected_cache[1])
                assert torch.equal(kv_cache == 77, expected_cache == 77)
                step_size = 0.0 if not norms else {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]  # fmt: skip
                for own, wanted in ((query, expected), (kv_cache, expected_cache)):
                    torch.testing.assert_close(own, wanted, atol=step_size, rtol=step_size)
                    equal = (own == wanted).float().mean()
                    assert equal > (0.5 if dtype is torch.float32 else 0.99)


RUNS: dict[str, Callable[[], None]] = {"norm": norm, "rotary": rotary}

if __name__ == "__main__":
    torch.manual_seed(0)
    repair_interpreter()
    RUNS[sys.argv[1]]()
    print("same")  # noqa: T201
