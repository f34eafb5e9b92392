"""Which implementation of a fused-MoE op runs: one pure function, and an explicit argument that overrides it."""

from enum import StrEnum

from routing_replay.errors import ConfigError

__all__ = ["Backend", "choose_backend"]


class Backend(StrEnum):
    """An implementation of the fused-MoE ops."""

    AUTO = "auto"
    """The fastest implementation that supports the inputs."""

    REFERENCE = "reference"
    """Plain torch; runs on every device; the definition of correct."""


def choose_backend(requested: str) -> Backend:
    """Resolve a requested backend to the one that runs.

    Args:
        requested: A `Backend` or its value.

    Returns:
        A concrete backend, never `Backend.AUTO`.

    Raises:
        ConfigError: The name is unknown.

    Runtime: host only; pure.
    """
    try:
        backend = Backend(requested)
    except ValueError as err:
        accepted = ", ".join(repr(str(item)) for item in Backend)
        raise ConfigError(
            f"backend={requested!r} is unknown; accepted are {accepted}; leave it out for 'auto'"
        ) from err
    return Backend.REFERENCE if backend is Backend.AUTO else backend
