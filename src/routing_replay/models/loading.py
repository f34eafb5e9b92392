"""Loading weights into a decoder: every tensor of a folder exactly once, some by name, or random ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from routing_replay.errors import ConfigError, UnsupportedModelError
from routing_replay.models.config import MoEModelConfig, load_model_config
from routing_replay.models.lm_head import lm_head_dtype
from routing_replay.models.mtp import shared_names
from routing_replay.models.qwen3_moe import Qwen3MoEModel
from routing_replay.models.weight_files import StoredTensor, list_tensors, read_tensors

__all__ = [
    "LoadFormat",
    "WeightPlaces",
    "check_folder_weights",
    "check_weight",
    "copy_weights",
    "load_folder_weights",
    "load_model",
    "place_weight",
    "weight_places",
]

_DUMMY_STD = 0.02


class LoadFormat(StrEnum):
    """Where a model's weights come from (names as in vLLM)."""

    AUTO = "auto"
    """The folder's safetensors."""

    DUMMY = "dummy"
    """Random ones, for measurements at real sizes: the folder needs no weights."""


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown


def check_weight(name: str, place: Tensor, shape: tuple[int, ...]) -> None:
    """Check a new weight's shape.

    Args:
        name: Its name.
        place: Where it goes.
        shape: Its shape.

    Raises:
        UnsupportedModelError: The place has another shape.
    """
    if tuple(place.shape) != shape:
        raise UnsupportedModelError(
            f"{name} has shape {shape}, config.json asks for {tuple(place.shape)}; "
            "the weights and the config belong to different models"
        )


@dataclass(frozen=True, slots=True)
class WeightPlaces:
    """Where the weights of a decoder lie.

    Attributes:
        places: By all names that a trainer may know them by. Copies of shared weights have no place of their own.
    """

    places: dict[str, list[Tensor]]

    def find(self, name: str) -> Sequence[Tensor]:
        """Return the places of a weight.

        Args:
            name: Its name.

        Returns:
            No place for a copy of a shared weight, else one or more.

        Raises:
            UnsupportedModelError: The name is unknown.
        """
        if name not in self.places:
            raise UnsupportedModelError(
                f"weight {name!r} is not one of the model's {len(self.places)}; names are those of a checkpoint, such as "
                f"{next(iter(self.places))!r}"
            )
        return self.places[name]


def weight_places(model: Qwen3MoEModel) -> WeightPlaces:
    """Return where a decoder's weights lie, by the names of checkpoints and of Transformers models.

    Args:
        model: The decoder.

    Returns:
        Views of its parameters.

    Raises:
        ConfigError: Its weights are offloaded.
    """
    if model.is_offloaded:
        raise ConfigError("the model's weights are offloaded; call restore_weights first")
    places = {**model.checkpoint_places(), **model.fused_places()}
    copies = list(shared_names(model.config)) if model.mtp_layers else []
    if model.config.tie_word_embeddings:
        copies.append("lm_head.weight")
    return WeightPlaces({**places, **{name: [] for name in copies}})


