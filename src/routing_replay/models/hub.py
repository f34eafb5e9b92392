"""From the name of a model to the folder that holds it."""

import re
from pathlib import Path

from routing_replay.errors import ConfigError

__all__ = ["find_model_folder"]

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_DESCRIPTION = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]


def find_model_folder(model: str | Path, *, with_weights: bool = True) -> Path:
    """Return the folder of a model, downloading it where the name is not one of a folder.

    Args:
        model: A folder, or a name on the Hugging Face hub such as `"Qwen/Qwen3-30B-A3B"`.
        with_weights: Whether weights are needed; without them, configuration and tokenizer alone are fetched.

    Returns:
        The folder; for a name on the hub, the one in its cache.

    Raises:
        ConfigError: There is no such folder, and the name is not one of the hub's, or the download failed.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if isinstance(model, Path) or not _HUB_NAME.fullmatch(model):
        raise ConfigError(
            f"model={str(model)!r} is not a folder; pass the folder of a Hugging Face model, or a hub name such as "
            "'Qwen/Qwen3-30B-A3B'"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError as err:
        raise ConfigError(
            f"model={model!r} is not a folder, and names on the hub need the package huggingface_hub: "
            "pip install huggingface_hub, or pass a folder"
        ) from err
    patterns = [*_DESCRIPTION, *_WEIGHTS] if with_weights else _DESCRIPTION
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as err:
        raise ConfigError(
            f"model={model!r} is not a folder, and could not be fetched from the hub ({err}); check the name and the "
            "network, or pass a folder"
        ) from err
