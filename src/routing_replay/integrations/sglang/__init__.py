"""A running SGLang server as the rollout engine, with checked traces. Built from its documented contract."""

from routing_replay.integrations.sglang.server import SglangServer
from routing_replay.integrations.sglang.support import (
    SGLANG_REMEDIES,
    SGLANG_UNSUPPORTED,
    SGLANG_VERSIONS,
    UnsupportedOption,
)

__all__ = [
    "SGLANG_REMEDIES",
    "SGLANG_UNSUPPORTED",
    "SGLANG_VERSIONS",
    "SglangServer",
    "UnsupportedOption",
]
