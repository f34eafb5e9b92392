"""The grouped-GEMM plan: which row each (token, expert) pair has, and which CTA computes which rows."""

from routing_replay.kernels.permutation.op import plan_permutation
from routing_replay.kernels.permutation.plan import PermutationPlan, PermutationShape
from routing_replay.kernels.permutation.reference import plan_reference

__all__ = ["PermutationPlan", "PermutationShape", "plan_permutation", "plan_reference"]
