"""The embedded model `tiny-moe` and its task.

`tiny_moe_path` gives the model's folder, a Hugging Face checkpoint (Qwen3-MoE, bfloat16);
`routing_replay.assets.arithmetic` makes and judges the problems that it was trained on.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["tiny_moe_path"]


def tiny_moe_path() -> Path:
    """Return the folder of the embedded model.

    Returns:
        An existing folder with `config.json`, `model.safetensors`, `tokenizer.json` and
        `tokenizer_config.json`, as Hugging Face libraries read it.

    Raises:
        FileNotFoundError: The package was installed without its assets, or from a zip archive.
    """
    folder = Path(str(files(__name__))) / "tiny_moe"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no model.safetensors; reinstall routing-replay as an unpacked wheel"
        )
    return folder
