"""Which routing method each Hugging Face mixture-of-experts family uses, read from its `config.json`.

The truth is the router of Transformers 5.23; a test runs every family's own router class beside the method. A family whose
router is not exactly a method is listed with the reason and refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from routing_replay.errors import UnsupportedModelError
from routing_replay.kernels.routing.method import RoutingMethod, RoutingMethodType

__all__ = ["FAMILIES", "REFUSED", "RoutingFamily", "routing_method_of"]

Kind = RoutingMethodType


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingFamily:
    """How the configurations of some model types say their routing.

    A field that is named here must be in the configuration: its default differs from model to model and is not guessed.

    Attributes:
        model_types: The `model_type` of the configurations, those of the text part of multimodal models among them.
        method: The method.
        norm_field: The field that says whether weights are divided by their sum; None where the method says it.
        unnormalized: The method where `norm_field` is false; None where the method itself has that parameter.
        scale_field: The field with the factor on the weights.
        group_fields: The fields with the number of groups and of groups that a token may use.
        needs: Fields and the values that they must have for the method to be exact.
        bias: The tensor of the checkpoint that is `routing_bias`, relative to the router or its block; None without one.
    """

    model_types: tuple[str, ...]
    method: RoutingMethodType
    norm_field: str | None = None
    unnormalized: RoutingMethodType | None = None
    scale_field: str | None = None
    group_fields: tuple[str, str] | None = None
    needs: tuple[tuple[str, tuple[object, ...]], ...] = ()
    bias: str | None = None


FAMILIES: tuple[RoutingFamily, ...] = (
    RoutingFamily(
        model_types=("mixtral", "minimax", "hunyuan_v1_moe", "qwen3_vl_moe_text", "qwen3_5_moe_text"),
        method=Kind.RenormalizeNaive,
    ),
    RoutingFamily(
        model_types=(
            "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_text", "qwen3_omni_moe_talker_text", "qwen4_exp_text", "olmoe", "flex_olmo", "mellum",
        ),
        method=Kind.RenormalizeNaive,
        norm_field="norm_topk_prob",
        unnormalized=Kind.Default,
    ),
    RoutingFamily(model_types=("jamba",), method=Kind.Default),
    RoutingFamily(
        model_types=("deepseek_v2",),
        method=Kind.Default,
        needs=(("topk_method", ("greedy",)), ("routed_scaling_factor", (1.0,))),
    ),
    RoutingFamily(
        model_types=("mistral4",),
        method=Kind.RenormalizeNaive,
        norm_field="norm_topk_prob",
        unnormalized=Kind.Default,
        needs=(("n_group", (1,)), ("routed_scaling_factor", (1.0,))),
    ),
    RoutingFamily(
        model_types=("mistral_large4_text",),
        method=Kind.RenormalizeNaive,
        needs=(("n_group", (1,)), ("routed_scaling_factor", (1.0,))),
    ),
    RoutingFamily(
        model_types=("dbrx",),
        method=Kind.RenormalizeNaive,
        needs=(("moe_normalize_expert_weights", (1,)),),
    ),
    RoutingFamily(
        model_types=("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "aria_text", "jetmoe"),
        method=Kind.Renormalize,
    ),
    RoutingFamily(model_types=("gpt_oss",), method=Kind.Renormalize, bias="bias"),
    RoutingFamily(
        model_types=("cohere2_moe",),
        method=Kind.Renormalize,
        needs=(("expert_selection_fn", ("softmax",)),),
    ),
    RoutingFamily(
        model_types=(
            "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm5_next_text", "glm_moe_dsa",
            "dots1", "dots3_note_text", "axk1", "exaone_moe", "hy_v4", "mimo_v2_flash", "nemotron_h", "solar_open", "beam",
        ),
        method=Kind.DeepSeekV3,
        norm_field="norm_topk_prob",
        scale_field="routed_scaling_factor",
        group_fields=("n_group", "topk_group"),
        bias="e_score_correction_bias",
    ),
    RoutingFamily(
        model_types=("bailing_hybrid", "kimi_linear"),
        method=Kind.DeepSeekV3,
        norm_field="moe_renormalize",
        scale_field="routed_scaling_factor",
        group_fields=("num_expert_group", "topk_group"),
        bias="e_score_correction_bias",
    ),
    RoutingFamily(
        model_types=("axk2",),
        method=Kind.DeepSeekV3,
        norm_field="norm_topk_prob",
        scale_field="routed_scaling_factor",
        needs=(("n_group", (None,)),),
        bias="e_score_correction_bias",
    ),
    RoutingFamily(model_types=("minimax_m2",), method=Kind.MiniMax2, bias="e_score_correction_bias"),
    RoutingFamily(
        model_types=("minimax_m3_vl_text",),
        method=Kind.MiniMax2,
        scale_field="routed_scaling_factor",
        bias="e_score_correction_bias",
    ),
    RoutingFamily(
        model_types=("step3p5",),
        method=Kind.MiniMax2,
        scale_field="moe_router_scaling_factor",
        bias="e_score_correction_bias",
    ),
    RoutingFamily(
        model_types=("hy_v3",),
        method=Kind.MiniMax2,
        scale_field="router_scaling_factor",
        bias="e_score_correction_bias",
    ),
    RoutingFamily(
        model_types=("afmoe",), method=Kind.MiniMax2, scale_field="route_scale", bias="expert_bias"
    ),
    RoutingFamily(
        model_types=("laguna",),
        method=Kind.MiniMax2,
        scale_field="moe_routed_scaling_factor",
        needs=(("moe_router_logit_softcapping", (0.0,)), ("moe_apply_router_weight_on_input", (False,))),
        bias="e_score_correction_bias",
    ),
    RoutingFamily(model_types=("flint",), method=Kind.SigmoidRenorm, norm_field="norm_topk_prob"),
    RoutingFamily(
        model_types=("llama4_text",), method=Kind.Llama4, needs=(("num_experts_per_tok", (1,)),)
    ),
)  # fmt: skip
"""Families whose router is exactly a method."""

REFUSED: Mapping[str, str] = {
    "phimoe": "picks its two experts one after the other by sparsemixer, which masks the logits in between",
    "ernie4_5_moe": "adds a selection bias to a softmax",
    "ernie4_5_vl_moe_text": "adds a selection bias to a softmax",
    "longcat_flash": "adds a selection bias to a softmax, and has experts that compute nothing",
    "deepseek_v4": "scores by the square root of a softplus, and routes its first layers by token id",
    "deepseek_ocr2_text": "multiplies softmax probabilities by a factor, in groups by their best expert",
    "unlimited_ocr_text": "multiplies softmax probabilities by a factor, in groups by their best expert",
    "gemma4_text": "has a factor for each expert on the weights",
    "diffusion_gemma_text": "has a factor for each expert on the weights",
    "openai_privacy_filter": "divides the softmax of the selected logits by the number of experts",
    "lfm2_moe": "adds 1e-6 to the sum that it divides by",
    "muse_spark_text": "multiplies its logits by a constant of the configuration before the sigmoid",
    "kolibri1": "adds a selection bias to the logits, not to their sigmoid",
    "inkling_text": "shares one sum between routed and shared experts",
    "inkling2_text": "shares one sum between routed and shared experts",
    "doge": "picks experts as pairs of two halves of the keys",
    "zaya": "has a choice that stands for no expert, and a router with a state of its own",
    "switch_transformers": "drops tokens beyond the capacity of an expert",
    "nllb-moe": "drops tokens beyond the capacity of an expert",
}
"""Families whose router no method expresses, and why."""

_NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config")
_BY_TYPE = {name: family for family in FAMILIES for name in family.model_types}


def _text_part(config: Mapping[str, object]) -> Mapping[str, object]:
    """The part that describes the decoder, with what lies deeper in it."""
    for name in _TEXT:
        part = config.get(name)
        if isinstance(part, Mapping):
            inner = _text_part(cast("Mapping[str, object]", part))
            if name == "ffn_config":  # a part of the decoder, beside what describes the rest
                return {**config, **{k: v for k, v in inner.items() if k != "model_type"}}
            return {"model_type": config.get("model_type"), **inner}
    return config


def _field(config: Mapping[str, object], name: str, model_type: str) -> object:
    if name not in config:
        raise UnsupportedModelError(
            f"the config of model_type={model_type!r} has no {name}, which decides its routing; add the value that the "
            "model was trained with, or build RoutingMethod yourself"
        )
    return config[name]


def _number(config: Mapping[str, object], name: str, model_type: str) -> float:
    value = _field(config, name, model_type)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnsupportedModelError(
            f"the config of model_type={model_type!r} has {name}={value!r}; accepted is a number"
        )
    return value


def _size(config: Mapping[str, object], names: tuple[str, ...], model_type: str) -> int:
    """What the configuration says under one of the names, for all layers alike."""
    found = {name: config[name] for name in names if config.get(name) is not None}
    values: set[object] = set()
    for value in found.values():
        values.update(cast("list[object]", value) if isinstance(value, list) else [value])
    if len(values) == 1:
        value = values.pop()
        if type(value) is int:
            return value
    said = ", ".join(f"{name}={value!r}" for name, value in found.items()) or "none of them"
    raise UnsupportedModelError(
        f"the config of model_type={model_type!r} should hold one of {', '.join(names)} as one whole number and has {said}; "
        "build RoutingMethod yourself, one for each layer that differs"
    )


def _family_of(model_type: str) -> RoutingFamily:
    family = _BY_TYPE.get(model_type) or _BY_TYPE.get(f"{model_type}_text")
    if family is not None:
        return family
    reason = REFUSED.get(model_type) or REFUSED.get(f"{model_type}_text")
    if reason is not None:
        raise UnsupportedModelError(
            f"model_type={model_type!r} {reason}: no routing method is exactly that; use the model's own router, and "
            "replay its ids with routing_replay.replay"
        )
    raise UnsupportedModelError(
        f"model_type={model_type!r} is not among the known families ({', '.join(sorted(_BY_TYPE))}); compare its router "
        "with RoutingMethodType and build RoutingMethod yourself"
    )


def routing_method_of(config: Mapping[str, object]) -> RoutingMethod:
    """Read the routing method of a model from its Hugging Face configuration.

    Args:
        config: The content of a `config.json`.

    Returns:
        The method. A factor that the model applies to the sum of its experts is in `routed_scaling_factor`.

    Raises:
        UnsupportedModelError: The family is not known, its router is not exactly a method, or the configuration lacks a
            field or has a value that the method cannot express.
        ConfigError: The values do not make a method, as groups that do not divide the experts.

    Runtime: host only; pure.
    """
    config = _text_part(config)
    model_type = str(config.get("model_type", "unknown"))
    family = _family_of(model_type)
    for name, accepted in family.needs:
        value = _field(config, name, model_type)
        if value not in accepted:
            values = " or ".join(repr(item) for item in accepted)
            raise UnsupportedModelError(
                f"model_type={model_type!r} with {name}={value!r} is not exactly a routing method; accepted is {values}: "
                "use the model's own router, and replay its ids with routing_replay.replay"
            )
    method, norm_topk_prob = family.method, True
    if family.norm_field is not None and not _field(config, family.norm_field, model_type):
        # A method without this parameter gives way to the one that does not divide.
        norm_topk_prob = family.unnormalized is not None
        method = method if family.unnormalized is None else family.unnormalized
    groups = (1.0, 1.0)
    if family.group_fields is not None:
        n_group, topk_group = family.group_fields
        groups = (_number(config, n_group, model_type), _number(config, topk_group, model_type))
    scale = 1.0
    if family.scale_field is not None:
        scale = float(_number(config, family.scale_field, model_type))
    return RoutingMethod(
        type=method,
        num_experts=_size(config, _NUM_EXPERTS, model_type),
        top_k=_size(config, _TOP_K, model_type),
        n_group=int(groups[0]),
        topk_group=int(groups[1]),
        routed_scaling_factor=scale,
        norm_topk_prob=norm_topk_prob,
    )
