"""Sets and ranks are one to one, in few bits, for every shape that models have."""

from itertools import combinations
from math import comb, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_replay.errors import TraceFormatError
from routing_replay.trace._bits import pack_fields, unpack_fields
from routing_replay.trace._set_code import LIMB_BITS, rank_width, set_code, sort_columns

SHAPES = [
    (128, 8),
    (256, 8),
    (512, 10),
    (896, 16),
    (384, 8),
    (60, 4),
    (8, 2),
    (256, 1),
    (65536, 4),
    (2000, 30),
]


def _limbs(value: int, count: int) -> list[list[int]]:
    return [[(value >> (LIMB_BITS * limb)) & ((1 << LIMB_BITS) - 1)] for limb in range(count)]


@pytest.mark.parametrize(
    ("experts", "top_k"), [(5, 2), (6, 6), (7, 1), (9, 4), (1, 1), (12, 5), (12, 11)]
)
def test_every_set_has_its_own_rank_and_none_is_left_out(experts: int, top_k: int):
    code = set_code(experts, top_k)
    sets = np.array(list(combinations(range(experts), top_k))).T
    ranks = code.rank(sets)
    assert sorted(ranks[0].tolist()) == list(range(comb(experts, top_k)))
    assert code.first_too_large(ranks) is None
    assert np.array_equal(code.unrank(ranks.copy()), sets)


def test_rank_is_the_sum_of_binomials():
    for experts, top_k in ((128, 8), (896, 16)):
        code = set_code(experts, top_k)
        ids = np.sort(np.random.default_rng(1).permutation(experts)[:top_k])
        expected = sum(comb(int(c), k) for k, c in enumerate(ids, start=1))
        assert code.rank(ids[::-1, None].copy()).tolist() == _limbs(expected, code.num_limbs)


@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
def test_random_and_extreme_sets_come_back(experts: int, top_k: int):
    code = set_code(experts, top_k)
    rng = np.random.default_rng(0)
    ids = np.array([rng.choice(experts, top_k, replace=False) for _ in range(500)]).T
    ids[:, 0], ids[:, 1] = np.arange(top_k), np.arange(experts - top_k, experts)
    ranks = code.rank(ids)
    fields = pack_fields(ranks, code.width)
    assert len(fields) == -(-500 * code.width // 8)
    read = unpack_fields(fields, 500, code.width, code.num_limbs)
    assert np.array_equal(read, ranks)
    assert np.array_equal(code.unrank(read), np.sort(ids, axis=0))


@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
def test_neighbours_of_every_binomial_come_back(experts: int, top_k: int):
    # Where rounding of a rank to float64 could lead to the wrong column.
    code = set_code(experts, top_k)
    total = comb(experts, top_k)
    picked = {0, 1, total - 1} | {
        comb(c, top_k) + step
        for c in range(top_k, experts, max(1, experts // 97))
        for step in (-1, 0, 1)
    }
    values = sorted(value for value in picked if 0 <= value < total)
    ranks = np.concatenate([np.array(_limbs(value, code.num_limbs)) for value in values], axis=1)
    assert np.array_equal(code.rank(code.unrank(ranks.copy())), ranks)
    assert code.first_too_large(ranks) is None
    for value in (total, total + 1):
        above = np.array(_limbs(value, code.num_limbs))
        if value >> (LIMB_BITS * code.num_limbs) == 0:
            assert code.first_too_large(np.concatenate([ranks, above], axis=1)) == len(values)


@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (256, 8), (512, 10), (896, 16)])
def test_width_is_within_three_percent_of_the_entropy(experts: int, top_k: int):
    assert set_code(experts, top_k).width <= 1.03 * log2(comb(experts, top_k))


@given(
    st.integers(1, 9).flatmap(lambda k: st.lists(st.permutations(range(k)), min_size=1, max_size=5))
)
def test_sort_columns_sorts(columns: list[list[int]]):
    array = np.array(columns).T
    assert np.array_equal(np.array(sort_columns(array)), np.sort(array, axis=0))


@pytest.mark.parametrize(
    ("experts", "top_k", "message"),
    [
        (65536, 100, "num_experts = 65536 with top_k = 100 needs ranks of .* use codec raw"),
        (1000, 500, r"top_k = 500 \(num_experts = 1000\) .* use codec raw"),
        (300, 129, r"top_k = 129 .* use codec raw"),
        (65536, 32768, "top_k = 32768 .* use codec raw"),
    ],
)
def test_codes_with_too_large_tables_are_refused(experts: int, top_k: int, message: str):
    for build in (set_code, rank_width):
        with pytest.raises(TraceFormatError, match=message):
            build(experts, top_k)
