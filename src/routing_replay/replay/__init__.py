"""Replay of captured routing in torch models, and the metrics that show that it works."""

from routing_replay.replay._handle import ReplayHandle, attach
from routing_replay.replay._plan import OnMissing, ReplayPlan, TokenIds
from routing_replay.replay._recording import RecordedRouting
from routing_replay.replay._stats import LayerReplayStats, ReplayStats
from routing_replay.replay.layout import Layout, Packed, Padded
from routing_replay.replay.metrics import (
    Interval,
    RoutingMismatch,
    extreme_fraction,
    kl_k1,
    kl_k3,
    kl_k3_terms,
    mean_abs_dlogp,
    mean_abs_dp,
    paired_bootstrap_ratio,
    routing_mismatch,
    token_mult_prob_error,
)
from routing_replay.replay.observe import ObservedExpertIds, observe_expert_ids

__all__ = [
    "Interval",
    "LayerReplayStats",
    "Layout",
    "ObservedExpertIds",
    "OnMissing",
    "Packed",
    "Padded",
    "RecordedRouting",
    "ReplayHandle",
    "ReplayPlan",
    "ReplayStats",
    "RoutingMismatch",
    "TokenIds",
    "attach",
    "extreme_fraction",
    "kl_k1",
    "kl_k3",
    "kl_k3_terms",
    "mean_abs_dlogp",
    "mean_abs_dp",
    "observe_expert_ids",
    "paired_bootstrap_ratio",
    "routing_mismatch",
    "token_mult_prob_error",
]
