"""Where a model routes is read from its configuration, or refused; compared with the routers that Transformers builds."""

import json
from pathlib import Path

import pytest

from routing_replay.errors import ConfigError, TraceFormatError, UnsupportedModelError
from routing_replay.trace import ModelRouting

RECORDED = json.loads(Path(__file__).with_name("model_layouts.json").read_text())["models"]

# Why a configuration is refused although the model has routers.
REFUSED = {
    "deepseek_v2": "num_experts_per_tok",  # its default leaves top_k open
    "deepseek_v4": "hash_moe",
    "jetmoe": "does not say which",  # a second router, in attention
    "longcat_flash": "zero_expert_num",
    "nllb-moe": "has none of them",  # an encoder and a decoder
    "openai_privacy_filter": "does not say which",  # no decoder
}


@pytest.mark.parametrize("model_type", sorted(set(RECORDED) - set(REFUSED)))
def test_layers_are_those_that_transformers_gives_a_router(model_type: str):
    recorded = RECORDED[model_type]
    routing = ModelRouting.from_config(recorded["config"])
    assert list(routing.layer_ids) == recorded["router_layers"]
    assert recorded["num_experts"] in (None, routing.num_experts)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_cannot_be_known_is_refused(model_type: str):
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
        ModelRouting.from_config(RECORDED[model_type]["config"])


def test_most_models_are_covered():
    assert len(RECORDED) >= 55
    assert set(REFUSED) <= set(RECORDED)


def _config(**entries: object) -> dict[str, object]:
    return {"model_type": "m", "num_hidden_layers": 6, "num_experts": 8, "num_experts_per_tok": 2, **entries}  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "layers"),
    [
        ({"first_k_dense_replace": 3}, (3, 4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, (1, 2, 4, 5)),
        ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4}, (2, 3, 4, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"moe_layers_enum": "4,5"}, (4, 5)),
        ({"interleave_moe_layer_step": 3}, (2, 5)),
        ({"hybrid_override_pattern": "M-EM*E"}, (2, 5)),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": -1, "moe_layer_interval": 1}, (2, 3, 4, 5)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3, 5)),
        ({"num_dense_layers": 4}, (4, 5)),
        ({"model_type": "mixtral"}, (0, 1, 2, 3, 4, 5)),
        # What two entries say alike is said.
        ({"first_k_dense_replace": 2, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4}, (2, 3, 4, 5)),
    ],
)  # fmt: skip
def test_every_way_to_say_which_layers_route(entries: dict[str, object], layers: tuple[int, ...]):
    routing = ModelRouting.from_config(_config(**entries))
    assert routing.layer_ids == layers
    assert routing.dense_layer_ids == tuple(sorted(set(range(6)) - set(layers)))
    nested = {"model_type": "vision", "text_config": _config(**entries), "num_hidden_layers": 40}
    assert ModelRouting.from_config(nested) == routing


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_config(), "does not say which of its 6 layers route"),
        (_config(first_k_dense_replace=2, num_dense_layers=3), "first_k_dense_replace says"),
        (_config(first_k_dense_replace=6), "does not say which"),
        (_config(first_k_dense_replace=1, n_routed_experts=9), "num_experts=8, n_routed_experts=9"),
        (_config(first_k_dense_replace=1, num_experts=None), "one of num_experts"),
        (_config(first_k_dense_replace=1, num_experts=True), "one of num_experts"),
        (_config(first_k_dense_replace=1, num_experts_per_tok=[2, 3, 2, 2, 2, 2]), "one of num_experts_per_tok"),
        ({"model_type": "llama", "num_hidden_layers": 2}, "has none of them"),
        ({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}, "num_hidden_layers"),
    ],
)  # fmt: skip
def test_contradictions_and_gaps_are_refused(config: dict[str, object], message: str):
    with pytest.raises(UnsupportedModelError, match=message):
        ModelRouting.from_config(config)


def test_files_are_read_and_named(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(_config(model_type="mixtral")))
    assert ModelRouting.from_config(tmp_path) == ModelRouting.from_config(tmp_path / "config.json")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name, message in (("none.json", "cannot be read"), ("bad.json", "not JSON"), ("list.json", "no JSON object")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            ModelRouting.from_config(tmp_path / name)


def test_a_layout_that_no_model_has_is_refused():
    for change in ({"layer_ids": (1, 0)}, {"layer_ids": (0, 6)}, {"top_k": 9}, {"num_experts": 0}):
        fields = {"layer_ids": (0, 1), "num_layers": 6, "num_experts": 8, "top_k": 2, **change}
        with pytest.raises(TraceFormatError):
            ModelRouting(**fields)  # pyright: ignore[reportArgumentType]
