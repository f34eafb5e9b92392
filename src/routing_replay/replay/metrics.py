"""How far a trainer is from the rollout that its tokens came from.

Log-probabilities are of the *sampled* tokens, natural logarithm, one per response token, from the
sampler and from the trainer at the same temperature. `d = logp_train - logp_rollout` and
`r = exp(d) = p_train / p_rollout` throughout. Everything is computed in float64 on the host.

Definitions: KL estimators as in J. Schulman, "Approximating KL divergence" (2020); k3, the extreme
fraction F(tau) and the routing mismatch as in "Rollout Routing Replay" (arXiv 2510.11370). In place
of the rollout's log-probabilities, those of a second pass of the same trainer (packed, say, against
one by one) give the control: what remains without any difference in routing engines.

Leave out prompt tokens, and the rows that `ReplayPlan.loss_mask` leaves out of the loss.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from routing_replay.errors import ConfigError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingMismatch:
    """Where two routings of the same tokens differ, as sets of experts.

    Attributes:
        pairs: Share of (token, layer) pairs with another set, in [0, 1].
        tokens: Share of tokens with another set in at least one layer, in [0, 1].
        per_layer: Share of tokens with another set, float64 `[L]`.
        overlap_per_layer: Mean share of a token's experts that both routings have, float64 `[L]`.
    """

    pairs: float
    tokens: float
    per_layer: FloatArray
    overlap_per_layer: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


def kl_k3_terms(logp_train: npt.ArrayLike, logp_rollout: npt.ArrayLike) -> FloatArray:
    """Compute the k3 term `r - 1 - log r` of every token, at least 0 each.

    Args:
        logp_train: Log-probabilities under the trainer, any shape.
        logp_rollout: Log-probabilities under the rollout, same shape.

    Returns:
        Terms in nats, float64, of the shape of the arguments; inf where r is above float64.

    Raises:
        ConfigError: Empty, of other shapes, not numbers, or not finite.
    """
    delta = _delta(logp_train, logp_rollout)
    with np.errstate(over="ignore"):
        return np.expm1(delta) - delta


def kl_k3(logp_train: npt.ArrayLike, logp_rollout: npt.ArrayLike) -> float:
    """Estimate KL(rollout || train) by k3: mean of `expm1(d) - d`.

    The tokens are sampled from the rollout, hence the direction. Unbiased, never negative, of low
    variance where the two are close.

    Args:
        logp_train: Log-probabilities under the trainer, any shape.
        logp_rollout: Log-probabilities under the rollout, same shape.

    Returns:
        The estimate in nats per token.

    Raises:
        ConfigError: Empty, of other shapes, not numbers, or not finite.
    """
    return float(kl_k3_terms(logp_train, logp_rollout).mean())


def kl_k1(logp_train: npt.ArrayLike, logp_rollout: npt.ArrayLike) -> float:
    """Estimate KL(rollout || train) by k1: mean of `-d`. Unbiased, may be negative.

    Args:
        logp_train: Log-probabilities under the trainer, any shape.
        logp_rollout: Log-probabilities under the rollout, same shape.

    Returns:
        The estimate in nats per token.

    Raises:
        ConfigError: Empty, of other shapes, not numbers, or not finite.
    """
    return float(-_delta(logp_train, logp_rollout).mean())


def extreme_fraction(
    logp_train: npt.ArrayLike, logp_rollout: npt.ArrayLike, *, tau: float = 2.0
) -> float:
    """Compute F(tau), the share of tokens with `max(r, 1/r) > tau`.

    Args:
        logp_train: Log-probabilities under the trainer, any shape.
        logp_rollout: Log-probabilities under the rollout, same shape.
        tau: Threshold, finite and at least 1.

    Returns:
        The share, in [0, 1].

    Raises:
        ConfigError: Empty, of other shapes, not numbers, or not finite; or `tau` is not accepted.
    """
    if not 1.0 <= tau < float("inf"):
        raise ConfigError(f"tau = {tau} is not accepted; it must be finite and at least 1")
    # On |d|, because 1/r overflows where r is tiny.
    return float((np.abs(_delta(logp_train, logp_rollout)) > np.log(tau)).mean())


def mean_abs_dlogp(logp_train: npt.ArrayLike, logp_rollout: npt.ArrayLike) -> float:
    """Compute the mean of `|d|`.

    Args:
        logp_train: Log-probabilities under the trainer, any shape.
        logp_rollout: Log-probabilities under the rollout, same shape.

    Returns:
        The mean, in nats per token.

    Raises:
        ConfigError: Empty, of other shapes, not numbers, or not finite.
    """
    return float(np.abs(_delta(logp_train, logp_rollout)).mean())


def mean_abs_dp(logp_train: npt.ArrayLike, logp_rollout: npt.ArrayLike) -> float:
    """Compute the mean of `|p_train - p_rollout|`, verl's `rollout_probs_diff_mean`.

    Args:
        logp_train: Log-probabilities under the trainer, any shape.
        logp_rollout: Log-probabilities under the rollout, same shape.

    Returns:
        The mean, in [0, 1] for log-probabilities.

    Raises:
        ConfigError: Empty, of other shapes, not numbers, not finite, or above 0.
    """
    _delta(logp_train, logp_rollout)
    train, rollout = (
        _probability("logp_train", logp_train),
        _probability("logp_rollout", logp_rollout),
    )
    return float(np.abs(train - rollout).mean())


def token_mult_prob_error(logp_train: npt.ArrayLike, logp_rollout: npt.ArrayLike) -> float:
    """Compute the mean of `exp(|d|)`, NeMo-RL's `token_mult_prob_error`: 1 where both agree.

    Args:
        logp_train: Log-probabilities under the trainer, any shape.
        logp_rollout: Log-probabilities under the rollout, same shape.

    Returns:
        The mean, at least 1; inf where one is above float64.

    Raises:
        ConfigError: Empty, of other shapes, not numbers, or not finite.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(np.abs(_delta(logp_train, logp_rollout))).mean())


