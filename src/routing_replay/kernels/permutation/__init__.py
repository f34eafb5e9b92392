"""The grouped-GEMM plan: which row each (token, expert) pair has, and which CTA computes which rows."""

from routing_replay.kernels.permutation.op import plan_permutation
from routing_replay.kernels.permutation.plan import PermutationPlan, PermutationShape
from routing_replay.kernels.permutation.reference import plan_reference
from routing_replay.kernels.permutation.route_and_plan import route_and_plan
from routing_replay.kernels.permutation.workspace import route_and_plan_workspace

__all__ = [
    "PermutationPlan",
    "PermutationShape",
    "plan_permutation",
    "plan_reference",
    "route_and_plan",
    "route_and_plan_workspace",
]
