"""Devices by name."""

import torch

from routing_replay.errors import ConfigError

__all__ = ["auto_device", "usable_device"]


def auto_device() -> str:
    """Return what `"auto"` stands for: cuda where torch sees a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name: str) -> torch.device:
    """Return a device, once it has held an element.

    Args:
        name: A torch device, or `"auto"`, see `auto_device`.

    Returns:
        The device, with its index where it has one.

    Raises:
        ConfigError: torch does not know it, or this machine does not have it.

    Runtime: puts one element on the device.
    """
    if name == "auto":
        name = auto_device()
    try:
        return torch.empty(1, device=name).device
    # What torch raises depends on the device and on how torch was built.
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise ConfigError(
            f"device={name!r} cannot be used ({str(err).splitlines()[0]}); accepted are auto, cpu, and cuda where torch sees one"
        ) from err
