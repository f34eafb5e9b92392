"""The audit: one trainer against one rollout, natively, replayed, with a control, and with the wrong rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from routing_replay.replay import (
    Interval,
    Packed,
    ReplayHandle,
    attach,
    extreme_fraction,
    kl_k1,
    kl_k3,
    kl_k3_terms,
    mean_abs_dlogp,
    mean_abs_dp,
    observe_expert_ids,
    paired_bootstrap_ratio,
    routing_mismatch,
    token_mult_prob_error,
)
from routing_replay.trace import RoutingTrace

__all__ = ["AuditDetails", "AuditResult", "AuditSample", "Comparison", "audit"]

_TOKENS_PER_PASS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSample:
    """One sampled sequence.

    Attributes:
        token_ids: Prompt and response.
        num_prompt_tokens: P.
        rollout_logprobs: float64 `[G]`, logprob of each response token at the sampler.
        trace: Experts that the rollout used, P+G-1 rows.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    rollout_logprobs: NDArray[np.float64]
    trace: RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far two computations of the same tokens are apart; KL and the like over response tokens.

    Attributes:
        kl_k3: `mean(expm1(d) - d)`, d = logp of the second minus logp of the first (the sampler), in nats.
        kl_k1: `mean(-d)`, which may be negative.
        f2: Share of tokens whose probabilities differ by more than a factor of 2.
        mean_abs_dlogp: Mean of `|d|`.
        mean_abs_dp: Mean difference of probabilities, verl's `rollout_probs_diff_mean`.
        token_mult_prob_error: Mean of `exp(|d|)`, NeMo-RL's name; 1 where both agree.
        mismatch_pairs: Share of (token, layer) pairs with another set of experts.
        mismatch_tokens: Share of tokens with another set in at least one layer.
        mismatch_per_layer: The share of each MoE layer.
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
        num_other_layers: int64 `[N]`, MoE layers in which the row that predicted the token has another set natively.
        expert_load: int64 `[L, E]`, how often each expert was picked in the rollout's rows.
        layer_ids: Decoder layer of each of the L slots.
    """

    samples: tuple[AuditSample, ...]
    sample_index: NDArray[np.int64]
    position: NDArray[np.int64]
    rollout_logprobs: NDArray[np.float64]
    native_logprobs: NDArray[np.float64]
    replayed_logprobs: NDArray[np.float64]
    num_other_layers: NDArray[np.int64]
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
        kl_ratio: KL replayed over KL native, with a paired bootstrap interval over sequences.
        kl_wrong_rows: KL when every sample replays another sample's rows.
        coverage: Rows replayed over rows due.
        num_wrong_ids: Ids that the trainer's experts received and that differ from the trace, by position.
        details: What the figures were made of.
    """

    num_response_tokens: int
    num_rows: int
    native: Comparison
    replayed: Comparison
    control: Comparison
    kl_ratio: Interval
    kl_wrong_rows: float
    coverage: float
    num_wrong_ids: int
    details: AuditDetails | None = None

    def figures(self) -> dict[str, object]:
        """Return the figures without the details, as JSON values."""
        return asdict(replace(self, details=None), dict_factory=_without_details)


def _without_details(items: list[tuple[str, object]]) -> dict[str, object]:
    return {name: value for name, value in items if name != "details"}


@dataclass(frozen=True, slots=True)
class _Pass:
    """Response logprobs float64 `[tokens]` and experts received int64 `[rows, L, K]` of all samples."""

    logprobs: NDArray[np.float64]
    expert_ids: NDArray[np.int64]


def _microbatches(samples: Sequence[AuditSample]) -> list[list[int]]:
    """Consecutive samples, packed up to a number of tokens."""
    batches: list[list[int]] = [[]]
    room = _TOKENS_PER_PASS
    for index, sample in enumerate(samples):
        room -= len(sample.token_ids)
        if room < 0 and batches[-1]:
            batches.append([])
            room = _TOKENS_PER_PASS - len(sample.token_ids)
        batches[-1].append(index)
    return batches


@torch.no_grad()
def _forward(
    model: nn.Module,
    handle: ReplayHandle,
    samples: Sequence[AuditSample],
    traces: Sequence[RoutingTrace] | None,
) -> _Pass:
    """Run samples packed into one row, replaying `traces` or natively."""
    lengths = tuple(len(sample.token_ids) for sample in samples)
    device = next(model.parameters()).device
    token_ids = torch.tensor(
        [token for sample in samples for token in sample.token_ids], device=device
    )
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    packed = Packed(lengths=lengths)
    context = handle.disabled() if traces is None else handle.replay(traces, packed)
    with observe_expert_ids(model) as observed, context:
        # Restarting positions and no mask and no cache: so Transformers keeps packed sequences apart.
        logits = model(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False
        ).logits[0]
    logprobs = logits[:-1].double().log_softmax(-1).gather(1, token_ids[1:, None]).squeeze(1)
    ends = np.cumsum(lengths)
    starts = ends - np.asarray(lengths)
    responses = [
        logprobs[start + sample.num_prompt_tokens - 1 : end - 1]
        for sample, start, end in zip(samples, starts, ends, strict=True)
    ]
    ids = observed.stacked()
    # The last token of a sequence has no row: no sampled token depends on its experts.
    rows = [ids[start : end - 1] for start, end in zip(starts, ends, strict=True)]
    return _Pass(torch.cat(responses).cpu().numpy(), torch.cat(rows).cpu().numpy())


