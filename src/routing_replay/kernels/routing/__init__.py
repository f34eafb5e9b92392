"""Routing: router logits to expert ids and combine weights, recorded or forced."""

from routing_replay.kernels.routing.fused_topk_deepseek import fused_topk_deepseek
from routing_replay.kernels.routing.method import RoutingMethod, RoutingMethodType
from routing_replay.kernels.routing.op import route
from routing_replay.kernels.routing.reference import route_reference, usable_ids

__all__ = [
    "RoutingMethod",
    "RoutingMethodType",
    "fused_topk_deepseek",
    "route",
    "route_reference",
    "usable_ids",
]
