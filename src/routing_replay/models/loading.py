"""Loading a Hugging Face folder into a decoder: every tensor exactly once, none missing, none left over."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from routing_replay.errors import ConfigError, UnsupportedModelError
from routing_replay.models.config import load_model_config
from routing_replay.models.lm_head import lm_head_dtype
from routing_replay.models.qwen3_moe import Qwen3MoEModel

__all__ = ["copy_weights", "load_model"]

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


def _copy(name: str, target: Tensor, stored: Tensor, dtype: torch.dtype) -> None:
    """Round to the model's dtype first: a place in float32 may hold bfloat16 values."""
    if target.shape != stored.shape:
        raise UnsupportedModelError(
            f"{name} has shape {tuple(stored.shape)}, config.json asks for {tuple(target.shape)}; "
            "the weights and the config belong to different models"
        )
    target.copy_(stored.to(dtype))


def _fill(model: Qwen3MoEModel, folder: Path) -> None:
    waiting = model.checkpoint_places()
    extra: set[str] = set()
    for name, stored in _stored_tensors(folder):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        places = waiting.pop(name, None)
        if places is None:
            extra.add(name)
            continue
        for place in places:
            _copy(name, place, stored, model.dtype)
    if waiting or extra:
        raise UnsupportedModelError(
            f"{folder} lacks {len(waiting)} tensors ({_some(set(waiting))}) and has {len(extra)} unknown ones "
            f"({_some(extra)}); the weights and config.json belong to different models, or the copy is incomplete"
        )


@torch.no_grad()
def copy_weights(model: Qwen3MoEModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replace some of a decoder's weights.

    Args:
        model: The decoder.
        tensors: Names and new values: those of a checkpoint, or those of a Transformers model's `state_dict`, where
            the experts of a layer are one tensor.

    Raises:
        UnsupportedModelError: A name is unknown or a shape differs; tensors before it have been copied.

    Runtime: copies in place, so that addresses stay; synchronous on the CPU; no gradients.
    """
    places = {**model.checkpoint_places(), **model.fused_places()}
    for name, tensor in tensors:
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name not in places:
            raise UnsupportedModelError(
                f"weight {name!r} is not one of the model's {len(places)}; names are those of a checkpoint, such as "
                f"{next(iter(places))!r}"
            )
        for place in places[name]:
            _copy(name, place, tensor.detach(), model.dtype)


def _gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which dtype GEMM weights are kept: float32 on a CPU where torch has no fast bfloat16 GEMM."""
    is_slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return torch.float32 if is_slow else dtype


def load_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device, batch_invariant: bool = False
) -> Qwen3MoEModel:
    """Build the decoder of a Hugging Face Qwen3-MoE folder and load its weights.

    Args:
        folder: A folder with `config.json` and safetensors, in one file or sharded.
        dtype: torch.bfloat16 or torch.float32; stored weights are rounded to it. On a CPU where torch has no fast
            bfloat16 GEMM, the rounded weights of GEMMs are kept in float32.
        device: Where the model runs.
        batch_invariant: Make the bits of a row independent of the rows beside it.

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
        model = Qwen3MoEModel(config, batch_invariant=batch_invariant)
    model = model.cast(
        dtype,
        gemm_dtype=_gemm_dtype(dtype, device),
        head_dtype=lm_head_dtype(dtype, device),
    ).to_empty(device=device)
    model.tie()
    model.prepare(max_position=config.max_position_embeddings)
    with torch.no_grad():
        _fill(model, folder)
    return model.eval().requires_grad_(False)
