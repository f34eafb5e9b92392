"""Routing: router logits to expert ids and combine weights, recorded or forced."""

from routing_replay.kernels.routing.method import RoutingMethod, RoutingMethodType
from routing_replay.kernels.routing.reference import route_reference

__all__ = ["RoutingMethod", "RoutingMethodType", "route_reference"]
