"""Triton 3.6's interpreter, made exact where it is not. For processes that do nothing else."""

# ruff: noqa: ANN401

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _widened(values: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    if dtype.scalar == tl.bfloat16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def repair_interpreter(*, uniform_rows: bool = False) -> None:
    """Take values of a kernel as bounds of loops, as NumPy 2.4 no longer does; round to bfloat16 instead of truncating, and
    multiply bfloat16 values instead of their bits.

    Args:
        uniform_rows: Products of a row do not depend on where it stands, as those of tensor cores; those of a BLAS do. Slow.
    """
    patch_tensor = interpreter._patch_lang_tensor
    convert = interpreter._convert_float

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_exactly(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return _rounded(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return _widened(values, source)
        return convert(values, source, target, mode)

    def dot(_self: Any, a: Any, b: Any, d: Any, *_: object) -> Any:
        left, right = _widened(a.data, a.dtype), _widened(b.data, b.dtype)
        products = np.einsum("ij,jk->ik", left, right) if uniform_rows else left @ right
        return interpreter.TensorHandle(products + d.data, d.dtype.scalar)

    interpreter._patch_lang_tensor = patch
    interpreter._convert_float = convert_exactly
    interpreter.InterpreterBuilder.create_dot = dot
