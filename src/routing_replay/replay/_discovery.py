"""Where the routers of a model are, keyed by decoder layer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from routing_replay.errors import UnsupportedModelError
from routing_replay.trace import ModelRouting

_LAYER_IN_PATH = re.compile(r"(?:^|\.)layers\.(\d+)(?=\.)")

# Families whose router has been tested to pick its experts in one 2-D top-k call, with the names of
# the router classes for models that do not declare what their `router_logits` are recorded from.
_ROUTER_CLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qwen3_moe": ("Qwen3MoeTopKRouter",)}
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoundRouter:
    """One router of a model.

    Attributes:
        layer_idx: Decoder layer, 0-based.
        path: Module path of the router.
        router: The module whose forward picks the experts.
        layer: The decoder layer that holds it, checkpoint wrappers included.
    """

    layer_idx: int
    path: str
    router: nn.Module
    layer: nn.Module


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoundRouters:
    """All routers of a model, by increasing layer, and what they have in common."""

    routers: tuple[FoundRouter, ...]
    routing: ModelRouting


def find_routers(model: nn.Module) -> FoundRouters:
    """Find the routers of a Hugging Face model, wrapped or not.

    Args:
        model: The model; a wrapper (PEFT, data parallel, FSDP) around one works too.

    Returns:
        The routers and the routing shape that traces must have.

    Raises:
        UnsupportedModelError: Another family, no routers, two in one layer, a router without
            `top_k` and `num_experts`, or routers that differ in them.
    """
    model_type, num_layers = _family(model)
    if model_type not in _ROUTER_CLASSES:
        raise UnsupportedModelError(
            f"model_type = {model_type!r} is not supported; supported: {', '.join(_ROUTER_CLASSES)}"
        )
    classes = _declared_classes(model)
    names = _ROUTER_CLASSES[model_type]
    by_layer: dict[int, FoundRouter] = {}
    for path, module in model.named_modules():
        if not _is_router(module, classes, names):
            continue
        found = _locate(model, path, module)
        earlier = by_layer.get(found.layer_idx)
        if earlier is not None:
            raise UnsupportedModelError(
                f"decoder layer {found.layer_idx} has two routers, {earlier.path} and {path}; replay"
                f" needs exactly one per layer"
            )
        by_layer[found.layer_idx] = found
    if not by_layer:
        expected = ", ".join(cls.__name__ for cls in classes) or ", ".join(names)
        raise UnsupportedModelError(
            f"the {model_type} model has no router ({expected}) in any of its {num_layers} decoder"
            f" layers; attach to a model with mixture-of-experts layers"
        )
    routers = tuple(by_layer[layer_idx] for layer_idx in sorted(by_layer))
    return FoundRouters(routers=routers, routing=_routing(routers, num_layers))


def layer_in_path(path: str) -> tuple[int, str] | None:
    """Parse the decoder layer out of a module path.

    Returns:
        The 0-based layer and the path of its module, or `None` where the path lies inside no layer
        or inside nested ones.
    """
    matches = list(_LAYER_IN_PATH.finditer(path))
    if len(matches) != 1:
        return None
    return int(matches[0].group(1)), path[: matches[0].end()]


def _family(model: nn.Module) -> tuple[str, int]:
    """Return `model_type` and the number of decoder layers from the outermost configuration."""
    for module in model.modules():
        config: object = getattr(module, "config", None)
        model_type: object = getattr(config, "model_type", None)
        num_layers: object = getattr(config, "num_hidden_layers", None)
        if isinstance(model_type, str) and isinstance(num_layers, int):
            return model_type, num_layers
    raise UnsupportedModelError(
        f"{type(model).__name__} has no Hugging Face config (model_type, num_hidden_layers);"
        f" supported: Transformers models of type {', '.join(_ROUTER_CLASSES)}"
    )


def _declared_classes(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """Return the classes that the model itself records `router_logits` from."""
    found: dict[type[nn.Module], None] = {}
    for module in model.modules():
        declared: object = getattr(module, "_can_record_outputs", None)
        specs: object = declared.get("router_logits") if isinstance(declared, dict) else None
        for spec in specs if isinstance(specs, list) else [specs]:
            target: object = getattr(spec, "target_class", spec)
            if isinstance(target, type) and issubclass(target, nn.Module):
                found[target] = None
    return tuple(found)


def _is_router(
    module: nn.Module, classes: tuple[type[nn.Module], ...], names: tuple[str, ...]
) -> bool:
    """Tell routers by declared class, or by name where the model declares none."""
    if classes:
        return isinstance(module, classes)
    # Wrappers such as FSDP2 subclass a module's class in place, so its own name may differ.
    return any(cls.__name__ in names for cls in type(module).__mro__)


def _locate(model: nn.Module, path: str, router: nn.Module) -> FoundRouter:
    """Place a router in its decoder layer and check that it says what it picks."""
    place = layer_in_path(path)
    if place is None:
        raise UnsupportedModelError(
            f"router {path!r} does not lie inside one '.layers.<number>.' of the module tree, so its"
            f" decoder layer is unknown"
        )
    for name in ("top_k", "num_experts"):
        value: object = getattr(router, name, None)
        if type(value) is not int or value < 1:
            raise UnsupportedModelError(
                f"router {path!r} ({type(router).__name__}) has {name} = {value!r}; replay needs"
                f" top_k and num_experts as positive ints"
            )
    layer_idx, layer_path = place
    layer = model.get_submodule(layer_path)
    return FoundRouter(layer_idx=layer_idx, path=path, router=router, layer=layer)


def _routing(routers: tuple[FoundRouter, ...], num_layers: int) -> ModelRouting:
    """Check that all routers agree, and that their layers exist."""
    shapes = {(found.router.num_experts, found.router.top_k) for found in routers}
    if len(shapes) != 1:
        raise UnsupportedModelError(
            f"routers differ in (num_experts, top_k): {sorted(map(str, shapes))}; a trace has one of"
            f" each"
        )
    layer_ids = tuple(found.layer_idx for found in routers)
    if layer_ids[-1] >= num_layers:
        raise UnsupportedModelError(
            f"router {routers[-1].path!r} lies in decoder layer {layer_ids[-1]} but the"
            f" configuration has num_hidden_layers = {num_layers}"
        )
    first = routers[0].router
    num_experts, top_k = first.num_experts, first.top_k
    assert isinstance(num_experts, int)
    assert isinstance(top_k, int)
    return ModelRouting(
        layer_ids=layer_ids, num_layers=num_layers, num_experts=num_experts, top_k=top_k
    )
