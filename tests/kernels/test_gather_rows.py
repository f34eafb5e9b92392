"""The gather copies, flags and resets; the Triton kernel (interpreted) does the same as the reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels import RowFault, gather_rows
from routing_replay.kernels.gather import StepRing, gather_step


def _cache(layers: int, rows: int, top_k: int, num_experts: int) -> Tensor:
    ids = torch.rand(layers, rows, num_experts).argsort(-1)[..., :top_k]
    return ids.to(torch.int16).contiguous()


def _gather(
    cache: Tensor, row_idx: Tensor, num_reset: int, num_experts: int
) -> tuple[Tensor, Tensor]:
    dtype = torch.uint8 if num_experts <= 255 else torch.int16
    rows = torch.full((len(row_idx) + 2, cache.shape[0], cache.shape[2]), 77, dtype=dtype)
    flags = torch.full((len(row_idx) + 2,), 77, dtype=torch.uint8)
    gather_rows(
        cache, row_idx, rows_out=rows, flags_out=flags, num_reset=num_reset, num_experts=num_experts
    )
    assert (rows[len(row_idx) :] == 77).all()
    assert (flags[len(row_idx) :] == 77).all()
    return rows[: len(row_idx)], flags[: len(row_idx)]


@pytest.mark.parametrize("num_experts", [8, 255, 256, 512])
def test_gather_rows_copies_and_resets_the_bucket(num_experts: int):
    cache = _cache(3, 10, 4, num_experts)
    before = cache.clone()
    row_idx = torch.tensor([4, 0, 2])
    rows, flags = _gather(cache, row_idx, 6, num_experts)
    assert torch.equal(rows.long(), before[:, row_idx].transpose(0, 1).long())
    assert (flags == 0).all()
    assert (cache[:, :6] == -1).all()
    assert torch.equal(cache[:, 6:], before[:, 6:])
    # What was reset can never pass again.
    _, flags = _gather(cache, row_idx, 6, num_experts)
    assert (flags == int(RowFault.MISSING)).all()


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        ((1, 2, -1), RowFault.MISSING),
        ((1, 2, 8), RowFault.OUT_OF_RANGE),
        ((-2, 1, 2), RowFault.OUT_OF_RANGE),
        ((1, 2, 1), RowFault.DUPLICATE),
        ((-1, -1, 3), RowFault.MISSING),
        ((9, 9, -1), RowFault.MISSING | RowFault.OUT_OF_RANGE | RowFault.DUPLICATE),
    ],
)
def test_gather_rows_flags_one_bad_layer(ids: tuple[int, ...], fault: RowFault):
    cache = _cache(4, 5, 3, 8)
    cache[2, 3] = torch.tensor(ids, dtype=torch.int16)
    rows, flags = _gather(cache, torch.arange(5), 5, 8)
    assert flags.tolist() == [0, 0, 0, int(fault), 0]
    assert rows[3, 2].tolist() == [i if 0 <= i < 8 else 255 for i in ids]


def test_gather_step_takes_the_first_rows_into_a_larger_slot():
    cache = _cache(3, 10, 4, 16)
    cache[1, 2, 3] = -1
    before = cache.clone()
    rows = torch.full((9, 3, 4), 77, dtype=torch.uint8)
    flags = torch.full((9,), 77, dtype=torch.uint8)
    gather_step(cache, num_rows=4, num_reset=8, rows_out=rows, flags_out=flags, num_experts=16)
    expected = before[:, :4].transpose(0, 1)
    assert torch.equal(rows[:4].long(), torch.where(expected < 0, 255, expected).long())
    assert flags.tolist() == [0, 0, int(RowFault.MISSING), 0, *[77] * 5]
    assert (rows[4:] == 77).all()
    assert (cache[:, :8] == -1).all()
    assert torch.equal(cache[:, 8:], before[:, 8:])
    gather_step(cache, num_rows=0, num_reset=0, rows_out=rows, flags_out=flags, num_experts=16)
    assert torch.equal(cache[:, 8:], before[:, 8:])


@pytest.mark.parametrize("num_experts", [16, 300])
@pytest.mark.parametrize("step", [0, 2, 10_000_000_001])
def test_gather_step_finds_its_slot_on_the_device(num_experts: int, step: int):
    cache = _cache(3, 6, 4, num_experts)
    before = cache.clone()
    dtype = torch.uint8 if num_experts <= 255 else torch.int16
    size, index = 32 + 8 * 3 * 4 * dtype.itemsize, step % 3
    ring = torch.full((3, size), 77, dtype=torch.uint8)
    flags, rows = ring[0, 10:16], ring[0, 32:].view(dtype).view(8, 3, 4)
    stamp = ring[0, 16:24].view(torch.int64)
    place = StepRing(torch.tensor([step]), 3, size, stamp)
    gather_step(cache, num_rows=6, num_reset=6, rows_out=rows, flags_out=flags, num_experts=num_experts, ring=place)  # fmt: skip
    at = ring[index]
    assert torch.equal(at[32:].view(dtype).view(8, 3, 4)[:6].long(), before.transpose(0, 1).long())
    assert (at[10:16] == 0).all()
    assert at[16:24].view(torch.int64).tolist() == [step]
    assert (at[:10] == 77).all()
    assert (at[24:32] == 77).all()
    assert (ring[[other for other in range(3) if other != index]] == 77).all()
    assert (cache == -1).all()


def test_gather_rows_without_rows_still_resets():
    cache = _cache(2, 4, 2, 8)
    _gather(cache, torch.empty(0, dtype=torch.int64), 4, 8)
    assert (cache == -1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": torch.zeros(2, 4, 2)}, "cache is torch.float32"),
        (
            {"cache": torch.zeros(4, 2, dtype=torch.int16)},
            r"cache has shape \(4, 2\); accepted is \[L, N, K\]",
        ),
        ({"row_idx": torch.zeros(3, dtype=torch.int32)}, "row_idx is torch.int32"),
        ({"rows_out": torch.zeros(2, 2, 2, dtype=torch.uint8)}, r"accepted is \[>= 3, 2, 2\]"),
        ({"num_experts": 256}, "rows_out is torch.uint8; accepted is torch.int16"),
        ({"flags_out": torch.zeros(2, dtype=torch.uint8)}, r"flags_out .*\[>= 3\]"),
        ({"num_reset": 2}, "num_reset=2 is outside"),
        ({"num_reset": 5}, "num_reset=5 is outside"),
    ],
)
def test_gather_rows_refuses_bad_arguments(change: dict[str, object], message: str):
    arguments: dict[str, object] = {
        "cache": torch.zeros(2, 4, 2, dtype=torch.int16),
        "row_idx": torch.zeros(3, dtype=torch.int64),
        "rows_out": torch.zeros(3, 2, 2, dtype=torch.uint8),
        "flags_out": torch.zeros(3, dtype=torch.uint8),
        "num_reset": 4,
        "num_experts": 8,
    }
    with pytest.raises(ConfigError, match=message):
        gather_rows(**{**arguments, **change})  # pyright: ignore[reportArgumentType]


def test_gather_rows_passes_opcheck():
    rows, flags = torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)
    arguments = (_cache(2, 4, 2, 8), torch.tensor([0, 2, 1]), rows, flags, 4, 8)
    torch.library.opcheck(torch.ops.routing_replay.gather_rows.default, arguments)


_INTERPRETED = """
import torch
from routing_replay.kernels.gather import StepRing, gather_rows_reference
from routing_replay.kernels.gather._triton import launch_gather_rows, launch_gather_step

