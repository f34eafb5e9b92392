"""vLLM as the rollout engine: its offline `LLM` in this process, or a running server; either way checked traces."""

from routing_replay.integrations.vllm.offline import VllmOffline
from routing_replay.integrations.vllm.server import VllmServer
from routing_replay.integrations.vllm.support import VLLM_REMEDIES, VLLM_VERSIONS

__all__ = ["VLLM_REMEDIES", "VLLM_VERSIONS", "VllmOffline", "VllmServer"]
