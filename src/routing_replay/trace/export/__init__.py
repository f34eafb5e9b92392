"""Traces in the shapes that trainers and engines read.

Every function returns the object that the consumer itself takes, sharing no memory with the trace, and refuses what
the consumer cannot express. `num_tokens` is always the length of the whole sequence, prompt and completion. Changes
of the weights' version and combine weights are in our own files alone. See `docs/interop.md`.
"""

from routing_replay.trace.export._arrays import to_areal, to_miles, to_ms_swift, to_slime, to_verl
from routing_replay.trace.export._engines import (
    VllmGenerateRouting,
    VllmSplitRouting,
    to_sglang,
    to_vllm,
    to_vllm_generate,
    to_vllm_split,
)
from routing_replay.trace.export._format import ExportFormat, ExportParameters, OnMissing
from routing_replay.trace.export._megatron import MegatronBatch, to_megatron, to_megatron_batch
from routing_replay.trace.export._nemo_rl import to_nemo_rl, to_nemo_rl_batch, to_nemo_rl_envelope
from routing_replay.trace.export._prime_rl import PrimeRlRouting, to_prime_rl
from routing_replay.trace.export._registry import EXPORT_FORMATS
from routing_replay.trace.export._skyrl import SkyRlRouting, to_skyrl, to_skyrl_generate
from routing_replay.trace.export._verl_batch import to_verl_batch

__all__ = [
    "EXPORT_FORMATS",
    "ExportFormat",
    "ExportParameters",
    "MegatronBatch",
    "OnMissing",
    "PrimeRlRouting",
    "SkyRlRouting",
    "VllmGenerateRouting",
    "VllmSplitRouting",
    "to_areal",
    "to_megatron",
    "to_megatron_batch",
    "to_miles",
    "to_ms_swift",
    "to_nemo_rl",
    "to_nemo_rl_batch",
    "to_nemo_rl_envelope",
    "to_prime_rl",
    "to_sglang",
    "to_skyrl",
    "to_skyrl_generate",
    "to_slime",
    "to_verl",
    "to_verl_batch",
    "to_vllm",
    "to_vllm_generate",
    "to_vllm_split",
]
