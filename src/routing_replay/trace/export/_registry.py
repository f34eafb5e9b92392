"""Every export format by name: what `routing-replay export --to` writes."""

import base64
import io
import json

import numpy as np

from routing_replay.errors import ConfigError
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.export._archive import encode_npz, encode_safetensors
from routing_replay.trace.export._arrays import to_areal, to_miles, to_ms_swift, to_slime, to_verl
from routing_replay.trace.export._engines import (
    to_sglang,
    to_vllm,
    to_vllm_generate,
    to_vllm_split,
)
from routing_replay.trace.export._format import ExportFormat, ExportParameters
from routing_replay.trace.export._megatron import to_megatron
from routing_replay.trace.export._nemo_rl import to_nemo_rl_envelope
from routing_replay.trace.export._prime_rl import to_prime_rl
from routing_replay.trace.export._skyrl import to_skyrl

__all__ = ["EXPORT_FORMATS"]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _verl(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    return _npy(to_verl(trace, num_tokens=parameters.tokens_of(trace)))


def _slime(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    return _npy(to_slime(trace, num_tokens=parameters.tokens_of(trace)))


def _miles(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    num_tokens = parameters.tokens_of(trace)
    return _npy(to_miles(trace, num_tokens=num_tokens, on_missing=parameters.on_missing))


def _prime_rl(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    struct = to_prime_rl(trace, num_tokens=parameters.tokens_of(trace))
    return _json({**struct, "data": base64.b64encode(struct["data"]).decode("ascii")})


def _nemo_rl(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    num_tokens = parameters.tokens_of(trace)
    envelope = to_nemo_rl_envelope(trace, num_tokens=num_tokens, on_missing=parameters.on_missing)
    return envelope.encode("ascii")


def _skyrl(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    return _npy(to_skyrl(trace, num_tokens=parameters.tokens_of(trace)))


def _ms_swift(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    return _npy(to_ms_swift(trace, num_tokens=parameters.tokens_of(trace)))


def _areal(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    return _npy(to_areal(trace, num_tokens=parameters.tokens_of(trace)))


def _megatron(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    targets = to_megatron(trace, num_tokens=parameters.tokens_of(trace))
    buffer = io.BytesIO()
    arrays = {str(layer_number): target for layer_number, target in targets.items()}
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _vllm(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    return to_vllm(trace, num_tokens=parameters.tokens_of(trace)).encode("ascii")


def _vllm_generate(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    routing = to_vllm_generate(trace, num_tokens=parameters.tokens_of(trace))
    return _json({"routed_experts": routing})


def _vllm_split(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    if parameters.num_prompt_tokens is None:
        raise ConfigError(
            "the format vllm-split keeps the prompt's rows apart and needs num_prompt_tokens; pass --num-prompt-tokens"
        )
    fields = to_vllm_split(
        trace,
        num_tokens=parameters.tokens_of(trace),
        num_prompt_tokens=parameters.num_prompt_tokens,
    )
    return _json(
        {
            "prompt_routed_experts": fields["prompt_routed_experts"].tolist(),
            "routed_experts": fields["routed_experts"].tolist(),
        }
    )


def _sglang(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    field = to_sglang(trace, num_tokens=parameters.tokens_of(trace))
    return _json({"meta_info": {"routed_experts": field}})


def _sglang_openai(trace: RoutingTrace, parameters: ExportParameters) -> bytes:
    field = to_sglang(trace, num_tokens=parameters.tokens_of(trace))
    return _json({"sglext": {"routed_experts": field}})


EXPORT_FORMATS = (
    ExportFormat(
        name="npz",
        suffix=".npz",
        description="numpy archive of all arrays and facts",
        encoder=encode_npz,
    ),
    ExportFormat(
        name="safetensors",
        suffix=".safetensors",
        description="safetensors, facts in its metadata",
        encoder=encode_safetensors,
    ),
    ExportFormat(
        name="verl",
        suffix=".npy",
        description="verl's routed_experts: int16 [T-1, decoder layers, K]",
        encoder=_verl,
    ),
    ExportFormat(
        name="slime",
        suffix=".npy",
        description="slime's rollout_routed_experts: int32 [T-1, decoder layers, K]",
        encoder=_slime,
    ),
    ExportFormat(
        name="miles",
        suffix=".npy",
        description="miles' rollout_routed_experts: int32 [T-1, decoder layers, K]",
        encoder=_miles,
        policies=("error", "arange"),
    ),
    ExportFormat(
        name="prime-rl",
        suffix=".json",
        description="prime-rl's RoutedExperts: data in base64, shape [T, decoder layers, K], dtype",
        encoder=_prime_rl,
    ),
    ExportFormat(
        name="nemo-rl",
        suffix=".txt",
        description="NeMo-RL's text nrlre1:<dtype>:<T>x<MoE layers>x<K>:<base64>",
        encoder=_nemo_rl,
        policies=("error", "native"),
    ),
    ExportFormat(
        name="skyrl",
        suffix=".npy",
        description="an entry of SkyRL's rollout_expert_indices: uint8, int16 or int32 [T-1, decoder layers, K]",
        encoder=_skyrl,
    ),
    ExportFormat(
        name="ms-swift",
        suffix=".npy",
        description="ms-swift's routed_experts: int64 [T-1, decoder layers, K]",
        encoder=_ms_swift,
    ),
    ExportFormat(
        name="areal",
        suffix=".npy",
        description="AReaL's routed_experts: int32 [T-1, decoder layers * K]",
        encoder=_areal,
    ),
    ExportFormat(
        name="megatron",
        suffix=".npz",
        description="Megatron-Core's targets: int64 [T, K] under each router's layer_number",
        encoder=_megatron,
    ),
    ExportFormat(
        name="vllm",
        suffix=".b64",
        description="vLLM's routed_experts: base64 of an .npy of all decoder layers, dense ones arange(K)",
        encoder=_vllm,
    ),
    ExportFormat(
        name="vllm-generate",
        suffix=".json",
        description="routed_experts of vLLM's /inference/v1/generate: data, shape, start, dtype",
        encoder=_vllm_generate,
    ),
    ExportFormat(
        name="vllm-split",
        suffix=".json",
        description="prompt_routed_experts and routed_experts of older vLLM, nested lists",
        encoder=_vllm_split,
    ),
    ExportFormat(
        name="sglang",
        suffix=".json",
        description="SGLang's meta_info.routed_experts: base64 of int32",
        encoder=_sglang,
    ),
    ExportFormat(
        name="sglang-openai",
        suffix=".json",
        description="SGLang's sglext.routed_experts on OpenAI routes: base64 of int32",
        encoder=_sglang_openai,
    ),
)
"""Every format that `routing-replay export` knows."""