def routing_mismatch(
    ids_a: npt.ArrayLike, ids_b: npt.ArrayLike, valid: npt.ArrayLike | None = None
) -> RoutingMismatch:
    """Compare two routings of the same tokens, as sets: the order of columns does not count.

    So traces that are not `ordered` compare too.

    Args:
        ids_a: Expert ids, integers `[tokens, L, K]`.
        ids_b: Expert ids, integers of the same shape.
        valid: Tokens to compare, bool `[tokens]`; `None` means all.

    Returns:
        Shares over the compared tokens.

    Raises:
        ConfigError: Another shape or dtype, nothing to compare, or a negative id in a compared row.
    """
    first, second = _ids("ids_a", ids_a), _ids("ids_b", ids_b)
    if first.shape != second.shape:
        raise ConfigError(
            f"ids_a has shape {list(first.shape)} but ids_b has {list(second.shape)}; compare two"
            f" routings of the same tokens, layers and top_k"
        )
    if valid is not None:
        mask = np.asarray(valid)
        if mask.dtype != np.bool_ or mask.shape != first.shape[:1]:
            raise ConfigError(
                f"valid has dtype {mask.dtype} and shape {list(mask.shape)}; it must be bool of"
                f" shape [{len(first)}]"
            )
        first, second = first[mask], second[mask]
    if first.size == 0:
        raise ConfigError(f"ids_a has no row to compare, of shape {list(np.shape(ids_a))}")
    for name, ids in (("ids_a", first), ("ids_b", second)):
        if (ids < 0).any():
            raise ConfigError(
                f"{name} holds {int(ids.min())} in a compared row; mark rows that were not captured"
                f" in valid"
            )
    differs = (np.sort(first, axis=-1) != np.sort(second, axis=-1)).any(axis=-1)  # [tokens, L]
    common = (first[..., :, None] == second[..., None, :]).any(axis=-1)  # [tokens, L, K]
    return RoutingMismatch(
        pairs=float(differs.mean()),
        tokens=float(differs.any(axis=1).mean()),
        per_layer=differs.mean(axis=0, dtype=np.float64),
        overlap_per_layer=common.mean(axis=(0, 2), dtype=np.float64),
    )


