"""The models and folders that commands are given by name."""

from pathlib import Path

from routing_replay.errors import ConfigError

__all__ = ["EMBEDDED_MODEL", "check_new_folder", "model_folder"]

EMBEDDED_MODEL = "tiny-moe"
"""The name of the embedded model."""


def model_folder(name: str, *, with_weights: bool = True) -> Path:
    """Return the folder of a model.

    Args:
        name: A folder, a name on the Hugging Face hub, or that of the embedded model.
        with_weights: Whether weights are needed, and fetched for a name on the hub.

    Returns:
        The folder.

    Raises:
        ConfigError: There is no such model.
    """
    from routing_replay.assets import tiny_moe_path
    from routing_replay.models import find_model_folder

    return (
        tiny_moe_path()
        if name == EMBEDDED_MODEL
        else find_model_folder(name, with_weights=with_weights)
    )


def check_new_folder(path: Path) -> None:
    """Refuse an output folder that is in use, before any work is done.

    Args:
        path: A folder that does not exist, or is empty.

    Raises:
        ConfigError: It is a file, or holds something.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output={path} is a file; choose a folder that does not exist")
    if path.exists() and any(path.iterdir()):
        raise ConfigError(
            f"output={path} holds something already; choose a folder that does not exist, or empty it first"
        )
