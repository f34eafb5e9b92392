"""How a multiprocessor's memory is shared out between L1 cache and shared memory while a kernel runs."""

import ctypes
from functools import cache
from typing import Protocol

__all__ = ["prefer_l1_cache"]

_PREFERRED_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_MOST_L1 = 0


class _Compiled(Protocol):
    """What a launch of Triton's returns."""

    function: int


def prefer_l1_cache(kernel: _Compiled | None) -> None:
    """Ask for as much L1 cache as a kernel's shared memory leaves, from its next launch on.

    A kernel that says nothing runs with the split that others have left, which may be one of little L1 cache; a kernel that
    streams has its loads in flight there. What that costs a decode step: docs/results/engine_l1_cache.json.

    Args:
        kernel: What its launch returned; None, from Triton's interpreter, is ignored.

    Runtime: one call of the driver for each compiled kernel, without a sync; a wish, which the driver may ignore. Graphs
        recorded before it keep the split that they were recorded with.
    """
    if kernel is not None:
        _ask_for_l1_cache(kernel.function)


@cache
def _ask_for_l1_cache(function: int) -> None:
    _driver().cuFuncSetAttribute(ctypes.c_void_p(function), _PREFERRED_CARVEOUT, _MOST_L1)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
