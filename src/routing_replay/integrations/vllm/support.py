"""Which vLLM this library knows, and what to do about what its canary finds."""

from collections.abc import Mapping

from routing_replay.integrations.versions import EngineVersion

__all__ = ["SERVE_COMMAND", "VLLM_REMEDIES", "VLLM_VERSIONS"]

SERVE_COMMAND = "vllm serve MODEL --enable-return-routed-experts"

VLLM_VERSIONS = (
    EngineVersion(series="0.30", note="run, CPU build 0.30.0"),
    EngineVersion(series="0.31", note="same fields, read only"),
    EngineVersion(series="0.32", note="same fields, read only"),
    EngineVersion(series="0.33", note="same fields, read only"),
)
"""Earlier versions send JSON lists, or prompt and completion apart; `trace.importers` reads those."""

_NOT_CAPTURED = (
    "on a CPU, start vLLM with enforce_eager=True (--enforce-eager): its compiled graphs are traced before the capture "
    "hook is bound; on Blackwell, choose another --moe-backend than FlashInfer TRT-LLM, or vLLM 0.30 or newer"
)
_SPECIALISED = "switch specialised decode kernels off, or choose another --moe-backend"
_CONFIG = "pass the config.json of the model that vLLM serves"
_REPORT = "use another version of vLLM, and report this with the canary's message"

VLLM_REMEDIES: Mapping[str, str] = {
    "all_zero": _NOT_CAPTURED,
    "zero_layers": _NOT_CAPTURED,
    "zero_cells": _SPECIALISED,
    "zero_rows": _SPECIALISED,
    "frozen_rows": _SPECIALISED,
    "rows_of_another_request": "switch external KV transfer and offload off (kv_transfer_config)",
    "zero_front_rows": "switch external KV transfer off (kv_transfer_config): rows of loaded blocks do not come with them",
    "missing_front_rows": "send no routed_experts_prompt_start, and switch external KV transfer off",
    "physical_ids": "switch the expert load balancer off (--enable-eplb), or use vLLM 0.30 or newer",
    "ids_out_of_range": _CONFIG,
    "layer_offset": _CONFIG,
    "dense_layer_routes": _CONFIG,
    "layer_axis": _CONFIG,
    "top_k": _CONFIG,
    "draft_layers": "switch speculative decoding off, or use vLLM 0.30 or newer",
    "": _REPORT,
}
"""By the code of a finding; `""` for every other."""
