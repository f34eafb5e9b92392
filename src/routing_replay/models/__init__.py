"""MoE decoder families from shared layers, with weights from Hugging Face checkpoints."""

from routing_replay.models.config import MoEModelConfig, load_model_config
from routing_replay.models.loading import load_model
from routing_replay.models.qwen3_moe import Qwen3MoEModel
from routing_replay.models.step import RoutingBuffers, SequenceSpan, StepInputs

__all__ = [
    "MoEModelConfig",
    "Qwen3MoEModel",
    "RoutingBuffers",
    "SequenceSpan",
    "StepInputs",
    "load_model",
    "load_model_config",
]