torch.manual_seed(0)
seen = set()
for layers, num_rows, top_k, num_experts in ((3, 40, 4, 16), (2, 33, 3, 300), (1, 5, 1, 8), (2, 270, 2, 8)):
    cache = torch.randint(-2, num_experts + 1, (layers, num_rows, top_k)).to(torch.int16)
    distinct = torch.rand(layers, num_rows, num_experts).argsort(-1)[..., :top_k].to(torch.int16)
    cache[:, ::2] = distinct[:, ::2]
    cache[0, 2] = distinct[0, 2, 0]  # where K > 1: the same id throughout
    row_idx = torch.randperm(num_rows)[: num_rows - 2]
    dtype = torch.uint8 if num_experts <= 255 else torch.int16
    results = []
    for function in (gather_rows_reference, launch_gather_rows):
        own = cache.clone()
        rows = torch.full((num_rows, layers, top_k), 77, dtype=dtype)
        flags = torch.full((num_rows,), 77, dtype=torch.uint8)
        function(own, row_idx, rows, flags, num_rows - 1, num_experts)
        results.append((own, rows, flags))
    assert all(torch.equal(a, b) for a, b in zip(*results)), (layers, num_rows, top_k, num_experts)
    seen |= set(results[0][2][: num_rows - 2].tolist())
    # The step's own form: rows in order, live ones gathered, padding rows of the bucket reset with them.
    live, bucket = num_rows - 2, num_rows - 1
    own, rows, flags = cache.clone(), torch.full_like(rows, 77), torch.full_like(flags, 77)
    launch_gather_step(own, live, rows, flags, bucket, num_experts)
    expected = cache.clone(), torch.full_like(rows, 77), torch.full_like(flags, 77)
    gather_rows_reference(expected[0], slice(live), expected[1], expected[2], bucket, num_experts)
    found = (own, rows, flags)
    assert all(torch.equal(a, b) for a, b in zip(found, expected)), (layers, num_rows)
    # And as a part of a graph, into the slot of the step that memory names.
    size = 16 * -(-bucket // 16) + 16 + 16 * -(-rows.nbytes // 16)
    ring, base = torch.full((3, size), 77, dtype=torch.uint8), 16 * -(-bucket // 16) + 16
    outputs = [at[base : base + rows.nbytes].view(dtype).view(rows.shape) for at in ring]
    stamps = [at[base - 16 : base - 8].view(torch.int64) for at in ring]
    place = StepRing(torch.tensor([10_000_000_001]), 3, size, stamps[0])
    launch_gather_step(cache.clone(), live, outputs[0], ring[0, base - 16 - bucket : base - 16], bucket, num_experts, ring=place)
    assert torch.equal(outputs[2][:live], expected[1][:live]) and torch.equal(ring[2, base - 16 - bucket : base - 16], expected[2][:bucket])
    assert stamps[2].tolist() == [10_000_000_001]
    end = base + live * rows[0].nbytes
    assert (ring[:2] == 77).all() and (ring[2, : base - 16 - bucket] == 77).all() and (ring[2, end:] == 77).all()
    own = cache.clone()
    launch_gather_step(own, 0, rows, flags, 2, num_experts)
    assert torch.equal(rows, found[1]) and (own[:, :2] == -1).all() and torch.equal(own[:, 2:], cache[:, 2:])
assert seen >= {0, 1, 2, 3, 4, 5, 6, 7}, seen
print("equal")
"""


def test_triton_gather_equals_the_reference_in_the_interpreter(tmp_path: Path):
    # The interpreter is chosen when a kernel is defined, so it needs a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
