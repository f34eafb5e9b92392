"""Which implementation of an op runs: one pure function, and an explicit argument that overrides it."""

from collections.abc import Sequence
from enum import StrEnum

import torch

from routing_replay.errors import ConfigError

__all__ = ["Backend", "check_flashinfer_device", "choose_backend"]

_FLASHINFER_CAPABILITIES = (10, 12)


class Backend(StrEnum):
    """An implementation of an op."""

    AUTO = "auto"
    """The fastest implementation that supports the inputs."""

    REFERENCE = "reference"
    """Plain torch; runs on every device; the definition of correct."""

    TRITON = "triton"
    """Triton, on CUDA devices from sm_80 on."""

    FLASHINFER = "flashinfer"
    """FlashInfer's TensorRT-LLM kernels, on CUDA devices of compute capability 10 and 12, with weights in its layout."""


def choose_backend(
    requested: str, device: torch.device, *, available: Sequence[Backend] = (Backend.REFERENCE,)
) -> Backend:
    """Resolve a requested backend to the one that runs.

    Args:
        requested: A `Backend` or its value.
        device: Where the op's tensors are.
        available: What the op has.

    Returns:
        A concrete backend, never `Backend.AUTO`.

    Raises:
        ConfigError: The name is unknown, the op does not have it, or it does not run on the device.

    Runtime: host only; pure.
    """
    accepted = (Backend.AUTO, *available)
    if requested not in tuple(accepted):
        names = ", ".join(repr(str(item)) for item in accepted)
        raise ConfigError(f"backend={requested!r}; accepted are {names}; leave it out for 'auto'")
    backend = Backend(requested)
    if backend is Backend.AUTO:
        on_gpu = device.type == "cuda" and Backend.TRITON in available
        return Backend.TRITON if on_gpu else Backend.REFERENCE
    if backend is Backend.TRITON and device.type not in ("cuda", "meta"):
        raise ConfigError(
            f"backend='triton' on {device}; accepted are CUDA devices: leave it out, or move the tensors"
        )
    if backend is Backend.FLASHINFER:
        check_flashinfer_device(device)
    return backend


def check_flashinfer_device(device: torch.device) -> None:
    """Refuse a device that FlashInfer's fused MoE kernels do not run on.

    Args:
        device: Where the op's tensors are.

    Raises:
        ConfigError: It is no CUDA device of compute capability 10 or 12.

    Runtime: host only; asks the driver, without a sync.
    """
    found = str(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major in _FLASHINFER_CAPABILITIES:
            return
        found = f"{device} of compute capability {major}.{minor}"
    raise ConfigError(
        f"backend='flashinfer' on {found}; accepted are CUDA devices of compute capability 10 and 12: use "
        "backend='triton' with plain weights"
    )
