"""What an audit takes and what it finds, as plain data."""

from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from routing_replay.replay import Interval
from routing_replay.trace import RoutingTrace

__all__ = ["AuditDetails", "AuditResult", "AuditSample", "Comparison"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSample:
    """One sampled sequence.

    Attributes:
        token_ids: Prompt and response.
        num_prompt_tokens: P.
        rollout_logprobs: float64 `[G]`, logprob of each response token at the sampler, of the distribution that the
            trainer computes (no temperature, penalties or truncation).
        trace: Experts that the rollout used, P+G-1 rows.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    rollout_logprobs: NDArray[np.float64]
    trace: RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far two computations of the same tokens are apart.

    `d` is the logprob of the second (the trainer) minus that of the first (the sampler), over response tokens;
    routing is compared as sets, over all rows.

    Attributes:
        kl_k3: `mean(expm1(d) - d)` in nats, estimates KL(first || second).
        kl_k1: `mean(-d)` in nats, estimates the same, may be negative.
        f2: F(2), share of tokens whose probabilities differ by more than a factor of 2 (AReaL's `extreme_frac_tau2`).
        mean_abs_dlogp: Mean of `|d|`, in nats.
        mean_abs_dp: Mean difference of probabilities, verl's `rollout_probs_diff_mean`.
        token_mult_prob_error: Mean of `exp(|d|)`, NeMo-RL's name; 1 where both agree.
        mismatch_pairs: Share of (token, layer) pairs with another set of experts.
        mismatch_tokens: Share of tokens with another set in at least one layer.
        mismatch_per_layer: Share of tokens with another set, of each MoE layer.
        overlap_per_layer: Mean share of a token's experts that both picked, of each MoE layer.
    """

    kl_k3: float
    kl_k1: float
    f2: float
    mean_abs_dlogp: float
    mean_abs_dp: float
    token_mult_prob_error: float
    mismatch_pairs: float
    mismatch_tokens: float
    mismatch_per_layer: tuple[float, ...]
    overlap_per_layer: tuple[float, ...]

    @property
    def overlap(self) -> float:
        """Mean share of a (token, layer) pair's experts that both picked."""
        return float(np.mean(self.overlap_per_layer))

    @property
    def layers_per_token(self) -> float:
        """Mean number of MoE layers in which a token has another set."""
        return float(np.sum(self.mismatch_per_layer))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class AuditDetails:
    """What the figures were made of, token by token; N response tokens of all samples, in order.

    Attributes:
        samples: The sequences.
        sample_index: int64 `[N]`, which sample a token belongs to.
        position: int64 `[N]`, its index in the sample's tokens.
        rollout_logprobs: float64 `[N]`.
        native_logprobs: float64 `[N]`, of the trainer that routes natively.
        replayed_logprobs: float64 `[N]`, of the trainer that replays.
        differs: bool `[N, L]`, MoE layers in which the row that predicts the token has another set natively.
        expert_load: int64 `[L, E]`, how often each expert was picked in the rollout's rows.
        layer_ids: Decoder layer of each of the L slots.
    """

    samples: tuple[AuditSample, ...]
    sample_index: NDArray[np.int64]
    position: NDArray[np.int64]
    rollout_logprobs: NDArray[np.float64]
    native_logprobs: NDArray[np.float64]
    replayed_logprobs: NDArray[np.float64]
    differs: NDArray[np.bool_]
    expert_load: NDArray[np.int64]
    layer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """Everything the audit measured.

    Attributes:
        num_response_tokens: Tokens that KL is averaged over.
        num_rows: Rows that routing is compared on.
        native: Trainer against rollout, routing natively.
        replayed: Trainer against rollout, routing replayed.
        control: Trainer against itself: packed against one by one, both native.
        kl_ratio: KL replayed over KL native, with a paired bootstrap interval over sequences; None where the native KL
            is 0, so that there is no ratio.
        kl_wrong_rows: KL when every sample replays another sample's rows.
        coverage: (row, layer) pairs replayed over those due.
        fallback: (row, layer) pairs that were due and routed natively, over those due.
        num_wrong_ids: Ids that the trainer's experts received and that differ from the trace, by position.
        ordered: Whether every trace has its columns in rank order; if not, its rows are sets, and the trainer received
            their ids in ascending order.
        details: What the figures were made of.
    """

    num_response_tokens: int
    num_rows: int
    native: Comparison
    replayed: Comparison
    control: Comparison
    kl_ratio: Interval | None
    kl_wrong_rows: float
    coverage: float
    fallback: float
    num_wrong_ids: int
    ordered: bool = True
    details: AuditDetails | None = None

    @property
    def is_exact(self) -> bool:
        """Whether every row that was due was replayed, and every id arrived at the trainer's experts."""
        return self.coverage == 1.0 and self.num_wrong_ids == 0

    def figures(self) -> dict[str, object]:
        """Return the figures without the details, as JSON values."""
        return asdict(replace(self, details=None), dict_factory=_without_details)


def _without_details(items: list[tuple[str, object]]) -> dict[str, object]:
    return {name: value for name, value in items if name != "details"}
