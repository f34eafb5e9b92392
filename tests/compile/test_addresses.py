"""Addresses of the experts' kernels past 2^31 elements: a stride is 64 bits wide before anything is multiplied by it."""

import re
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from routing_replay.kernels.experts import _triton, _triton_combine

STRIDES = ("x_stride", "expert_stride", "row_stride", "out_stride", "rows_stride")
CASES = {
    f"{module.__name__.rsplit('.', 1)[1]}:{case[0]}": case
    for module in (_triton, _triton_combine)
    for case in module.compile_cases()
    if case[0] in ("decode_1", "prefill_2", "gpt_oss", "odd_large", "decode", "odd")
}


def _ttir(kernel: triton.JITFunction[Any], signature: dict[str, str], constexprs: dict[str, Any]) -> str:  # fmt: skip
    types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    ordered = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=ordered, constexprs=constexprs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]


def _narrow_uses(ttir: str) -> list[str]:
    """Lines that use a stride of 32 bits otherwise than to widen it."""
    uses: list[str] = []
    for stride in STRIDES:
        for line in ttir.splitlines():
            is_use = re.search(rf"%{stride}\b(?!:)", line) and "tt.func" not in line
            if is_use and "i64" not in line:
                uses.append(line.strip())
    return uses


@triton.jit
def _narrow_kernel(out_ptr, out_stride):  # noqa: ANN001
    tl.store(out_ptr + tl.program_id(0) * out_stride, 1.0)


def test_checker_sees_a_narrow_address():
    ttir = _ttir(_narrow_kernel, {"out_ptr": "*fp32", "out_stride": "i32"}, {})
    assert len(_narrow_uses(ttir)) == 1


@pytest.mark.parametrize("name", CASES)
def test_strides_are_widened_before_they_multiply(name: str):
    _, kernel, signature, constexprs = CASES[name]
    ttir = _ttir(kernel, signature, constexprs)
    used = [stride for stride in STRIDES if f"%{stride}" in ttir]
    assert "out_stride" in used
    assert _narrow_uses(ttir) == []
