"""A trace as torch tensors. torch is imported inside the function, never with the package."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from routing_replay.errors import IntegrationError
from routing_replay.trace._dtype import IdArray, ValidArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceTensors:
    """The rows of a trace as tensors on one device.

    Attributes:
        ids: Logical expert ids, int64 `[rows, L, K]`, contiguous.
        valid: Rows that were captured, bool `[rows]`; the ids of the others mean nothing.
    """

    ids: "torch.Tensor"
    valid: "torch.Tensor"


def to_tensors(
    ids: IdArray, valid: ValidArray, *, device: "torch.device | str | int | None"
) -> TraceTensors:
    """Copy the arrays of a trace into tensors.

    Args:
        ids: Expert ids, uint8 or uint16 `[rows, L, K]`.
        valid: Captured rows, bool `[rows]`.
        device: Where the tensors go; `None` is the CPU.

    Returns:
        New tensors that share no memory with the arrays.

    Raises:
        IntegrationError: torch is not installed.
    """
    try:
        import torch
    except ImportError as err:
        raise IntegrationError(
            "to_torch needs torch, which is not installed; install routing-replay[replay], or use"
            " the numpy arrays of the trace"
        ) from err

    target = torch.device("cpu") if device is None else torch.device(device)
    return TraceTensors(
        ids=torch.from_numpy(ids.astype(np.int64)).to(target),
        valid=torch.from_numpy(valid.copy()).to(target),
    )
