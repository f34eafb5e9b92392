"""A few rows times a weight: the interpreted kernel equals plain torch, and who takes it is decided by shapes alone."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from routing_replay.errors import ConfigError
from routing_replay.kernels import add_rms_norm, l1_cache, linear, norm_linear
from routing_replay.kernels.linear import takes_few_rows
from routing_replay.kernels.linear.few_rows import (
    FEW_ROWS,
    FewRowsTile,
    choose_few_rows_tile,
    normalises_in_place,
)

SCRIPT = Path(__file__).with_name("interpreted_linear.py")


def test_interpreted_kernel_equals_plain_torch(tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_norm_linear_is_linear_of_the_norm(
    has_residual: bool, has_bias: bool, batch_invariant: bool
):
    for dtype in (torch.bfloat16, torch.float32):
        x, other = torch.randn(2, 3, 16).to(dtype)
        residual = other if has_residual else None
        norm_weight, weight = torch.randn(16).to(dtype), torch.randn(5, 16).to(dtype)
        bias = torch.randn(5).to(dtype) if has_bias else None
        out, normed, total = norm_linear(
            x, residual, norm_weight, 1e-6, weight, bias, batch_invariant=batch_invariant
        )
        expected, expected_total = add_rms_norm(x, residual, norm_weight, 1e-6)
        assert torch.equal(normed, expected)
        assert torch.equal(total, expected_total)
        assert torch.equal(out, linear(expected, weight, bias, batch_invariant=batch_invariant))
        assert not torch.equal(out, linear(total, weight, bias, batch_invariant=batch_invariant))


@pytest.mark.parametrize(("norms", "adds"), [(False, False), (True, False), (True, True)])
def test_op_passes_opcheck(norms: bool, adds: bool):
    x, residual = torch.randn(2, 3, 8).bfloat16()
    weight, bias = torch.randn(5, 8).bfloat16(), torch.randn(5).bfloat16()
    norm_weight = torch.randn(8).bfloat16() if norms else None
    arguments = (x, weight, bias, residual if adds else None, norm_weight, 1e-6, torch.float32, "reference")  # fmt: skip
    torch.library.opcheck(
        torch.ops.routing_replay.multiply_few_rows.default,
        arguments,
        # It has no gradients, and nothing else for AOT dispatch to trace.
        test_utils=("test_schema", "test_faketensor"),
    )


def test_op_equals_its_parts():
    x, residual = torch.randn(2, 3, 8).bfloat16()
    weight, norm_weight = torch.randn(5, 8).bfloat16(), torch.randn(8).bfloat16()
    op = torch.ops.routing_replay.multiply_few_rows
    out, normed, total = op(x, weight, None, residual, norm_weight, 1e-6, torch.float32, "reference")  # fmt: skip
    expected, expected_total = add_rms_norm(x, residual, norm_weight, 1e-6)
    assert torch.equal(normed, expected)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(out, expected.float() @ weight.float().t())


def test_cpu_keeps_its_own_gemms():
    assert not takes_few_rows(torch.zeros(1, 8).bfloat16(), torch.zeros(4, 8).bfloat16())


@pytest.mark.parametrize(
    ("rows", "columns", "width", "tile"),
    [
        (1, 5120, 2048, FewRowsTile(columns=4, warps=4)),
        (1, 2048, 4096, FewRowsTile(columns=2, warps=4)),
        (1, 128, 2048, FewRowsTile(columns=4, warps=4)),
        (4, 128, 2048, FewRowsTile(columns=4, warps=4)),
        (2, 64, 2048, FewRowsTile(columns=2, warps=4)),
        (2, 2048, 4096, FewRowsTile(columns=2, warps=4)),
        (4, 2048, 4096, FewRowsTile(columns=2, warps=8)),
        (4, 151_936, 2048, FewRowsTile(columns=4, warps=4)),
        (1, 151_936, 2048, FewRowsTile(columns=4, warps=4)),
        (1, 4096, 16_384, FewRowsTile(columns=1, warps=8)),
        (0, 5120, 2048, None),
        (FEW_ROWS + 1, 5120, 2048, None),
        (1, 5120, 2049, None),
        (1, 5120, 16_392, None),
    ],
)
def test_tile_is_chosen_by_shapes(rows: int, columns: int, width: int, tile: FewRowsTile | None):
    assert choose_few_rows_tile(rows, columns, width) == tile


@pytest.mark.parametrize(
    ("rows", "columns", "is_in_place"),
    [(1, 5120, True), (2, 5120, True), (3, 5120, False), (4, 512, True), (4, 513, False), (5, 128, False)],
)  # fmt: skip
def test_norm_is_in_place_where_it_pays(rows: int, columns: int, is_in_place: bool):
    assert normalises_in_place(rows, columns, 2048) is is_in_place


@pytest.mark.parametrize("changes", [{"columns": 0}, {"columns": 3}, {"warps": 6}])
def test_tile_refuses_bad_sizes(changes: dict[str, int]):
    with pytest.raises(ConfigError, match="accepted are powers of two"):
        FewRowsTile(**{"columns": 4, "warps": 4, **changes})


def test_driver_is_asked_once_for_a_kernel(monkeypatch: pytest.MonkeyPatch):
    class Driver:
        def __init__(self) -> None:
            self.asked: list[tuple[int | None, int, int]] = []

        def cuFuncSetAttribute(self, function: ctypes.c_void_p, attribute: int, value: int) -> None:
            self.asked.append((function.value, attribute, value))

    class Compiled:
        def __init__(self, function: int) -> None:
            self.function = function

    driver = Driver()
    monkeypatch.setattr(l1_cache, "_driver", lambda: driver)
    for kernel in (Compiled(0xA11CE), None, Compiled(0xB0B), Compiled(0xA11CE)):
        l1_cache.prefer_l1_cache(kernel)
    preferred_carveout, most_l1 = 9, 0  # of cuda.h
    assert driver.asked == [
        (0xA11CE, preferred_carveout, most_l1),
        (0xB0B, preferred_carveout, most_l1),
    ]
