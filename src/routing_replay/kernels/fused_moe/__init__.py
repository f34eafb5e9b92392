"""Fused mixture-of-experts layers in which routing can be recorded and forced."""

from routing_replay.kernels.fused_moe.op import bf16_moe
from routing_replay.kernels.fused_moe.routed import bf16_routed_moe

__all__ = ["bf16_moe", "bf16_routed_moe"]