def paired_bootstrap_ratio(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Compute the ratio of two means over the same tokens, with a percentile-bootstrap interval.

    Whole groups are drawn with replacement, the same ones for both means, because the tokens of one
    sequence are not independent and the two terms of one token are not either.

    Args:
        numerator: Terms per token, `[tokens]`, such as `kl_k3_terms` with replay.
        denominator: Terms of the same tokens, `[tokens]`, such as those without.
        groups: Sequence of each token, integers `[tokens]`; at least two sequences.
        num_resamples: Bootstrap resamples, at least 1.
        seed: Seed of the resampling.
        confidence: Mass of the interval, in (0, 1).

    Returns:
        `mean(numerator) / mean(denominator)` and the interval.

    Raises:
        ConfigError: Empty, of other shapes, or not finite; an option is not accepted; or the
            denominator's mean is 0, over all tokens or in a resample.
    """
    top, bottom = _finite("numerator", numerator), _finite("denominator", denominator)
    labels = _labels(groups, num_tokens=top.size)
    if top.ndim != 1 or top.shape != bottom.shape:
        raise ConfigError(
            f"numerator has shape {list(top.shape)} and denominator {list(bottom.shape)}; both must"
            f" be [tokens], of the same tokens"
        )
    if type(num_resamples) is not int or num_resamples < 1:
        raise ConfigError(f"num_resamples = {num_resamples!r} is not accepted; at least 1")
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence = {confidence} is not accepted; it must be in (0, 1)")
    num_groups = int(labels.max()) + 1
    if num_groups < 2:
        raise ConfigError("groups holds one sequence; resampling sequences needs at least two")
    tops = np.bincount(labels, weights=top, minlength=num_groups)
    bottoms = np.bincount(labels, weights=bottom, minlength=num_groups)
    drawn = np.random.default_rng(seed).integers(num_groups, size=(num_resamples, num_groups))
    resampled = bottoms[drawn].sum(axis=1)
    num_zero = int((resampled == 0).sum())
    if bottoms.sum() == 0 or num_zero:
        raise ConfigError(
            f"denominator has mean 0 over all tokens or in {num_zero} of {num_resamples} resamples,"
            f" so the ratio is undefined; use more tokens, or terms that are rarely 0"
        )
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(tops[drawn].sum(axis=1) / resampled, (tail, 1.0 - tail))
    return Interval(value=float(tops.sum() / bottoms.sum()), low=float(low), high=float(high))


def _delta(logp_train: npt.ArrayLike, logp_rollout: npt.ArrayLike) -> FloatArray:
    """Return `logp_train - logp_rollout` of checked arguments."""
    train, rollout = _finite("logp_train", logp_train), _finite("logp_rollout", logp_rollout)
    if train.shape != rollout.shape:
        raise ConfigError(
            f"logp_train has shape {list(train.shape)} but logp_rollout has {list(rollout.shape)};"
            f" pass the log-probabilities of the same tokens"
        )
    return train - rollout


def _finite(name: str, values: npt.ArrayLike) -> FloatArray:
    """Return values in float64, checked to be finite numbers and at least one."""
    raw = np.asarray(values)
    if raw.dtype.kind not in "fiu":
        raise ConfigError(f"{name} has dtype {raw.dtype}; it must hold real numbers")
    array = raw.astype(np.float64)
    if array.size == 0:
        raise ConfigError(f"{name} is empty, of shape {list(array.shape)}; pass at least one token")
    bad = ~np.isfinite(array)
    if bad.any():
        where = [int(idx) for idx in np.argwhere(bad)[0]]
        raise ConfigError(
            f"{name}{where} = {array[tuple(where)]} is not finite ({int(bad.sum())} such of"
            f" {array.size}); leave out tokens without a log-probability"
        )
    return array


def _probability(name: str, logp: npt.ArrayLike) -> FloatArray:
    """Return the probabilities of checked log-probabilities."""
    array = _finite(name, logp)
    if (array > 0).any():
        raise ConfigError(
            f"{name} holds {array.max()}, which is above 0 and no log-probability; pass the natural"
            f" logarithm of the sampled tokens' probabilities"
        )
    return np.exp(array)


def _ids(name: str, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return ids in int64, checked to be integers `[tokens, L, K]`."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.ndim != 3:
        raise ConfigError(
            f"{name} has dtype {array.dtype} and shape {list(array.shape)}; it must hold integers of"
            f" shape [tokens, MoE layers, top_k]"
        )
    return array.astype(np.int64)


def _labels(groups: npt.ArrayLike, *, num_tokens: int) -> npt.NDArray[np.int64]:
    """Return the group of each token, renumbered without gaps."""
    array = np.asarray(groups)
    if array.dtype.kind not in "iu" or array.shape != (num_tokens,):
        raise ConfigError(
            f"groups has dtype {array.dtype} and shape {list(array.shape)}; it must hold integers of"
            f" shape [{num_tokens}], the sequence of each token"
        )
    return cast("npt.NDArray[np.int64]", np.unique(array, return_inverse=True)[1])
