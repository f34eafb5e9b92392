"""Experts: grouped GEMM 1, activation, grouped GEMM 2 and the weighted sum."""

from routing_replay.kernels.experts.activation import (
    ActivationType,
    SwigluParameters,
    apply_activation,
)
from routing_replay.kernels.experts.layout import gate_first
from routing_replay.kernels.experts.reference import (
    ExpertWeights,
    combine_reference,
    experts_reference,
)

__all__ = [
    "ActivationType",
    "ExpertWeights",
    "SwigluParameters",
    "apply_activation",
    "combine_reference",
    "experts_reference",
    "gate_first",
]
