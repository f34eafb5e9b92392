"""Converters between the orders in which checkpoints and engines keep the rows of GEMM 1."""

import torch
from torch import Tensor

from routing_replay.errors import ConfigError

__all__ = ["gate_first"]


def gate_first(up_first: Tensor) -> Tensor:
    """Reorder rows `[up; gate]`, FlashInfer's and CUTLASS's order ("w3_w1"), to `[gate; up]`, Hugging Face's and ours.

    The same call converts `[gate; up]` to `[up; gate]`. Convert once, where weights are loaded.

    Args:
        up_first: GEMM-1 weights `[E_local, 2I, H]` or their bias `[E_local, 2I]`, any dtype.

    Returns:
        A contiguous copy with the halves of the second axis exchanged.

    Raises:
        ConfigError: It has another rank, or an odd number of rows.

    Runtime: no host sync; allocates the result; CUDA-graph safe; bitwise deterministic; differentiable.
    """
    if up_first.ndim not in (2, 3) or up_first.shape[1] % 2:
        raise ConfigError(
            f"up_first has shape {tuple(up_first.shape)}; accepted are [num_experts, 2 * intermediate_size, hidden_size] and "
            "[num_experts, 2 * intermediate_size]"
        )
    up, gate = up_first.chunk(2, dim=1)
    return torch.cat((gate, up), dim=1)
