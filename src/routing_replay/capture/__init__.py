"""The capture runtime: device cache, replay buffer, host cache, and the pipeline between them."""

from routing_replay.capture.canary import canary_ids, check_canary
from routing_replay.capture.device_cache import DeviceCache, RoutingSpec, StepRows
from routing_replay.capture.host_cache import BlockRef, HostCache, RequestRows
from routing_replay.capture.pipeline import (
    CapturePipeline,
    RowSpan,
    UncachedPrefix,
    describe_bad_row,
)
from routing_replay.capture.replay_buffer import ReplayBuffer
from routing_replay.capture.support import REFUSED, SUPPORTED, Refusal, check_capture_support

__all__ = [
    "REFUSED",
    "SUPPORTED",
    "BlockRef",
    "CapturePipeline",
    "DeviceCache",
    "HostCache",
    "Refusal",
    "ReplayBuffer",
    "RequestRows",
    "RoutingSpec",
    "RowSpan",
    "StepRows",
    "UncachedPrefix",
    "canary_ids",
    "check_canary",
    "check_capture_support",
    "describe_bad_row",
]
