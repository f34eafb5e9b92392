"""What of a model a trace must agree with, and how to read it from a Hugging Face `config.json`."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from routing_replay.errors import ConfigError, UnsupportedModelError
from routing_replay.trace._checks import check_layout
from routing_replay.trace._config_layers import moe_layer_ids

__all__ = ["ModelRouting"]

# Each model writes one name; where it writes two (an alias), they must agree.
_NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
)
_NUM_LAYERS = ("num_hidden_layers", "n_layers", "num_layers")
# Where multimodal models keep the language model.
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRouting:
    """What a trace must agree with to belong to a model.

    Attributes:
        layer_ids: Decoder layers (0-based) that have a router, increasing, L of them.
        num_layers: Decoder layers of the model, dense ones included.
        num_experts: Routed experts over all ranks, E.
        top_k: Experts per token, K.

    Raises:
        TraceFormatError: A value has the wrong type or lies outside its range.
    """

    layer_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        check_layout(
            layer_ids=self.layer_ids,
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            start=0,
        )

    @property
    def num_moe_layers(self) -> int:
        """Layers with a router, L."""
        return len(self.layer_ids)

    @property
    def dense_layer_ids(self) -> tuple[int, ...]:
        """Decoder layers without a router."""
        sparse = set(self.layer_ids)
        return tuple(layer_idx for layer_idx in range(self.num_layers) if layer_idx not in sparse)

    @classmethod
    def from_config(cls, config: Mapping[str, object] | str | os.PathLike[str]) -> Self:
        """Read a Hugging Face configuration.

        Checked against the routers of every mixture-of-experts model that Transformers 5.23 can build; a layout that
        the configuration does not say is refused, not guessed.

        Args:
            config: The content of a `config.json`, its path, or the path of the folder that holds it.

        Returns:
            Which layers route, among how many experts, to how many.

        Raises:
            ConfigError: There is no such file, or it is no JSON object.
            UnsupportedModelError: The model has no experts, experts that routing ids cannot name (zero experts,
                layers that route by token id), or says in no known way which layers route.
        """
        values = dict(config) if isinstance(config, Mapping) else _load(Path(config))
        values = _language_model(values)
        model_type = str(values.get("model_type", "unknown"))
        num_experts = _one_of(values, _NUM_EXPERTS, model_type)
        top_k = _one_of(values, _TOP_K, model_type)
        if values.get("zero_expert_num"):
            raise UnsupportedModelError(
                f"model_type={model_type!r} has zero_expert_num={values['zero_expert_num']}: engines return no ids of zero "
                "experts, so that its routing cannot be told from their arrays"
            )
        num_layers = _num_layers(values, model_type)
        return cls(
            layer_ids=moe_layer_ids(values, num_layers=num_layers, model_type=model_type),
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
        )


def _load(path: Path) -> dict[str, object]:
    file = path / "config.json" if path.is_dir() else path
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"config={file} cannot be read ({err}); pass a config.json") from err
    except ValueError as err:
        raise ConfigError(f"config={file} is not JSON ({err}); pass a config.json") from err
    if not isinstance(loaded, dict):
        raise ConfigError(f"config={file} holds no JSON object; pass a config.json")
    return loaded


def _language_model(values: dict[str, object]) -> dict[str, object]:
    """The part that describes the decoder; parts of it that lie deeper are added to it."""
    for name in _TEXT:
        part = values.get(name)
        if isinstance(part, dict):
            inner = _language_model(part)
            if name == "ffn_config":  # a part of the decoder, beside what describes the rest
                return {**values, **{k: v for k, v in inner.items() if k != "model_type"}}
            return {"model_type": values.get("model_type"), **inner}
    return values


def _one_of(values: Mapping[str, object], names: tuple[str, ...], model_type: str) -> int:
    found = {name: values[name] for name in names if values.get(name) is not None}
    # A list of one value for each layer says the same as the value.
    numbers = {
        item for value in found.values() for item in (value if isinstance(value, list) else [value])
    }
    if len(numbers) == 1:
        number = numbers.pop()
        if type(number) is int and number > 0:
            return number
    said = ", ".join(f"{name}={value!r}" for name, value in found.items()) or "none of them"
    raise UnsupportedModelError(
        f"the config of model_type={model_type!r} should hold one of {', '.join(names)} as a positive number and has "
        f"{said}; if it is a mixture-of-experts model, build ModelRouting yourself"
    )


def _num_layers(values: Mapping[str, object], model_type: str) -> int:
    for name in ("layers_block_type", "hybrid_override_pattern"):
        blocks = values.get(name)
        if isinstance(blocks, list | str) and not any(key in values for key in _NUM_LAYERS):
            return len(blocks)
    return _one_of(values, _NUM_LAYERS, model_type)