def place_weight(place: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """Copy new values into a weight.

    Args:
        place: Where they go.
        values: The values, on any device.
        dtype: The model's, to which they are rounded first: a place in float32 may hold bfloat16 values.

    Runtime: one copy on the device of `place`; no gradients where the caller records none.
    """
    place.copy_(values.to(dtype))


def _check_copies(
    model: Qwen3MoEModel, stored: dict[str, StoredTensor], places: dict[str, list[Tensor]]
) -> None:
    """Copies of shared weights in a checkpoint must equal them: they are not kept."""
    for name, original in shared_names(model.config).items():
        if name not in stored:
            continue
        with safe_open(stored[name].path, framework="pt") as tensors:
            values = tensors.get_tensor(name)
        place = places[original][-1]
        if not torch.equal(place, values.to(place.device).to(model.dtype).to(place.dtype)):
            raise UnsupportedModelError(
                f"{name} differs from {original}; supported are drafting layers that share the model's embedding and "
                "output projection"
            )


def _is_draft(name: str, config: MoEModelConfig) -> bool:
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 3 or not parts[2].isdecimal():
        return False
    return config.num_layers <= int(parts[2]) < config.num_layers + config.num_mtp_layers


def _match(
    model: Qwen3MoEModel, folder: Path
) -> tuple[list[tuple[StoredTensor, list[Tensor]]], dict[str, StoredTensor]]:
    """Check names and shapes of the whole folder; return what is to be read, with its places, and copies of it."""
    if model.is_offloaded:
        raise ConfigError("the model's weights are offloaded; call restore_weights first")
    config = model.config
    places = model.checkpoint_places()
    stored = list_tensors(folder)
    left_out = set(shared_names(config)) | (
        {"lm_head.weight"} if config.tie_word_embeddings else set[str]()
    )
    if not model.mtp_layers:
        left_out |= {name for name in stored if _is_draft(name, config)}
    copies = {name: stored.pop(name) for name in left_out if name in stored}
    missing, extra = places.keys() - stored.keys(), stored.keys() - places.keys()
    if missing or extra:
        raise UnsupportedModelError(
            f"{folder} lacks {len(missing)} tensors ({_some(missing)}) and has {len(extra)} unknown ones "
            f"({_some(extra)}); the weights and config.json belong to different models, or the copy is incomplete"
        )
    for name, found in places.items():
        for place in found:
            check_weight(name, place, stored[name].shape)
    return [(stored[name], found) for name, found in places.items()], copies


def _fill(model: Qwen3MoEModel, folder: Path) -> None:
    wanted, copies = _match(model, folder)
    read_tensors(wanted, dtype=model.dtype)
    if model.mtp_layers:
        _check_copies(model, copies, model.checkpoint_places())


@torch.no_grad()
def _fill_randomly(model: Qwen3MoEModel, seed: int) -> None:
    """Weights of a fresh model, on its device: activations and router scores of a plausible size, norms of 1."""
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        parameter.normal_(0.0, _DUMMY_STD, generator=generator)
        if parameter.dtype != model.dtype:
            parameter.copy_(parameter.to(model.dtype))


def check_folder_weights(model: Qwen3MoEModel, folder: Path) -> None:
    """Check that the weights of a folder can replace those of a decoder; only headers are read.

    Args:
        model: The decoder.
        folder: A checkpoint of the same model, with `config.json`.

    Raises:
        ConfigError: The folder or a header cannot be read, or the decoder's weights are offloaded.
        UnsupportedModelError: Its config or its weights are not of this model.
    """
    found = _folder_config(folder)
    # Which tokens end a sequence is no matter of weights.
    names = [field.name for field in fields(MoEModelConfig) if field.name != "eos_token_ids"]
    for name in names:
        expected, other = getattr(model.config, name), getattr(found, name)
        if expected != other:
            raise UnsupportedModelError(
                f"{folder} has {name}={other}, the model {expected}; pass a checkpoint of the same model"
            )
    _match(model, folder)


def load_folder_weights(model: Qwen3MoEModel, folder: Path) -> None:
    """Replace all weights of a decoder by those of a folder.

    Args:
        model: The decoder.
        folder: A checkpoint of the same model, with `config.json`.

    Raises:
        ConfigError: The folder or its weights cannot be read; some weights may have been replaced.
        UnsupportedModelError: Its config or its weights are not of this model; nothing has been replaced.

    Runtime: writes in place, so that addresses stay; returns when everything is in place; no gradients.
    """
    check_folder_weights(model, folder)
    _fill(model, folder)


@torch.no_grad()
def copy_weights(model: Qwen3MoEModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replace some of a decoder's weights.

    Args:
        model: The decoder.
        tensors: Names and new values: those of a checkpoint, or those of a Transformers model's `state_dict`, where
            the experts of a layer are one tensor. Copies of shared weights (a tied output projection, the embedding
            beside layers that draft) are passed over: the weight itself is what counts.

    Raises:
        ConfigError: The weights are offloaded.
        UnsupportedModelError: A name is unknown or a shape differs; tensors before it have been copied.

    Runtime: copies in place, so that addresses stay; synchronous on the CPU; no gradients.
    """
    places = weight_places(model)
    for name, tensor in tensors:
        for place in places.find(name):
            check_weight(name, place, tuple(tensor.shape))
            place_weight(place, tensor.detach(), model.dtype)


def _gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which dtype GEMM weights are kept: float32 on a CPU where torch has no fast bfloat16 GEMM."""
    is_slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return torch.float32 if is_slow else dtype


def _folder_config(folder: Path) -> MoEModelConfig:
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"{folder} holds no config.json; pass the folder of a Hugging Face Qwen3-MoE model"
        )
    return load_model_config(folder)


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_invariant: bool = False,
    load_format: str = LoadFormat.AUTO,
    seed: int = 0,
    max_position: int | None = None,
    with_mtp: bool = False,
) -> Qwen3MoEModel:
    """Build the decoder of a Hugging Face Qwen3-MoE folder and load its weights.

    Args:
        folder: A folder with `config.json` and safetensors, in one file or sharded.
        dtype: torch.bfloat16 or torch.float32; stored weights are rounded to it. On a CPU where torch has no fast
            bfloat16 GEMM, the rounded weights of GEMMs are kept in float32.
        device: Where the model runs.
        batch_invariant: Make the bits of a row independent of the rows beside it.
        load_format: A `LoadFormat`. Dummy weights are normal with standard deviation 0.02, norms are 1.
        seed: Of dummy weights; a device gives the same ones for the same seed.
        max_position: Positions that the model is run on, `[0, max_position)`; None for all that its config allows.
        with_mtp: Load the layers that draft tokens, too; without it those of the folder are left out.

    Returns:
        The decoder, in evaluation mode, without gradients.

    Raises:
        ConfigError: The folder or its weights cannot be read, `load_format` is unknown, or `with_mtp` is asked of a
            model without such layers.
        UnsupportedModelError: Another family, or weights that do not fit the config.

    Runtime: weights go straight to the device, see `weight_files.read_tensors`; returns when they are there; no gradients.
    """
    if load_format not in tuple(LoadFormat):
        accepted = ", ".join(repr(str(name)) for name in LoadFormat)
        raise ConfigError(f"load_format={load_format!r}; accepted are {accepted}")
    config = _folder_config(folder)
    if with_mtp and not config.num_mtp_layers:
        raise ConfigError(
            f"with_mtp=True, but config.json of {folder} has no num_nextn_predict_layers; draft by other means"
        )
    with torch.device("meta"):
        model = Qwen3MoEModel(config, batch_invariant=batch_invariant, with_mtp=with_mtp)
    model = model.cast(
        dtype,
        gemm_dtype=_gemm_dtype(dtype, device),
        head_dtype=lm_head_dtype(dtype, device),
    ).to_empty(device=device)
    model.requires_grad_(False).tie()
    model.prepare(max_position=max_position or config.max_position_embeddings)
    if load_format == LoadFormat.DUMMY:
        _fill_randomly(model, seed)
    else:
        _fill(model, folder)
    return model.eval()
