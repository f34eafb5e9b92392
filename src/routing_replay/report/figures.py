"""What a report shows of an audit, in words and numbers, however it is drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routing_replay.report.audit import AuditDetails, AuditResult

__all__ = ["Histogram", "WorstToken", "figure_rows", "ratio_histogram", "worst_tokens"]

_CONTEXT_TOKENS = 14
_LABELS = (
    ("routing mismatch, (token, layer) pairs", "mismatch_pairs", ".2%"),
    ("routing mismatch, tokens", "mismatch_tokens", ".2%"),
    ("KL (k3), nats a token", "kl_k3", ".2e"),
    ("KL (k1), nats a token", "kl_k1", ".2e"),
    ("mean |Δ logp|", "mean_abs_dlogp", ".2e"),
    ("mean |Δ p|", "mean_abs_dp", ".2e"),
    ("mean exp |Δ logp|", "token_mult_prob_error", ".6f"),
    ("F(2): probability off by more than 2x", "f2", ".2e"),
)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of log probability ratios in equal bins.

    Attributes:
        edges: `[bins + 1]`, of log(p_trainer / p_rollout).
        native: Tokens in each bin, trainer routing natively.
        replayed: Tokens in each bin, trainer replaying.
    """

    edges: NDArray[np.float64]
    native: NDArray[np.int64]
    replayed: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """A token on which the native trainer and the rollout disagree most.

    Attributes:
        sample: Index of its sample.
        position: Its index in the sample.
        before: Text before it.
        token: Its text.
        after: Text after it.
        rollout: Its logprob at the rollout.
        native: At the trainer that routes natively.
        replayed: At the trainer that replays.
        num_other_layers: MoE layers that routed the row before it otherwise.
    """

    sample: int
    position: int
    before: str
    token: str
    after: str
    rollout: float
    native: float
    replayed: float
    num_other_layers: int


def figure_rows(result: AuditResult) -> list[tuple[str, str, str, str]]:
    """Return the table of all figures: a label, then native, replayed and control as text."""
    columns = (result.native, result.replayed, result.control)
    rows: list[tuple[str, str, str, str]] = []
    for label, name, form in _LABELS:
        native, replayed, control = (format(getattr(column, name), form) for column in columns)
        rows.append((label, native, replayed, control))
    return rows


def ratio_histogram(details: AuditDetails, num_bins: int = 41) -> Histogram:
    """Count log probability ratios of trainer and rollout, before and after replay, in the same bins.

    Args:
        details: Of an audit.
        num_bins: An odd number, so that one bin is centred on 0.

    Returns:
        The counts; the range reaches the largest difference of both.
    """
    native = details.native_logprobs - details.rollout_logprobs
    replayed = details.replayed_logprobs - details.rollout_logprobs
    reach = max(
        float(np.abs(native).max(initial=0.0)), float(np.abs(replayed).max(initial=0.0)), 1e-6
    )
    edges = np.linspace(-reach, reach, num_bins + 1)
    return Histogram(edges, np.histogram(native, edges)[0], np.histogram(replayed, edges)[0])


def worst_tokens(
    details: AuditDetails, decode: Callable[[Sequence[int]], str] | None, count: int = 12
) -> list[WorstToken]:
    """Find the tokens with the largest difference between native trainer and rollout.

    Args:
        details: Of an audit.
        decode: Text of tokens; None shows their ids.
        count: How many.

    Returns:
        The worst first.
    """
    decode = decode or (lambda ids: " ".join(map(str, ids)) + " " if ids else "")
    order = np.argsort(-np.abs(details.native_logprobs - details.rollout_logprobs), kind="stable")
    worst: list[WorstToken] = []
    for index in order[:count].tolist():
        sample, position = int(details.sample_index[index]), int(details.position[index])
        tokens = details.samples[sample].token_ids
        worst.append(
            WorstToken(
                sample=sample,
                position=position,
                before=decode(tokens[max(0, position - _CONTEXT_TOKENS) : position]),
                token=decode(tokens[position : position + 1]) or f"[{tokens[position]}]",
                after=decode(tokens[position + 1 : position + 1 + _CONTEXT_TOKENS]),
                rollout=float(details.rollout_logprobs[index]),
                native=float(details.native_logprobs[index]),
                replayed=float(details.replayed_logprobs[index]),
                num_other_layers=int(details.num_other_layers[index]),
            )
        )
    return worst
