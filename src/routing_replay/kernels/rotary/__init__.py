"""What happens to queries, keys and values between their projection and attention."""

from routing_replay.kernels.rotary.op import norm_rotate_store
from routing_replay.kernels.rotary.reference import norm_rotate_store_reference

__all__ = ["norm_rotate_store", "norm_rotate_store_reference"]
