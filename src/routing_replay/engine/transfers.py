"""Small arrays between host and device, without making the host wait."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["HostCopy", "to_device"]


def to_device(
    values: Sequence[int] | Sequence[float] | Sequence[bool],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Bring host numbers to a device.

    Args:
        values: One-dimensional.
        dtype: Of the tensor.
        device: Where it goes.

    Returns:
        A new tensor `[len(values)]`.

    Runtime: no host sync; allocates on both sides; not CUDA-graph safe.
    """
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    # From pageable memory the copy would wait for the stream.
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of device tensors that is on its way to the host.

    Args:
        tensors: What to copy, as the current stream leaves it.

    Runtime: one asynchronous copy each on the current stream, into pinned memory; no host sync; nothing is copied of
        tensors that are on a CPU.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = [self._copy(tensor) for tensor in tensors]
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self._event = torch.cuda.Event()
            self._event.record()

    @staticmethod
    def _copy(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def wait(self) -> list[Tensor]:
        """Return the tensors on the host, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
