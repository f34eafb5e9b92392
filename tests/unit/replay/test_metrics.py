import math
from collections.abc import Callable

import numpy as np
import pytest

from routing_replay.errors import ConfigError
from routing_replay.replay import (
    extreme_fraction,
    kl_k1,
    kl_k3,
    kl_k3_terms,
    mean_abs_dlogp,
    mean_abs_dp,
    paired_bootstrap_ratio,
    routing_mismatch,
    token_mult_prob_error,
)

PAIRED = [
    kl_k1,
    kl_k3,
    kl_k3_terms,
    extreme_fraction,
    mean_abs_dlogp,
    mean_abs_dp,
    token_mult_prob_error,
]


def test_kl_estimates_have_the_stated_direction():
    rng = np.random.default_rng(0)
    rollout, train = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.2, 0.3])
    sampled = rng.choice(3, size=200_000, p=rollout)
    truth = float((rollout * np.log(rollout / train)).sum())
    reverse = float((train * np.log(train / rollout)).sum())
    assert abs(truth - reverse) > 0.02
    logp_train, logp_rollout = np.log(train)[sampled], np.log(rollout)[sampled]
    # Standard errors of 200,000 samples: 1.1e-3 (k1), 0.9e-3 (k3).
    assert kl_k1(logp_train, logp_rollout) == pytest.approx(truth, abs=5e-3)
    assert kl_k3(logp_train, logp_rollout) == pytest.approx(truth, abs=5e-3)


def test_kl_k3_keeps_tiny_differences():
    # exp(d) - 1 - d in float32, or without expm1, is 0 or negative here.
    assert kl_k3([-1.0 + 1e-7], [-1.0]) == pytest.approx(5e-15, rel=0.05)
    assert kl_k3(np.float32([-1.5]), np.float32([-1.5])) == 0.0


def test_metrics_have_known_values():
    train, rollout = np.log([0.5, 0.2]), np.log([0.25, 0.2])
    assert kl_k3(train, rollout) == pytest.approx((2 - 1 - math.log(2)) / 2)
    assert kl_k1(train, rollout) == pytest.approx(-math.log(2) / 2)
    assert mean_abs_dlogp(train, rollout) == pytest.approx(math.log(2) / 2)
    assert mean_abs_dp(train, rollout) == pytest.approx(0.25 / 2)
    assert token_mult_prob_error(train, rollout) == pytest.approx((2 + 1) / 2)
    assert token_mult_prob_error(rollout, train) == pytest.approx((2 + 1) / 2)
    np.testing.assert_allclose(kl_k3_terms(train, rollout), [1 - math.log(2), 0.0], atol=1e-15)


def test_extreme_fraction_counts_both_sides_and_not_the_border():
    rollout = np.zeros(5)
    train = np.log([2.1, 1 / 2.1, 1.9, 1 / 1.9, 1.0])
    assert extreme_fraction(train, rollout) == 0.4
    assert extreme_fraction(train, rollout, tau=1.5) == 0.8
    assert extreme_fraction([math.log(2.0)], [0.0]) == 0.0
    assert extreme_fraction([-1e4], [0.0]) == 1.0


@pytest.mark.parametrize("metric", PAIRED)
@pytest.mark.parametrize(
    ("train", "rollout", "named"),
    [
        ([0.0, float("nan")], [0.0, 0.0], r"logp_train\[1\] = nan"),
        ([0.0, 0.0], [-float("inf"), 0.0], r"logp_rollout\[0\] = -inf"),
        ([0.0, 0.0], [0.0], r"logp_train has shape \[2\] .* \[1\]"),
        ([], [], "logp_train is empty"),
        (["a"], [0.0], "logp_train has dtype"),
    ],
    ids=["nan", "inf", "shape", "empty", "text"],
)
def test_metrics_refuse_bad_arguments(
    metric: Callable[..., object], train: list[object], rollout: list[object], named: str
):
    with pytest.raises(ConfigError, match=named):
        metric(train, rollout)


def test_metrics_of_ratios_beyond_float64_are_infinite():
    assert kl_k3([0.0], [-1e4]) == math.inf
    assert token_mult_prob_error([0.0], [-1e4]) == math.inf


def test_mean_abs_dp_refuses_what_is_no_log_probability():
    with pytest.raises(ConfigError, match=r"logp_rollout holds 0\.5, which is above 0"):
        mean_abs_dp([-1.0], [0.5])


@pytest.mark.parametrize("tau", [0.5, float("inf"), float("nan")])
def test_extreme_fraction_refuses_tau(tau: float):
    with pytest.raises(ConfigError, match="tau"):
        extreme_fraction([0.0], [0.0], tau=tau)


