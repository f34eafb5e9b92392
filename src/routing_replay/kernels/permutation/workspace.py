"""Device memory that `route_and_plan` keeps between calls."""

import torch
from torch import Tensor

from routing_replay.errors import ConfigError

__all__ = ["MAX_FUSED_TOKENS", "check_workspace", "route_and_plan_workspace"]

MAX_FUSED_TOKENS = 256
"""Most tokens that one launch routes and plans."""

MASK_WORDS = MAX_FUSED_TOKENS // 32
HEADER_WORDS = 32


def workspace_bins(num_local_experts: int) -> int:
    return max(32, 1 << (num_local_experts - 1).bit_length())


def table_words(bins: int) -> int:
    return bins * (MASK_WORDS + 1) + HEADER_WORDS


def _words(num_local_experts: int) -> int:
    return HEADER_WORDS + 2 * table_words(workspace_bins(num_local_experts))


def route_and_plan_workspace(num_local_experts: int, *, device: torch.device | str) -> Tensor:
    """Allocate what `route_and_plan` needs to work in one launch.

    All layers of a model can share one, as long as their calls follow each other on one stream: calls that may run at the same
    time need one each. A call leaves it ready for the next; one that was aborted does not: then make another.

    Args:
        num_local_experts: Experts on this rank, shared ones included.
        device: A CUDA device.

    Returns:
        int32 zeros, about 72 bytes for each expert.

    Raises:
        ConfigError: There is no expert.

    Runtime: one allocation and its filling with zeros; call it once, outside of CUDA graphs.
    """
    if num_local_experts < 1:
        raise ConfigError(
            f"num_local_experts={num_local_experts}; accepted is 1 or more, the experts on this rank"
        )
    return torch.zeros(_words(num_local_experts), dtype=torch.int32, device=device)


def check_workspace(workspace: Tensor | None, num_local_experts: int, device: torch.device) -> None:
    """Check a workspace.

    Args:
        workspace: Of `route_and_plan_workspace`, or None.
        num_local_experts: Experts on this rank.
        device: Where it must be.

    Raises:
        ConfigError: It was not made for so many experts, or not for the device.

    Runtime: host only; no sync.
    """
    if workspace is None:
        return
    size = _words(num_local_experts)
    if workspace.dtype is not torch.int32 or workspace.shape != (size,) or not workspace.is_contiguous():  # fmt: skip
        raise ConfigError(
            f"workspace is {workspace.dtype} of shape {tuple(workspace.shape)}, expected int32 [{size}] for "
            f"num_local_experts={num_local_experts}; make it with route_and_plan_workspace({num_local_experts}, device=...)"
        )
    if workspace.device != device:
        raise ConfigError(f"workspace is on {workspace.device}, expected {device}; use one device")
