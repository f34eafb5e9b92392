"""The capture runtime: device cache, replay buffer, host cache, and the pipeline between them."""

from routing_replay.capture.canary import canary_ids, check_canary
from routing_replay.capture.device_cache import DeviceCache, RoutingSpec, StepRows
from routing_replay.capture.host_cache import BlockRef, HostCache, RequestRows
from routing_replay.capture.pipeline import CapturePipeline, RowSpan, describe_bad_row
from routing_replay.capture.replay_buffer import ReplayBuffer

__all__ = [
    "BlockRef",
    "CapturePipeline",
    "DeviceCache",
    "HostCache",
    "ReplayBuffer",
    "RequestRows",
    "RoutingSpec",
    "RowSpan",
    "StepRows",
    "canary_ids",
    "check_canary",
    "describe_bad_row",
]