def test_routing_mismatch_compares_sets():
    ids = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 2], [1, 3]]])
    same = routing_mismatch(ids, ids[..., ::-1].astype(np.uint8))
    assert (same.pairs, same.tokens, same.per_layer.tolist()) == (0.0, 0.0, [0.0, 0.0])
    other = ids.copy()
    other[1, 1, 0] = 5
    other[2] = [[0, 3], [1, 2]]
    found = routing_mismatch(ids, other)
    assert found.pairs == 3 / 6
    assert found.tokens == 2 / 3
    np.testing.assert_array_equal(found.per_layer, [1 / 3, 2 / 3])
    # Row 1 keeps one of two experts in the second layer, row 2 one of two in each.
    np.testing.assert_allclose(found.overlap_per_layer, [2.5 / 3, 2 / 3])
    assert same.overlap_per_layer.tolist() == [1.0, 1.0]
    wide = routing_mismatch([[[0, 1, 2]], [[3, 4, 5]]], [[[2, 1, 7]], [[5, 3, 4]]])
    np.testing.assert_allclose(wide.overlap_per_layer, [5 / 6])
    masked = routing_mismatch(ids, other, valid=[True, True, False])
    assert (masked.pairs, masked.tokens) == (1 / 4, 1 / 2)


@pytest.mark.parametrize(
    ("a", "b", "valid", "named"),
    [
        (np.zeros((2, 1, 2)), np.zeros((2, 1, 2), int), None, "ids_a has dtype float64"),
        (np.zeros((2, 2), int), np.zeros((2, 1, 2), int), None, r"ids_a .* shape \[2, 2\]"),
        (np.zeros((2, 1, 2), int), np.zeros((3, 1, 2), int), None, r"ids_b has \[3, 1, 2\]"),
        (np.zeros((0, 1, 2), int), np.zeros((0, 1, 2), int), None, "no row"),
        (np.zeros((2, 1, 2), int), np.zeros((2, 1, 2), int), [False, False], "no row"),
        (np.zeros((2, 1, 2), int), np.zeros((2, 1, 2), int), [0, 1], "valid has dtype"),
        (np.zeros((2, 1, 2), int), np.zeros((2, 1, 2), int), [True], "valid"),
        (np.zeros((2, 1, 2), int), np.full((2, 1, 2), -1), [True, False], "ids_b holds -1"),
    ],
)
def test_routing_mismatch_refuses_bad_arguments(
    a: np.ndarray, b: np.ndarray, valid: object, named: str
):
    with pytest.raises(ConfigError, match=named):
        routing_mismatch(a, b, valid)


def test_paired_bootstrap_ratio_is_exact_where_terms_are_proportional():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(128), 10)
    bottom = rng.exponential(size=groups.size)
    interval = paired_bootstrap_ratio(bottom / 4, bottom, groups)
    assert interval.value == pytest.approx(0.25)
    assert interval.low == pytest.approx(0.25)
    assert interval.high == pytest.approx(0.25)


def test_paired_bootstrap_ratio_resamples_sequences():
    rng = np.random.default_rng(0)
    per_sequence = rng.exponential(size=128)
    top, bottom = np.repeat(per_sequence, 50), np.ones(128 * 50)
    groups = np.repeat(rng.permutation(1000)[:128], 50)
    by_sequence = paired_bootstrap_ratio(top, bottom, groups)
    by_token = paired_bootstrap_ratio(top, bottom, np.arange(top.size), num_resamples=200)
    assert by_sequence.low < by_sequence.value < by_sequence.high
    assert by_sequence.value == pytest.approx(by_token.value)
    # Correlated tokens: sqrt(50) times wider than if they were independent.
    ratio = (by_sequence.high - by_sequence.low) / (by_token.high - by_token.low)
    assert 5.0 < ratio < 10.0
    # Theory: +-1.96 * std / sqrt(128).
    half = (by_sequence.high - by_sequence.low) / 2
    assert half == pytest.approx(1.96 * per_sequence.std() / math.sqrt(128), rel=0.15)


def test_paired_bootstrap_ratio_depends_on_the_seed_alone():
    rng = np.random.default_rng(0)
    arguments = rng.random(60), rng.random(60) + 0.1, np.repeat(np.arange(6), 10)
    assert paired_bootstrap_ratio(*arguments) == paired_bootstrap_ratio(*arguments)
    assert paired_bootstrap_ratio(*arguments) != paired_bootstrap_ratio(*arguments, seed=1)
    wide = paired_bootstrap_ratio(*arguments, confidence=0.99)
    narrow = paired_bootstrap_ratio(*arguments, confidence=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"numerator": [1.0, float("nan"), 1.0]}, "numerator"),
        ({"denominator": [1.0, 1.0]}, "denominator"),
        ({"denominator": [0.0, 0.0, 0.0]}, "denominator has mean 0"),
        ({"denominator": [1.0, 1.0, 0.0]}, "resamples"),
        ({"groups": [0, 1]}, "groups"),
        ({"groups": [0.0, 1.0, 1.0]}, "groups"),
        ({"groups": [3, 3, 3]}, "at least two"),
        ({"num_resamples": 0}, "num_resamples"),
        ({"confidence": 1.0}, "confidence"),
        ({"numerator": np.ones((3, 1)), "denominator": np.ones((3, 1))}, "numerator"),
    ],
)
def test_paired_bootstrap_ratio_refuses_bad_arguments(change: dict[str, object], named: str):
    arguments = {"numerator": [1.0] * 3, "denominator": [1.0] * 3, "groups": [0, 0, 1]} | change
    with pytest.raises(ConfigError, match=named):
        paired_bootstrap_ratio(**arguments)
