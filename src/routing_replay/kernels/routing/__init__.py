"""Routing: router logits to expert ids and combine weights, recorded or forced."""

from routing_replay.kernels.routing.method import RoutingMethodType
from routing_replay.kernels.routing.reference import route_reference

__all__ = ["RoutingMethodType", "route_reference"]
