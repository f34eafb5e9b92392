"""From the names of a checkpoint's tensors to the places of a decoder that they are loaded into."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from routing_replay.models.config import MoEModelConfig

__all__ = ["checkpoint_places", "fused_places"]

_DRAFT = "mtp_layers."
_EXPERTS = ("gate_up_proj", "down_proj")


def _checkpoint_name(config: MoEModelConfig, name: str) -> str:
    """A parameter's name in a checkpoint, where layers that draft follow the model's own."""
    if name == "lm_head.weight":
        return name
    if name.startswith(_DRAFT):
        index, _, rest = name.removeprefix(_DRAFT).partition(".")
        return f"model.layers.{config.num_layers + int(index)}.{rest.removeprefix('block.')}"
    return f"model.{name}"


def _experts(
    config: MoEModelConfig, stem: str, leaf: str, weights: Tensor
) -> Iterator[tuple[str, Tensor]]:
    size = config.moe_intermediate_size
    for expert_idx, weight in enumerate(weights):
        if leaf == "down_proj":
            yield f"{stem}.experts.{expert_idx}.down_proj.weight", weight
        else:
            yield f"{stem}.experts.{expert_idx}.gate_proj.weight", weight[:size]
            yield f"{stem}.experts.{expert_idx}.up_proj.weight", weight[size:]


def _qkv(
    config: MoEModelConfig, stem: str, leaf: str, tensor: Tensor
) -> Iterator[tuple[str, Tensor]]:
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    parts = tensor.split([count * config.head_dim for count in heads])
    for kind, part in zip("qkv", parts, strict=True):
        yield f"{stem}.{kind}_proj.{leaf}", part


def checkpoint_places(
    config: MoEModelConfig, parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, list[Tensor]]:
    """Return, for every tensor of a Hugging Face checkpoint, the places that it is loaded into.

    Args:
        config: The model's.
        parameters: Its parameters by their name in the model.

    Returns:
        Contiguous views of parameters by the checkpoint's name. A tied embedding has two places where the output
        projection has a weight of its own.
    """
    places: dict[str, list[Tensor]] = {}
    head: list[Tensor] = []
    for name, parameter in parameters:
        stem, _, leaf = _checkpoint_name(config, name).rpartition(".")
        if leaf in _EXPERTS:
            found = _experts(config, stem, leaf, parameter)
        elif stem.endswith(".qkv_proj"):
            found = _qkv(config, stem.removesuffix(".qkv_proj"), leaf, parameter)
        elif stem == "lm_head" and config.tie_word_embeddings:
            head.append(parameter)
            continue
        else:
            found = [(f"{stem}.{leaf}", parameter)]
        places.update({key: [place] for key, place in found})
    places["model.embed_tokens.weight"] += head
    return places


def fused_places(
    config: MoEModelConfig, parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, list[Tensor]]:
    """Return the places of expert weights under the names of Transformers 5, one tensor for a layer's experts.

    Args:
        config: The model's.
        parameters: Its parameters by their name in the model.

    Returns:
        Parameters by name.
    """
    places: dict[str, list[Tensor]] = {}
    for name, parameter in parameters:
        stem, _, leaf = _checkpoint_name(config, name).rpartition(".")
        if leaf in _EXPERTS:
            places[f"{stem}.experts.{leaf}"] = [parameter]
    return places
