"""Routing methods read from configurations, against the router classes of Transformers on random rows."""

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from routing_replay.errors import ConfigError, UnsupportedModelError
from routing_replay.kernels import RoutingMethodType, route
from routing_replay.kernels.routing.families import FAMILIES, REFUSED, routing_method_of

Kind = RoutingMethodType
HIDDEN = 64
LAYOUTS = Path(__file__).parents[1] / "unit" / "trace" / "model_layouts.json"
E, K = 24, 3


@dataclass(frozen=True)
class Router:
    """A router class of Transformers: where it is, and how it is called."""

    module: str
    name: str
    config: str
    fields: Mapping[str, object] = field(default_factory=dict)
    outside: str | None = None  # the field with a factor that the block applies after the sum


_EXPERTS = {"num_experts": E, "num_experts_per_tok": K}
_LOCAL = {"num_local_experts": E, "num_experts_per_tok": K}
_ROUTED = {"n_routed_experts": E, "num_experts_per_tok": K}
_GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
_DEEPSEEK = {**_ROUTED, **_GROUPS}
_KIMI = {"num_experts": E, "num_experts_per_token": K, "num_expert_group": 4, "topk_group": 2,
         "routed_scaling_factor": 2.5, "moe_renormalize": True}  # fmt: skip

ROUTERS: dict[str, Router] = {
    "mixtral": Router("mixtral", "MixtralTopKRouter", "MixtralConfig", _LOCAL),
    "minimax": Router("minimax", "MiniMaxTopKRouter", "MiniMaxConfig", _LOCAL),
    "hunyuan_v1_moe": Router("hunyuan_v1_moe", "HunYuanMoEV1Gate", "HunYuanMoEV1Config", {"num_experts": E, "moe_topk": K}),
    "qwen3_vl_moe_text": Router("qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter", "Qwen3VLMoeTextConfig", _EXPERTS),
    "qwen3_5_moe_text": Router("qwen3_5_moe", "Qwen3_5MoeTopKRouter", "Qwen3_5MoeTextConfig", _EXPERTS),
    "qwen2_moe": Router("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig", _EXPERTS),
    "qwen3_moe": Router("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", _EXPERTS),
    "qwen3_next": Router("qwen3_next", "Qwen3NextTopKRouter", "Qwen3NextConfig", _EXPERTS),
    "qwen3_omni_moe_text": Router("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextTopKRouter", "Qwen3OmniMoeTextConfig", _EXPERTS),
    "qwen3_omni_moe_talker_text": Router("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextTopKRouter", "Qwen3OmniMoeTalkerTextConfig", _EXPERTS),
    "qwen4_exp_text": Router("qwen4_exp", "Qwen4ExpTextTopKRouter", "Qwen4ExpTextConfig", _EXPERTS),
    "olmoe": Router("olmoe", "OlmoeTopKRouter", "OlmoeConfig", _EXPERTS),
    "flex_olmo": Router("flex_olmo", "FlexOlmoTopKRouter", "FlexOlmoConfig", _EXPERTS),
    "mellum": Router("mellum", "MellumTopKRouter", "MellumConfig", _EXPERTS),
    "jamba": Router("jamba", "JambaTopKRouter", "JambaConfig", _EXPERTS),
    "deepseek_v2": Router("deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config", {**_ROUTED, "topk_method": "greedy", "routed_scaling_factor": 1.0}),
    "mistral4": Router("mistral4", "Mistral4TopkRouter", "Mistral4Config", {**_ROUTED, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    "mistral_large4_text": Router("mistral_large4", "MistralLarge4TextTopkRouter", "MistralLarge4TextConfig", {**_ROUTED, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    "dbrx": Router("dbrx", "DbrxFFN", "DbrxConfig", {"d_model": HIDDEN, "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": E, "moe_top_k": K, "moe_normalize_expert_weights": 1.0, "hidden_size": HIDDEN}}),
    "granitemoe": Router("granitemoe", "GraniteMoeTopKRouter", "GraniteMoeConfig", _LOCAL),
    "granitemoe_swa": Router("granitemoe_swa", "GraniteMoeSWATopKRouter", "GraniteMoeSWAConfig", _LOCAL),
    "granitemoehybrid": Router("granitemoehybrid", "GraniteMoeHybridTopKRouter", "GraniteMoeHybridConfig", _LOCAL),
    "granitemoeshared": Router("granitemoeshared", "GraniteMoeSharedTopKRouter", "GraniteMoeSharedConfig", _LOCAL),
    "aria_text": Router("aria", "AriaTextTopKRouter", "AriaTextConfig", {"moe_num_experts": E, "moe_topk": K}),
    "jetmoe": Router("jetmoe", "JetMoeTopKGating", "JetMoeConfig", _LOCAL),
    "gpt_oss": Router("gpt_oss", "GptOssTopKRouter", "GptOssConfig", _LOCAL),
    "cohere2_moe": Router("cohere2_moe", "Cohere2MoeTopKRouter", "Cohere2MoeConfig", {**_EXPERTS, "expert_selection_fn": "softmax"}),
    "deepseek_v3": Router("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config", _DEEPSEEK),
    "deepseek_v32": Router("deepseek_v32", "DeepseekV32TopkRouter", "DeepseekV32Config", _DEEPSEEK),
    "glm4_moe": Router("glm4_moe", "Glm4MoeTopkRouter", "Glm4MoeConfig", _DEEPSEEK),
    "glm4_moe_lite": Router("glm4_moe_lite", "Glm4MoeLiteTopkRouter", "Glm4MoeLiteConfig", _DEEPSEEK),
    "glm4v_moe_text": Router("glm4v_moe", "Glm4vMoeTextTopkRouter", "Glm4vMoeTextConfig", _DEEPSEEK),
    "glm5_next_text": Router("glm5_next", "Glm5NextTextTopkRouter", "Glm5NextTextConfig", _DEEPSEEK),
    "glm_moe_dsa": Router("glm_moe_dsa", "GlmMoeDsaTopkRouter", "GlmMoeDsaConfig", _DEEPSEEK),
    "dots1": Router("dots1", "Dots1TopkRouter", "Dots1Config", _DEEPSEEK),
    "dots3_note_text": Router("dots3_note", "Dots3NoteTextTopkRouter", "Dots3NoteTextConfig", _DEEPSEEK),
    "axk1": Router("axk1", "AXK1TopkRouter", "AXK1Config", _DEEPSEEK),
    "exaone_moe": Router("exaone_moe", "ExaoneMoeTopkRouter", "ExaoneMoeConfig", {**_EXPERTS, **_GROUPS}),
    "hy_v4": Router("hy_v4", "HYV4TopkRouter", "HYV4Config", _DEEPSEEK),
    "mimo_v2_flash": Router("mimo_v2_flash", "MiMoV2FlashTopkRouter", "MiMoV2FlashConfig", _DEEPSEEK),
    "nemotron_h": Router("nemotron_h", "NemotronHTopkRouter", "NemotronHConfig", _DEEPSEEK),
    "solar_open": Router("solar_open", "SolarOpenTopkRouter", "SolarOpenConfig", _DEEPSEEK),
    "beam": Router("beam", "BeamTopKRouter", "BeamConfig", {**_EXPERTS, **_GROUPS}, outside="routed_scaling_factor"),
    "bailing_hybrid": Router("bailing_hybrid", "BailingHybridTopkRouter", "BailingHybridConfig", _KIMI),
    "kimi_linear": Router("kimi_linear", "KimiLinearTopkRouter", "KimiLinearConfig", _KIMI),
    "axk2": Router("axk2", "AXK2TopkRouter", "AXK2Config", {**_ROUTED, "n_group": None, "topk_group": None, "routed_scaling_factor": 2.5, "norm_topk_prob": True}),
    "minimax_m2": Router("minimax_m2", "MiniMaxM2TopKRouter", "MiniMaxM2Config", _LOCAL),
    "minimax_m3_vl_text": Router("minimax_m3_vl", "MiniMaxM3VLTopKRouter", "MiniMaxM3VLTextConfig", {**_LOCAL, "routed_scaling_factor": 2.0}, outside="routed_scaling_factor"),
    "step3p5": Router("step3p7", "Step3p7TopKRouter", "Step3p7TextConfig", {**_ROUTED, "moe_router_scaling_factor": 3.0}, outside="moe_router_scaling_factor"),
    "hy_v3": Router("hy_v3", "HYV3TopKRouter", "HYV3Config", {**_EXPERTS, "router_scaling_factor": 2.5}),
    "afmoe": Router("afmoe", "AfmoeTokenChoiceRouter", "AfmoeConfig", {**_EXPERTS, "route_scale": 1.5}),
    "laguna": Router("laguna", "LagunaTopKRouter", "LagunaConfig", {**_EXPERTS, "moe_routed_scaling_factor": 1.5}, outside="moe_routed_scaling_factor"),
    "flint": Router("flint", "FlintTopKRouter", "FlintConfig", _EXPERTS),
    "llama4_text": Router("llama4", "Llama4Router", "Llama4TextConfig", {"num_local_experts": E, "num_experts_per_tok": 1}),
}  # fmt: skip


def _build(router: Router, **changes: object) -> tuple[Any, torch.nn.Module]:
    """A configuration and its router, with random weights and bias."""
    package = f"transformers.models.{router.module}"
    name = router.module
    config_class = getattr(
        importlib.import_module(f"{package}.configuration_{name}"), router.config
    )
    fields = {"hidden_size": HIDDEN, **router.fields, **changes}
    if "d_model" in fields:
        del fields["hidden_size"]
    config = config_class(**fields)
    router_class = getattr(importlib.import_module(f"{package}.modeling_{name}"), router.name)
    if router.name == "JetMoeTopKGating":
        module = router_class(HIDDEN, E, K)
    else:
        module = router_class(config)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.normal_(std=0.2)
    return config, module


def _bias_of(module: torch.nn.Module) -> Tensor | None:
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    for name in ("e_score_correction_bias", "bias"):
        if name in found:
            return found[name].detach()
    takes = inspect.signature(module.forward).parameters
    if "e_score_correction_bias" in takes or "expert_bias" in takes:
        return torch.randn(E) * 0.3
    return None


def _jetmoe(outputs: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    order, _, sorted_weights, sizes, logits = outputs
    experts = torch.empty(len(order), dtype=torch.long)
    experts[order] = torch.arange(E).repeat_interleave(torch.tensor(sizes))
    weights = torch.empty(len(order))
    weights[order] = sorted_weights
    return logits, weights.view(-1, K), experts.view(-1, K)


@torch.no_grad()
def _theirs(module: torch.nn.Module, hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits (without a bias of the router's own), weights and ids of Transformers' router."""
    name = type(module).__name__
    if name == "DbrxFFN":
        logits = module.router(hidden)
        return (logits, *module.route_tokens_to_experts(logits))
    if name == "JetMoeTopKGating":
        return _jetmoe(module(hidden))
    if name == "Llama4Router":
        scores, logits = module(hidden)
        ids = scores.argmax(1, keepdim=True)
        return logits, scores.gather(1, ids), ids
    if name == "AfmoeTokenChoiceRouter":
        return module(hidden[None], bias)
    has_argument = len(inspect.signature(module.forward).parameters) > 1
    logits, weights, ids = module(hidden, bias) if has_argument else module(hidden)
    if name == "GptOssTopKRouter":
        logits = logits - module.bias
    return logits, weights, ids


def _in_rank_order(method_type: Kind, logits: Tensor, bias: Tensor | None, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Their columns by the key that was selected on: some of their top-k calls return them unsorted."""
    keys = logits.double()
    if method_type in (Kind.DeepSeekV3, Kind.MiniMax2):
        keys = keys.sigmoid() + (0 if bias is None else bias.double())
    elif bias is not None:
        keys = keys + bias.double()
    order = keys.gather(1, ids).argsort(dim=1, descending=True)
    return weights.gather(1, order), ids.gather(1, order)


def _compare(model_type: str, **changes: object) -> Kind:
    router = ROUTERS[model_type]
    config, module = _build(router, **changes)
    content = json.loads(config.to_json_string())  # what save_pretrained writes
    method = routing_method_of(content)
    bias = _bias_of(module)
    logits, weights, ids = _theirs(module, torch.randn(64, HIDDEN), bias)
    if router.outside is not None:
        weights = weights * getattr(config, router.outside)
    expected_weights, expected = _in_rank_order(method.type, logits, bias, weights, ids)
    mine, mine_ids = route(logits, method, routing_bias=bias)
    assert mine_ids.tolist() == expected.tolist()
    torch.testing.assert_close(mine, expected_weights.float(), rtol=2e-6, atol=1e-6)
    assert mine.std() > 0  # weights that differ
    return method.type


@pytest.mark.parametrize("model_type", sorted(ROUTERS))
def test_method_is_transformers_own_router(model_type: str):
    family = next(item for item in FAMILIES if model_type in item.model_types)
    changes = {} if family.norm_field is None else {family.norm_field: True}
    assert _compare(model_type, **changes) is family.method


@pytest.mark.parametrize("model_type", sorted(t for f in FAMILIES if f.norm_field for t in f.model_types))  # fmt: skip
def test_method_follows_the_norm_field(model_type: str):
    family = next(item for item in FAMILIES if model_type in item.model_types)
    assert family.norm_field is not None
    used = _compare(model_type, **{family.norm_field: False})
    expected = family.method if family.unnormalized is None else family.unnormalized
    assert used is expected


def test_every_family_is_compared():
    assert sorted(ROUTERS) == sorted(name for family in FAMILIES for name in family.model_types)
    assert not set(ROUTERS) & set(REFUSED)


def _problem(config: Mapping[str, object]) -> str:
    try:
        routing_method_of(config)
    except (UnsupportedModelError, ConfigError) as err:
        return str(err)
    return ""


def test_every_model_of_transformers_is_supported_or_refused():
    """The configurations of all mixture-of-experts models that Transformers can build, and one of none."""
    models = json.loads(LAYOUTS.read_text())["models"]
    assert len(models) > 70
    problems = {name: _problem(model["config"]) for name, model in models.items()}
    problems["none"] = _problem({"model_type": "llama"})
    unknown = [name for name, text in problems.items() if "not among the known families" in text]
    assert unknown == ["none"]


def test_the_comparison_can_fail():
    config, module = _build(ROUTERS["deepseek_v3"])
    method = routing_method_of(config.to_dict())
    bias = _bias_of(module)
    logits, _, ids = _theirs(module, torch.randn(64, HIDDEN), bias)
    _, without = route(logits, method)
    assert without.sort(1).values.tolist() != ids.sort(1).values.tolist()


def test_parameters_are_read():
    method = routing_method_of(_build(ROUTERS["kimi_linear"])[0].to_dict())
    assert (method.num_experts, method.top_k, method.n_group, method.topk_group) == (E, K, 4, 2)
    assert method.routed_scaling_factor == 2.5


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "glm4v_moe", "aria", "llama4"])
def test_text_part_of_a_multimodal_configuration_is_found(model_type: str):
    text_type = f"{model_type}_text"
    content = _build(ROUTERS[text_type])[0].to_dict()
    assert routing_method_of({"model_type": model_type, "text_config": content}) == routing_method_of(content)  # fmt: skip
    # Published configurations may leave the model type out of the text part.
    del content["model_type"]
    assert routing_method_of({"model_type": model_type, "text_config": content}).num_experts == E


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_families_without_a_method_are_refused_with_the_reason(model_type: str):
    with pytest.raises(UnsupportedModelError, match="no routing method is exactly that") as caught:
        routing_method_of({"model_type": model_type, "num_experts": 8, "num_experts_per_tok": 2})
    assert REFUSED[model_type] in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama4_text", {"num_experts_per_tok": 2}, "num_experts_per_tok=2 is not exactly a routing method; accepted is 1"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method='group_limited_greedy'"),
        ("deepseek_v2", {"routed_scaling_factor": 16.0}, "routed_scaling_factor=16.0"),
        ("cohere2_moe", {"expert_selection_fn": "sigmoid"}, "expert_selection_fn='sigmoid'"),
        ("laguna", {"moe_router_logit_softcapping": 30.0}, "moe_router_logit_softcapping=30.0"),
        ("mistral4", {"n_group": 4}, "n_group=4"),
        ("qwen3_moe", {"norm_topk_prob": ...}, "has no norm_topk_prob, which decides its routing"),
        ("deepseek_v3", {"n_group": "8"}, "n_group='8'; accepted is a number"),
        ("mixtral", {"num_local_experts": 0.5}, "as one whole number and has num_local_experts=0.5"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 4]}, r"has moe_topk=\[2, 4\]; build RoutingMethod yourself"),
        ("mixtral", {"model_type": "no_such"}, "model_type='no_such' is not among the known families"),
    ],
)  # fmt: skip
def test_what_the_method_cannot_express_is_refused(model_type: str, changes: dict[str, object], message: str):  # fmt: skip
    content = {**_build(ROUTERS[model_type])[0].to_dict(), **changes}
    content = {name: value for name, value in content.items() if value is not ...}
    with pytest.raises(UnsupportedModelError, match=message):
        routing_method_of(content)
