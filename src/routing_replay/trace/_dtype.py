"""The integer type that a trace stores expert ids in, and the array types of its fields."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from routing_replay.errors import TraceFormatError

IdArray: TypeAlias = npt.NDArray[np.uint8 | np.uint16]
IntArray: TypeAlias = npt.NDArray[np.integer]
ValidArray: TypeAlias = npt.NDArray[np.bool_]
DigestArray: TypeAlias = npt.NDArray[np.uint32]
WeightArray: TypeAlias = npt.NDArray[np.float16 | np.float32]

MAX_EXPERTS = 1 << 16


def trace_id_dtype(num_experts: int) -> np.dtype[np.uint8 | np.uint16]:
    """Return the dtype in which a trace of a model with `num_experts` experts stores its ids.

    A trace needs no sentinel (a missing row is marked in `valid`), so that 256 experts fit a byte.

    Args:
        num_experts: Routed experts of the model over all ranks, in [1, 65536].

    Returns:
        `uint8` for up to 256 experts, else `uint16`, in native byte order.

    Raises:
        TraceFormatError: `num_experts` is outside [1, 65536].
    """
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise TraceFormatError(
            f"num_experts = {num_experts} is outside [1, {MAX_EXPERTS}]; pass the number of routed"
            f" experts of the model, over all ranks"
        )
    return np.dtype(np.uint8) if num_experts <= 1 << 8 else np.dtype(np.uint16)
