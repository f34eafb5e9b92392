"""A small rollout engine that returns the routing with the tokens."""

from routing_replay.engine.config import EngineConfig, LogprobsMode
from routing_replay.engine.core import EngineCore
from routing_replay.engine.llm import LLM, Prompt
from routing_replay.engine.outputs import CompletionOutput, Logprob, RequestOutput
from routing_replay.engine.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineCore",
    "Logprob",
    "LogprobsMode",
    "Prompt",
    "RequestOutput",
    "SamplingParams",
]