def _join(passes: Sequence[_Pass]) -> _Pass:
    return _Pass(
        np.concatenate([item.logprobs for item in passes]),
        np.concatenate([item.expert_ids for item in passes]),
    )


def _compare(first: _Pass, second: _Pass) -> Comparison:
    mismatch = routing_mismatch(first.expert_ids, second.expert_ids)
    return Comparison(
        kl_k3=kl_k3(second.logprobs, first.logprobs),
        kl_k1=kl_k1(second.logprobs, first.logprobs),
        f2=extreme_fraction(second.logprobs, first.logprobs, tau=2.0),
        mean_abs_dlogp=mean_abs_dlogp(second.logprobs, first.logprobs),
        mean_abs_dp=mean_abs_dp(second.logprobs, first.logprobs),
        token_mult_prob_error=token_mult_prob_error(second.logprobs, first.logprobs),
        mismatch_pairs=mismatch.pairs,
        mismatch_tokens=mismatch.tokens,
        mismatch_per_layer=tuple(float(share) for share in mismatch.per_layer),
    )


def _rows_of_another(samples: Sequence[AuditSample]) -> list[RoutingTrace]:
    """A trace for each sample with the rows of the next one, repeated or cut to its length."""
    traces: list[RoutingTrace] = []
    for sample, other in zip(samples, (*samples[1:], samples[0]), strict=True):
        trace = sample.trace
        repeated = np.arange(trace.num_rows) % other.trace.num_rows
        traces.append(
            RoutingTrace.from_rows(
                other.trace.ids[repeated],
                token_ids=sample.token_ids,
                layer_ids=trace.layer_ids,
                num_layers=trace.num_layers,
                num_experts=trace.num_experts,
            )
        )
    return traces


def audit(model: nn.Module, samples: Sequence[AuditSample]) -> AuditResult:
    """Measure a trainer against a rollout.

    Args:
        model: A Hugging Face MoE model, the trainer, in evaluation mode.
        samples: At least two sampled sequences with their traces.

    Returns:
        Native, replayed and control figures, and the checks that show that replay did what it says.

    Raises:
        TraceMismatchError: A trace does not belong to its tokens or to the model.
        ReplayError: A router did not take its experts.
    """
    batches = [[samples[index] for index in batch] for batch in _microbatches(samples)]
    traces = [sample.trace for sample in samples]
    wrong_traces = dict(zip(map(id, samples), _rows_of_another(samples), strict=True))
    with attach(model) as handle:
        for sample in samples:
            sample.trace.validate(sample.token_ids)
        native = _join([_forward(model, handle, batch, None) for batch in batches])
        single = _join([_forward(model, handle, [sample], None) for sample in samples])
        wrong = _join(
            [_forward(model, handle, b, [wrong_traces[id(s)] for s in b]) for b in batches]
        )
    with attach(model) as handle:
        replayed = _join([_forward(model, handle, b, [s.trace for s in b]) for b in batches])
        coverage = handle.stats().coverage
    rollout = _Pass(
        np.concatenate([sample.rollout_logprobs for sample in samples]),
        np.concatenate([trace.ids for trace in traces]).astype(np.int64),
    )
    groups = np.repeat(np.arange(len(samples)), [len(s.rollout_logprobs) for s in samples])
    return AuditResult(
        num_response_tokens=len(rollout.logprobs),
        num_rows=len(rollout.expert_ids),
        native=_compare(rollout, native),
        replayed=_compare(rollout, replayed),
        control=_compare(native, single),
        kl_ratio=paired_bootstrap_ratio(
            kl_k3_terms(replayed.logprobs, rollout.logprobs),
            kl_k3_terms(native.logprobs, rollout.logprobs),
            groups,
        ),
        kl_wrong_rows=kl_k3(wrong.logprobs, rollout.logprobs),
        coverage=coverage,
        num_wrong_ids=int((replayed.expert_ids != rollout.expert_ids).sum()),
        details=_details(samples, rollout, native, replayed),
    )


def _details(
    samples: Sequence[AuditSample], rollout: _Pass, native: _Pass, replayed: _Pass
) -> AuditDetails:
    """Collect what reports show of single tokens and experts."""
    trace = samples[0].trace
    load = np.zeros((trace.num_moe_layers, trace.num_experts), np.int64)
    for slot in range(trace.num_moe_layers):
        ids = rollout.expert_ids[:, slot].reshape(-1)
        load[slot] = np.bincount(ids, minlength=trace.num_experts)
    differs = (np.sort(native.expert_ids, -1) != np.sort(rollout.expert_ids, -1)).any(-1)
    others = differs.sum(-1)
    ends = np.cumsum([sample.trace.num_rows for sample in samples])
    # The row that predicts token t is that of token t - 1.
    predicting = [
        others[end - len(s.rollout_logprobs) : end] for s, end in zip(samples, ends, strict=True)
    ]
    counts = [len(sample.rollout_logprobs) for sample in samples]
    positions = [np.arange(s.num_prompt_tokens, len(s.token_ids)) for s in samples]
    return AuditDetails(
        samples=tuple(samples),
        sample_index=np.repeat(np.arange(len(samples)), counts),
        position=np.concatenate(positions),
        rollout_logprobs=rollout.logprobs,
        native_logprobs=native.logprobs,
        replayed_logprobs=replayed.logprobs,
        num_other_layers=np.concatenate(predicting),
        expert_load=load,
        layer_ids=trace.layer_ids,
    )
