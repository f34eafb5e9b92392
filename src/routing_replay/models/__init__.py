"""MoE decoder families from shared layers, with weights from Hugging Face checkpoints."""

from routing_replay.models.broadcast import (
    WeightInfo,
    broadcast_weights,
    describe_weights,
    receive_weights,
)
from routing_replay.models.config import MoEModelConfig, load_model_config
from routing_replay.models.hub import find_model_folder
from routing_replay.models.invariance import check_batch_invariance
from routing_replay.models.loading import (
    LoadFormat,
    check_folder_weights,
    copy_weights,
    load_folder_weights,
    load_model,
)
from routing_replay.models.offload import HostWeights, offload_weights, restore_weights
from routing_replay.models.qwen3_moe import Qwen3MoEModel
from routing_replay.models.step import RoutingBuffers, SequenceSpan, StepInputs

__all__ = [
    "HostWeights",
    "LoadFormat",
    "MoEModelConfig",
    "Qwen3MoEModel",
    "RoutingBuffers",
    "SequenceSpan",
    "StepInputs",
    "WeightInfo",
    "broadcast_weights",
    "check_batch_invariance",
    "check_folder_weights",
    "copy_weights",
    "describe_weights",
    "find_model_folder",
    "load_folder_weights",
    "load_model",
    "load_model_config",
    "offload_weights",
    "receive_weights",
    "restore_weights",
]
