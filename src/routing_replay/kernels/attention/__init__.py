"""Causal attention of a step's rows over keys and values in a paged cache."""

from routing_replay.kernels.attention.op import paged_attention
from routing_replay.kernels.attention.reference import paged_attention_reference

__all__ = ["paged_attention", "paged_attention_reference"]
