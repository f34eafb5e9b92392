"""Loading a Hugging Face folder into a decoder: every tensor exactly once, none missing, none left over."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from routing_replay.errors import ConfigError, UnsupportedModelError
from routing_replay.models.config import load_model_config
from routing_replay.models.qwen3_moe import Qwen3MoEModel

__all__ = ["load_model"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        weight_map: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    raise ConfigError(
        f"{folder} holds neither {_SINGLE} nor {_INDEX}; pass a folder written by save_pretrained, with safetensors"
    )


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict: safetensors' own handle
                    yield name, tensors.get_tensor(name)
        except (OSError, SafetensorError) as err:
            raise ConfigError(f"{path} cannot be read ({err}); copy the checkpoint again") from err


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown


def _fill(model: Qwen3MoEModel, folder: Path) -> None:
    waiting = dict(model.checkpoint_names())
    extra: set[str] = set()
    for name, stored in _stored_tensors(folder):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        target = waiting.pop(name, None)
        if target is None:
            extra.add(name)
        elif target.shape != stored.shape:
            raise UnsupportedModelError(
                f"{name} has shape {tuple(stored.shape)}, config.json asks for {tuple(target.shape)}; "
                "the weights and the config belong to different models"
            )
        else:
            target.copy_(stored)
    if waiting or extra:
        raise UnsupportedModelError(
            f"{folder} lacks {len(waiting)} tensors ({_some(set(waiting))}) and has {len(extra)} unknown ones "
            f"({_some(extra)}); the weights and config.json belong to different models, or the copy is incomplete"
        )


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Qwen3MoEModel:
    """Build the decoder of a Hugging Face Qwen3-MoE folder and load its weights.

    Args:
        folder: A folder with `config.json` and safetensors, in one file or sharded.
        dtype: torch.bfloat16 or torch.float32; stored weights are converted.
        device: Where the model runs.

    Returns:
        The decoder, in evaluation mode, without gradients.

    Raises:
        ConfigError: The folder or its weights cannot be read.
        UnsupportedModelError: Another family, or weights that do not fit the config.

    Runtime: reads one tensor at a time; synchronous; no gradients.
    """
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"{folder} holds no config.json; pass the folder of a Hugging Face Qwen3-MoE model"
        )
    config = load_model_config(folder)
    with torch.device("meta"):
        model = Qwen3MoEModel(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    with torch.no_grad():
        _fill(model, folder)
    return model.eval().requires_grad_(False)
