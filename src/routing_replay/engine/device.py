"""Devices by name."""

import torch

from routing_replay.errors import ConfigError

__all__ = ["usable_device"]


def usable_device(name: str) -> torch.device:
    """Return a device, once it has held an element.

    Args:
        name: A torch device.

    Returns:
        The device.

    Raises:
        ConfigError: torch does not know it, or this machine does not have it.

    Runtime: puts one element on the device.
    """
    try:
        return torch.empty(1, device=name).device
    # What torch raises depends on the device and on how torch was built.
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise ConfigError(
            f"device={name!r} cannot be used ({str(err).splitlines()[0]}); accepted are cpu, and cuda where torch sees one"
        ) from err
