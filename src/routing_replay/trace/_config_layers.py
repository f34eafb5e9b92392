"""Which decoder layers of a Hugging Face model route: every way in which configurations say it."""

from collections.abc import Callable, Mapping

from routing_replay.errors import UnsupportedModelError

__all__ = ["moe_layer_ids"]

# Models whose every layer routes, and whose configuration therefore says nothing about it.
_ALL_LAYERS = frozenset(
    {
        "aria",
        "dbrx",
        "flex_olmo",
        "gpt_oss",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "inkling2",
        "kolibri1",
        "minimax",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen3_5_moe",
        "solar_open",
        "zaya",
    }
)

_Layers = tuple[int, ...] | None


def moe_layer_ids(
    config: Mapping[str, object], *, num_layers: int, model_type: str
) -> tuple[int, ...]:
    """Return the decoder layers that have a router.

    Args:
        config: The configuration of the decoder.
        num_layers: Its decoder layers.
        model_type: Its name, without which silence cannot be read.

    Returns:
        0-based layers, increasing.

    Raises:
        UnsupportedModelError: Nothing says it, or two entries contradict each other, or layers route by token id.
    """
    found = {rule.__name__.strip("_"): rule(config, num_layers) for rule in _RULES}
    said = {name: layers for name, layers in found.items() if layers is not None}
    if not said and model_type.removesuffix("_text") in _ALL_LAYERS:
        return tuple(range(num_layers))
    answers = set(said.values())
    if len(answers) != 1 or not next(iter(answers)):
        detail = "; ".join(f"{name} says {list(layers)}" for name, layers in said.items())
        raise UnsupportedModelError(
            f"the config of model_type={model_type!r} does not say which of its {num_layers} layers route"
            f"{' (' + detail + ')' if detail else ''}; build ModelRouting with its layer_ids yourself"
        )
    return answers.pop()


def _list_of(config: Mapping[str, object], name: str, num_layers: int) -> list[object] | None:
    """An entry with one value for each layer."""
    value = config.get(name)
    if not isinstance(value, list) or len(value) != num_layers:
        return None
    return value


def _integer(config: Mapping[str, object], name: str) -> int | None:
    value = config.get(name)
    return value if type(value) is int else None


def _mlp_layer_types(config: Mapping[str, object], num_layers: int) -> _Layers:
    kinds = _list_of(config, "mlp_layer_types", num_layers)
    if kinds is None:
        return None
    unknown = sorted({str(kind) for kind in kinds} - {"sparse", "moe", "dense"})
    if unknown:
        raise UnsupportedModelError(
            f"mlp_layer_types holds {', '.join(unknown)}; accepted are sparse, moe and dense: layers of other kinds "
            "(hash_moe routes by token id) have no router to replay, and engines disagree on their rows"
        )
    return tuple(index for index, kind in enumerate(kinds) if kind != "dense")


def _moe_layer_freq(config: Mapping[str, object], num_layers: int) -> _Layers:
    flags = _list_of(config, "moe_layer_freq", num_layers)
    return None if flags is None else tuple(i for i, flag in enumerate(flags) if flag)


def _layers_block_type(config: Mapping[str, object], num_layers: int) -> _Layers:
    kinds = _list_of(config, "layers_block_type", num_layers)
    if kinds is None or "moe" not in kinds:
        return None
    return tuple(index for index, kind in enumerate(kinds) if kind == "moe")


def _hybrid_override_pattern(config: Mapping[str, object], num_layers: int) -> _Layers:
    pattern = config.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or len(pattern) != num_layers or "E" not in pattern:
        return None
    return tuple(index for index, kind in enumerate(pattern) if kind == "E")


def _moe_layers(config: Mapping[str, object], num_layers: int) -> _Layers:
    layers = config.get("moe_layers")
    if isinstance(layers, list) and all(type(item) is int for item in layers):
        return tuple(sorted(layers))
    step = _integer(config, "interleave_moe_layer_step")
    return None if not step else tuple(range(step - 1, num_layers, step))


def _moe_layers_enum(config: Mapping[str, object], _num_layers: int) -> _Layers:
    layers = config.get("moe_layers_enum")
    if not isinstance(layers, str):
        return None
    return tuple(sorted(int(item) for item in layers.split(",") if item.strip().isdigit()))


def _expert_layer_period(config: Mapping[str, object], num_layers: int) -> _Layers:
    period, offset = (_integer(config, f"expert_layer_{name}") for name in ("period", "offset"))
    if not period or offset is None:
        return None
    return tuple(i for i in range(num_layers) if i % period == offset)


def _moe_layer_interval(config: Mapping[str, object], num_layers: int) -> _Layers:
    start, end, interval = (
        _integer(config, f"moe_layer_{name}") for name in ("start_index", "end_index", "interval")
    )
    if start is None or not interval:
        return None
    last = num_layers - 1 if end in (None, -1) else end
    assert last is not None
    return tuple(i for i in range(num_layers) if (i + 1) % interval == 0 and start <= i <= last)


def _first_k_dense_replace(config: Mapping[str, object], num_layers: int) -> _Layers:
    first = _integer(config, "first_k_dense_replace")
    if first is None:
        return None
    every = _integer(config, "moe_layer_freq") or 1
    return tuple(i for i in range(first, num_layers) if i % every == 0)


def _num_dense_layers(config: Mapping[str, object], num_layers: int) -> _Layers:
    first = _integer(config, "num_dense_layers")
    return None if first is None else tuple(range(first, num_layers))


def _decoder_sparse_step(config: Mapping[str, object], num_layers: int) -> _Layers:
    step = _integer(config, "decoder_sparse_step")
    if not step:
        return None
    dense = config.get("mlp_only_layers") or ()
    excluded = set(dense) if isinstance(dense, list | tuple) else set[object]()
    return tuple(i for i in range(num_layers) if (i + 1) % step == 0 and i not in excluded)


_RULES: tuple[Callable[[Mapping[str, object], int], _Layers], ...] = (
    _mlp_layer_types,
    _moe_layer_freq,
    _layers_block_type,
    _hybrid_override_pattern,
    _moe_layers,
    _moe_layers_enum,
    _expert_layer_period,
    _moe_layer_interval,
    _first_k_dense_replace,
    _num_dense_layers,
    _decoder_sparse_step,
)
