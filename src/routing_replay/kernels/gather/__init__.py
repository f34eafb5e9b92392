"""Gathering the routing rows of a step out of the device cache, checked and reset."""

from routing_replay.kernels.gather.op import gather_rows, gather_step
from routing_replay.kernels.gather.reference import (
    MISSING_ID,
    MISSING_ID_UINT8,
    RowFault,
    StepRing,
    gather_rows_reference,
)

__all__ = [
    "MISSING_ID",
    "MISSING_ID_UINT8",
    "RowFault",
    "StepRing",
    "gather_rows",
    "gather_rows_reference",
    "gather_step",
]
