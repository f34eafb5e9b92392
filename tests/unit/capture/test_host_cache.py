"""Rows belong to requests and to one life of a block."""

import numpy as np
import pytest

from routing_replay.capture import BlockRef, HostCache, RoutingSpec, RowPiece
from routing_replay.errors import CaptureError, ConfigError

SPEC = RoutingSpec(layer_ids=(1, 2), num_layers=3, num_experts=8, top_k=2)


def _rows(count: int, value: int) -> np.ndarray:
    return np.full((count, 2, 2), value, np.uint8)


def _cache() -> HostCache:
    return HostCache(SPEC, num_blocks=4, block_size=4)


def test_requests_keep_their_own_rows_of_a_shared_block():
    cache = _cache()
    block = BlockRef(1, 1)
    for name, value in (("a", 1), ("b", 2)):
        cache.begin(name)
        cache.append(name, 0, _rows(4, value), weights_version=0)
        cache.write_blocks([RowPiece("", 0, 4, 0, [block])], _rows(4, value), weights_version=0)
    assert (cache.take("a", 4).ids == 1).all()
    assert (cache.take("b", 4).ids == 2).all()


def test_prefix_hit_takes_the_rows_of_its_blocks():
    cache = _cache()
    rows = np.arange(32, dtype=np.uint8).reshape(8, 2, 2)
    cache.write_blocks(
        [RowPiece("", 0, 8, 0, [BlockRef(2, 1), BlockRef(0, 1)])], rows, weights_version=0
    )
    cache.begin("hit", [BlockRef(2, 1), BlockRef(0, 1)])
    taken = cache.take("hit", 8)
    assert taken.valid.all()
    assert np.array_equal(taken.ids.reshape(-1), np.arange(32))


def test_rows_of_a_step_go_to_the_blocks_of_their_requests():
    cache = _cache()
    rows = np.arange(32, dtype=np.uint8).reshape(8, 2, 2)
    first, second = [BlockRef(3, 1), BlockRef(1, 1)], [BlockRef(0, 1), BlockRef(2, 1)]
    pieces = [RowPiece("a", 0, 3, 0, first[:1]), RowPiece("b", 0, 4, 3, second[:1])]
    cache.write_blocks(pieces, rows[:7], weights_version=0)
    pieces = [RowPiece("b", 4, 1, 0, second[1:]), RowPiece("a", 3, 4, 1, first)]
    cache.write_blocks(pieces, rows[[7, 0, 1, 2, 3]], weights_version=1)
    cache.begin("first", first, num_rows=7)
    cache.begin("second", second, num_rows=5)
    assert np.array_equal(cache.take("first", 7).ids, rows[[0, 1, 2, 0, 1, 2, 3]])
    assert cache.take("first", 7).weights_version.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert np.array_equal(cache.take("second", 5).ids, rows[[3, 4, 5, 6, 7]])
    cache.write_blocks([], rows[:0], weights_version=2)


@pytest.mark.parametrize(("epoch", "count"), [(2, 4), (1, 3)])
def test_prefix_hit_refuses_rows_of_another_life_or_an_unfilled_block(epoch: int, count: int):
    cache = _cache()
    cache.write_blocks(
        [RowPiece("", 0, count, 0, [BlockRef(2, 1)])], _rows(count, 5), weights_version=0
    )
    with pytest.raises(
        CaptureError, match=rf"block 2 of epoch {epoch}.*{count} of 4 rows of epoch 1"
    ):
        cache.begin("hit", [BlockRef(2, epoch)])


def test_new_epoch_forgets_old_rows():
    cache = _cache()
    cache.write_blocks([RowPiece("", 0, 4, 0, [BlockRef(2, 1)])], _rows(4, 5), weights_version=0)
    cache.write_blocks([RowPiece("", 0, 1, 0, [BlockRef(2, 2)])], _rows(1, 6), weights_version=0)
    with pytest.raises(CaptureError, match="1 of 4 rows of epoch 2"):
        cache.begin("hit", [BlockRef(2, 2)])


def test_take_marks_rows_that_never_came():
    cache = _cache()
    cache.begin("a")
    cache.append("a", 2, _rows(200, 3), weights_version=0)
    taken = cache.take("a", 205)
    assert np.flatnonzero(~taken.valid).tolist() == [0, 1, 202, 203, 204]


def test_begin_twice_is_refused_and_free_forgets():
    cache = _cache()
    cache.begin("a")
    with pytest.raises(ConfigError, match="'a' is running already"):
        cache.begin("a")
    cache.free("a")
    cache.free("a")
    assert cache.num_requests == 0


@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_an_older_life_never_overwrite_those_of_a_newer_one(count: int):
    cache = _cache()
    new, other = BlockRef(2, 5), BlockRef(1, 1)
    cache.write_blocks([RowPiece("new", 0, 4, 0, [new])], _rows(4, 6), weights_version=2)
    rows = np.concatenate([_rows(count, 1), _rows(count, 3)])
    late = RowPiece("late", 0, count, 0, [BlockRef(2, 4)])
    cache.write_blocks([late, RowPiece("b", 0, count, count, [other])], rows, weights_version=1)
    cache.copy_block(other, BlockRef(2, 3))
    cache.begin("hit", [new])
    taken = cache.take("hit", 4)
    assert (taken.ids == 6).all()
    assert taken.weights_version.tolist() == [2] * 4
    assert cache.held_rows(other).tolist() == [True] * count + [False] * (4 - count)
    cache.begin("other", [other], num_rows=count)
    assert (cache.take("other", count).ids == 3).all()


def test_rows_of_a_request_that_does_not_run_are_dropped():
    cache = _cache()
    cache.append("gone", 0, _rows(2, 1), weights_version=0)
    cache.append_step([RowPiece("gone", 0, 1, 0, [])], _rows(1, 1), weights_version=0)
    cache.truncate("gone", 0)
    assert (cache.num_requests, cache.num_rows("gone")) == (0, 0)
    with pytest.raises(CaptureError, match="'gone' holds no rows"):
        cache.take("gone", 1)


def test_truncate_forgets_rows_gaps_and_versions_past_it():
    cache = _cache()
    cache.begin("a")
    cache.append("a", 0, _rows(2, 1), weights_version=1)
    cache.append("a", 4, _rows(2, 2), weights_version=2)
    cache.truncate("a", 9)
    assert cache.num_rows("a") == 6
    cache.truncate("a", 3)
    cache.append("a", 3, _rows(2, 3), weights_version=2)
    taken = cache.take("a", 5)
    assert taken.valid.tolist() == [True, True, False, True, True]
    assert taken.weights_version.tolist() == [1, 1, 0, 2, 2]
    assert taken.ids[[0, 3, 4], 0, 0].tolist() == [1, 3, 3]


def test_count_held_stops_at_the_first_block_that_is_not_here_in_full():
    cache = _cache()
    for block_id, count in ((0, 4), (1, 4), (2, 3), (3, 4)):
        piece = RowPiece("", 0, count, 0, [BlockRef(block_id, 1)])
        cache.write_blocks([piece], _rows(count, 1), weights_version=0)
    assert cache.count_held([BlockRef(i, 1) for i in range(4)]) == 2
    assert cache.count_held([BlockRef(0, 1), BlockRef(1, 2)]) == 1
    assert cache.count_held([BlockRef(3, 1), BlockRef(0, 1)]) == 2
    assert cache.count_held([]) == 0
