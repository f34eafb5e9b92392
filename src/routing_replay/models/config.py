"""The configuration of a MoE decoder, read from a Hugging Face `config.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing_replay.capture import RoutingSpec
from routing_replay.errors import UnsupportedModelError

__all__ = ["MoEModelConfig", "load_model_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEModelConfig:
    """Everything that the shared layers need to know about a model.

    Attributes:
        model_type: Hugging Face's `model_type`.
        vocab_size: Rows of the embedding.
        hidden_size: H.
        num_layers: Decoder layers, dense ones included.
        moe_layer_ids: 0-based decoder layers that are MoE layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Size of one head.
        dense_intermediate_size: Intermediate size of dense layers.
        moe_intermediate_size: I, of one expert.
        num_experts: E.
        top_k: K.
        norm_topk_prob: Whether weights are divided by their sum.
        rms_norm_eps: Epsilon of every RMS norm.
        rope_theta: Base of the rotary embedding.
        max_position_embeddings: Longest sequence the model was made for.
        tie_word_embeddings: Whether the output projection is the embedding.
        attention_bias: Whether attention projections have biases.
        eos_token_ids: Tokens that end a sequence.
        num_mtp_layers: Layers after the model's own that draft tokens (multi-token prediction).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    moe_layer_ids: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    dense_intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    eos_token_ids: tuple[int, ...]
    num_mtp_layers: int = 0

    @property
    def routing_spec(self) -> RoutingSpec:
        """The shape of the model's routing."""
        return RoutingSpec(
            layer_ids=self.moe_layer_ids,
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
        )


def _require(raw: dict[str, Any], *names: str) -> Any:  # noqa: ANN401 - JSON values
    for name in names:
        if raw.get(name) is not None:
            return raw[name]
    raise UnsupportedModelError(
        f"config.json lacks {' or '.join(repr(name) for name in names)}; a complete Qwen3-MoE config has it"
    )


def _rope_theta(raw: dict[str, Any]) -> float:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UnsupportedModelError(
            f"config.json asks for rotary embedding {kind!r}; supported is 'default': remove rope scaling"
        )
    return float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))


def _eos_token_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """The stop tokens: generation_config.json's, which lists all of them, before config.json's."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    value = generation.get("eos_token_id", raw.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _check_supported(raw: dict[str, Any]) -> None:
    if raw.get("model_type") != "qwen3_moe":
        raise UnsupportedModelError(
            f"model_type {raw.get('model_type')!r} is not supported; supported is 'qwen3_moe'"
        )
    if raw.get("use_sliding_window"):
        raise UnsupportedModelError("use_sliding_window=True is not supported; supported is False")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(
            f"hidden_act={raw['hidden_act']!r} is not supported; supported is 'silu'"
        )
    if raw.get("quantization_config"):
        raise UnsupportedModelError(
            "the checkpoint is quantized (quantization_config); supported are bfloat16, float16 and float32 weights"
        )


def load_model_config(folder: Path) -> MoEModelConfig:
    """Read the configuration of a Hugging Face Qwen3-MoE folder.

    Args:
        folder: A folder with `config.json` and, optionally, `generation_config.json`.

    Returns:
        The checked configuration.

    Raises:
        UnsupportedModelError: Another family, or a feature that the decoder does not have.
    """
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    _check_supported(raw)
    num_layers = int(_require(raw, "num_hidden_layers"))
    dense: set[int] = set(raw.get("mlp_only_layers") or ())
    step = int(raw.get("decoder_sparse_step", 1))
    moe_layer_ids = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    if not moe_layer_ids:
        raise UnsupportedModelError(
            f"none of the {num_layers} decoder layers is a MoE layer; there is no routing to replay"
        )
    heads = int(_require(raw, "num_attention_heads"))
    hidden_size = int(_require(raw, "hidden_size"))
    return MoEModelConfig(
        model_type=raw["model_type"],
        vocab_size=int(_require(raw, "vocab_size")),
        hidden_size=hidden_size,
        num_layers=num_layers,
        moe_layer_ids=moe_layer_ids,
        num_attention_heads=heads,
        num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden_size // heads),
        dense_intermediate_size=int(_require(raw, "intermediate_size")),
        moe_intermediate_size=int(_require(raw, "moe_intermediate_size")),
        # Hugging Face writes num_local_experts since 5.x, and means all experts of the model.
        num_experts=int(_require(raw, "num_experts", "num_local_experts")),
        top_k=int(_require(raw, "num_experts_per_tok")),
        norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(raw),
        max_position_embeddings=int(raw.get("max_position_embeddings", 32768)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        eos_token_ids=_eos_token_ids(folder, raw),
        num_mtp_layers=int(raw.get("num_nextn_predict_layers") or 0),
    )
