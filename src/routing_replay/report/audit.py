"""The audit: one trainer against one rollout, natively, replayed, with a control, and with the wrong rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from routing_replay.errors import ConfigError
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
from routing_replay.report.results import AuditDetails, AuditResult, AuditSample, Comparison
from routing_replay.trace import RoutingTrace

__all__ = ["audit"]

_TOKENS_PER_PASS = 2048
_ROWS_OF_LOGITS = 256  # in float64 at a time: a large vocabulary takes more memory than the model


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


def _logprobs_of(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Logprobs float64 `[tokens]` of the given tokens under logits `[tokens, vocabulary]`."""
    parts = zip(logits.split(_ROWS_OF_LOGITS), token_ids.split(_ROWS_OF_LOGITS), strict=True)
    return torch.cat(
        [rows.double().log_softmax(-1).gather(1, ids[:, None]).squeeze(1) for rows, ids in parts]
    )


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
    logprobs = _logprobs_of(logits[:-1], token_ids[1:])
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
        mismatch_per_layer=tuple(mismatch.per_layer.tolist()),
        overlap_per_layer=tuple(mismatch.overlap_per_layer.tolist()),
    )


def _kl_ratio(
    rollout: _Pass, native: _Pass, replayed: _Pass, groups: NDArray[np.int64]
) -> Interval | None:
    """Compare the two KLs over the same tokens; None where the native one is 0 and nothing can be divided by it."""
    after, before = (kl_k3_terms(item.logprobs, rollout.logprobs) for item in (replayed, native))
    try:
        return paired_bootstrap_ratio(after, before, groups)
    except ConfigError:  # the terms are finite and the groups fit: only a denominator of 0 is left
        return None


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


def _check_samples(samples: Sequence[AuditSample]) -> None:
    if len(samples) < 2:
        raise ConfigError(
            f"samples has {len(samples)} entries; accepted are 2 or more: the audit also replays each other's rows, "
            "and resamples sequences"
        )
    for index, sample in enumerate(samples):
        num_response = len(sample.token_ids) - sample.num_prompt_tokens
        if len(sample.rollout_logprobs) != num_response or num_response < 1:
            raise ConfigError(
                f"sample {index} has {len(sample.rollout_logprobs)} logprobs for {num_response} response tokens; "
                "accepted is at least one token, with a logprob each"
            )
        sample.trace.validate(sample.token_ids)


def audit(model: nn.Module, samples: Sequence[AuditSample]) -> AuditResult:
    """Measure a trainer against a rollout.

    Args:
        model: A Hugging Face MoE model, the trainer, in evaluation mode.
        samples: At least two sampled sequences with their traces.

    Returns:
        Native, replayed and control figures, and the checks that show that replay did what it says.

    Raises:
        ConfigError: There are fewer than two samples, or one has no response token.
        TraceMismatchError: A trace does not belong to its tokens or to the model, or lacks a row.
        ReplayError: A router did not take its experts.
    """
    _check_samples(samples)
    batches = [[samples[index] for index in batch] for batch in _microbatches(samples)]
    traces = [sample.trace for sample in samples]
    wrong_traces = dict(zip(map(id, samples), _rows_of_another(samples), strict=True))
    with attach(model) as handle:
        native = _join([_forward(model, handle, batch, None) for batch in batches])
        single = _join([_forward(model, handle, [sample], None) for sample in samples])
        wrong = _join(
            [_forward(model, handle, b, [wrong_traces[id(s)] for s in b]) for b in batches]
        )
    with attach(model) as handle:
        replayed = _join([_forward(model, handle, b, [s.trace for s in b]) for b in batches])
        stats = handle.stats()
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
        kl_ratio=_kl_ratio(rollout, native, replayed, groups),
        kl_wrong_rows=kl_k3(wrong.logprobs, rollout.logprobs),
        coverage=stats.coverage,
        fallback=1.0 - stats.coverage,
        num_wrong_ids=int((replayed.expert_ids != rollout.expert_ids).sum()),
        ordered=all(trace.ordered for trace in traces),
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
    ends = np.cumsum([sample.trace.num_rows for sample in samples])
    # The row that predicts token t is that of token t - 1.
    predicting = [
        differs[end - len(s.rollout_logprobs) : end] for s, end in zip(samples, ends, strict=True)
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
        differs=np.concatenate(predicting),
        expert_load=load,
        layer_ids=trace.layer_ids,
    )
