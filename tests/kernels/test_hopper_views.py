"""The weights as the tensor maps of the Hopper engine see them: addresses checked one by one, without a GPU."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from routing_replay.kernels.experts._hopper import (
    _box,  # pyright: ignore[reportPrivateUsage]
    _group,  # pyright: ignore[reportPrivateUsage]
    _weight_view,  # pyright: ignore[reportPrivateUsage]
)
from routing_replay.kernels.experts.config import GemmTile
from routing_replay.kernels.permutation import PermutationShape


@pytest.mark.parametrize("rows", [64, 128, 256])
def test_gated_rows_alternate_by_eight(rows: int):
    experts, half, width = 3, 40, 24
    tile = GemmTile(rows=rows, depth=64, stages=2, warps=4)
    shape, strides, block = _weight_view(experts, 2 * half, width, tile, is_gated=True)
    assert shape == [experts, half // 8, 2, 8, width]
    assert block == [1, rows // 16, 2, 8, 64]
    weights = torch.arange(experts * 2 * half * width).reshape(experts, 2 * half, width)
    for expert, group, part, row in itertools.product(range(experts), range(half // 8), (0, 1), range(8)):  # fmt: skip
        at = sum(i * s for i, s in zip((expert, group, part, row), strides[:4], strict=True))
        # Part 0 is the gate of column 8 * group + row, part 1 its up.
        assert at == weights[expert, part * half + 8 * group + row, 0]
    assert strides[4] == 1


def test_plain_rows_follow_each_other():
    tile = GemmTile(rows=128, depth=64, stages=2, warps=4)
    shape, strides, block = _weight_view(3, 40, 24, tile, is_gated=False)
    assert (shape, strides, block) == ([3, 40, 24], [960, 24, 1], [1, 128, 64])


def test_large_weights_have_strides_beyond_32_bits():
    tile = GemmTile(rows=128, depth=64, stages=2, warps=4)
    _, strides, _ = _weight_view(2, 2 * 32768, 65536, tile, is_gated=True)
    assert strides[0] == 2 * 32768 * 65536 > 2**31


@pytest.mark.parametrize(("tokens", "box"), [(16, 16), (32, 16), (64, 32), (128, 64), (256, 128)])
def test_half_a_tile_is_left_out_together(tokens: int, box: int):
    assert _box(tokens) == box


@pytest.mark.parametrize(
    ("tokens", "experts", "local", "expert_bytes", "group"),
    [
        (4096, 8, 8, 1 << 20, 8),
        (4096, 8, 2, 1 << 20, 8),
        (1024, 8, 8, 1 << 20, 1),
        (1024, 8, 8, 100 << 20, 8),
        (256, 8, 8, 100 << 20, 1),
        (4096, 128, 128, 6 << 20, 1),
        (0, 8, 8, 100 << 20, 1),
    ],
)
def test_tiles_share_blocks_where_an_expert_has_many_or_its_weights_do_not_stay_in_the_cache(
    tokens: int, experts: int, local: int, expert_bytes: int, group: int
):
    shape = PermutationShape(
        num_tokens=tokens,
        top_k=2,
        num_experts=experts,
        local_expert_offset=0,
        num_local_experts=local,
        tile_tokens=128,
    )
    assert _group(shape, expert_bytes) == group
