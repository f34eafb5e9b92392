"""Build every mixture-of-experts model that Transformers knows, without memory, and note where its routers are.

python tests/unit/trace/write_model_layouts.py    # writes model_layouts.json beside this file; takes some minutes
"""

import json
import logging
import re
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

_KEPT = re.compile(
    r"expert|moe|dense|sparse|mlp_layer|mlp_only|block_type|num_hidden_layers|n_layers|^num_layers|topk|model_type"
)
_LAYER = re.compile(r"layers\.(\d+)\.")


def _build(config: transformers.PretrainedConfig) -> nn.Module | None:
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
        try:
            with torch.device("meta"):
                return kind.from_config(config)
        except (
            Exception
        ) as err:  # some classes do not know the config, some defaults cannot be built
            logging.info("%s: %s", config.model_type, err)
    return None


def _router_classes(model: nn.Module) -> tuple[type, ...]:
    found: set[type] = set()
    for module in model.modules():
        declared = getattr(module, "_can_record_outputs", None)
        specs = declared.get("router_logits") if isinstance(declared, dict) else None
        for spec in specs if isinstance(specs, list) else [specs]:
            target = getattr(spec, "target_class", spec)
            if isinstance(target, type):
                found.add(target)
    return tuple(found)


def _kept(values: dict[str, object]) -> dict[str, object]:
    """What speaks of layers and experts, at every depth."""
    kept: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("config"):
            kept[name] = _kept(value)
        elif _KEPT.search(name) and isinstance(value, int | str | list | None):
            kept[name] = value
    return kept


def main() -> None:
    layouts: dict[str, object] = {}
    for model_type in sorted(CONFIG_MAPPING):
        config_class = CONFIG_MAPPING[model_type]
        try:
            config = config_class()
        except Exception:
            continue
        values = config.to_dict()
        if "expert" not in json.dumps(_kept(values)):
            continue
        model = _build(config)
        classes = () if model is None else _router_classes(model)
        if model is None or not classes:
            continue
        routers = {
            int(_LAYER.findall(path)[-1]): getattr(module, "num_experts", None)
            for path, module in model.named_modules()
            if isinstance(module, classes) and _LAYER.findall(path)
        }
        if routers:
            layouts[model_type] = {
                "config": _kept(values),
                "router_layers": sorted(routers),
                "num_experts": next(iter(routers.values())),
            }
    result = {"transformers": transformers.__version__, "models": layouts}
    Path(__file__).with_name("model_layouts.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
