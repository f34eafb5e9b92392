"""What a report shows of an audit, in words and numbers, however it is drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routing_replay.report.results import AuditDetails, AuditResult, Comparison

__all__ = [
    "Histogram",
    "LayerRow",
    "WorstToken",
    "audit_notes",
    "figure_rows",
    "layer_rows",
    "ratio_histogram",
    "worst_tokens",
]

_CONTEXT_TOKENS = 14


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
class LayerRow:
    """One MoE layer.

    Attributes:
        layer_idx: Its decoder layer.
        native: Share of tokens that the native trainer gave another set of experts.
        replayed: The same of the trainer that replays.
        overlap: Mean share of a token's experts that rollout and native trainer both picked.
        busiest: The expert that the rollout picked most often.
        busiest_share: Its share of all picks.
        num_unused: Experts that the rollout never picked.
    """

    layer_idx: int
    native: float
    replayed: float
    overlap: float
    busiest: int
    busiest_share: float
    num_unused: int


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
        other_layers: Decoder layers in which the row that predicts it was routed otherwise.
    """

    sample: int
    position: int
    before: str
    token: str
    after: str
    rollout: float
    native: float
    replayed: float
    other_layers: tuple[int, ...]


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _plain_number(value: float) -> str:
    return f"{value:.2e}"


def figure_rows(
    result: AuditResult, number: Callable[[float], str] = _plain_number
) -> list[tuple[str, str, str, str]]:
    """Return the table of all figures.

    Args:
        result: An audit.
        number: Writes a number of any size.

    Returns:
        For each figure a label, then native, replayed and control as text.
    """
    table: tuple[tuple[str, Callable[[Comparison], float], Callable[[float], str]], ...] = (
        ("routing mismatch, (token, layer) pairs", lambda c: c.mismatch_pairs, _percent),
        ("routing mismatch, tokens", lambda c: c.mismatch_tokens, _percent),
        ("layers routed otherwise, per token", lambda c: c.layers_per_token, "{:.2f}".format),
        ("experts in common", lambda c: c.overlap, _percent),
        ("KL(rollout ‖ trainer), k3, nats a token", lambda c: c.kl_k3, number),
        ("KL(rollout ‖ trainer), k1, nats a token", lambda c: c.kl_k1, number),
        ("mean |Δ logp|", lambda c: c.mean_abs_dlogp, number),
        ("mean |Δ p|", lambda c: c.mean_abs_dp, number),
        ("mean exp |Δ logp|", lambda c: c.token_mult_prob_error, "{:.6f}".format),
        ("F(2): probability off by more than 2x", lambda c: c.f2, number),
    )
    rows: list[tuple[str, str, str, str]] = []
    for label, value_of, form in table:
        native, replayed, control = (
            form(value_of(column)) for column in (result.native, result.replayed, result.control)
        )
        rows.append((label, native, replayed, control))
    return rows


def audit_notes(result: AuditResult) -> list[str]:
    """Return what a reader must know to read the figures rightly.

    Args:
        result: An audit.

    Returns:
        Sentences: exactness of the replay, ratio of the KLs, cost of wrong rows, what the traces do not hold.
    """
    found = [
        f"replay: {result.num_wrong_ids} wrong ids in {result.num_rows} rows, coverage {result.coverage:.2%}, "
        f"native fallback {result.fallback:.2%}"
    ]
    if result.kl_ratio is None:
        found.append("KL replayed / native: no ratio, the native KL is 0")
    else:
        ratio = result.kl_ratio
        found.append(
            f"KL replayed / native {ratio.value:.3f}, 95 % interval [{ratio.low:.3f}, {ratio.high:.3f}] "
            "(paired bootstrap over sequences)"
        )
    found.append(f"KL when each sample replays another's rows: {result.kl_wrong_rows:.2e}")
    if not result.ordered:
        found.append(
            "the traces do not hold the order of a row's experts (a packed codec): rows are compared, and were "
            "replayed, as sets in ascending order"
        )
    return found


def layer_rows(result: AuditResult, details: AuditDetails) -> list[LayerRow]:
    """Return routing mismatch and expert load of each MoE layer.

    Args:
        result: An audit.
        details: Its details.

    Returns:
        One row for each MoE layer, in order.
    """
    return [
        LayerRow(
            layer_idx=layer_idx,
            native=result.native.mismatch_per_layer[slot],
            replayed=result.replayed.mismatch_per_layer[slot],
            overlap=result.native.overlap_per_layer[slot],
            busiest=int(load.argmax()),
            busiest_share=float(load.max() / max(1, load.sum())),
            num_unused=int((load == 0).sum()),
        )
        for slot, (layer_idx, load) in enumerate(
            zip(details.layer_ids, details.expert_load, strict=True)
        )
    ]


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
    layer_ids = np.asarray(details.layer_ids)
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
                other_layers=tuple(layer_ids[details.differs[index]].tolist()),
            )
        )
    return worst
