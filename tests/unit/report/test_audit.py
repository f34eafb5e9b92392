"""The audit sees what it claims to see: each figure moves when its cause does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from _support.teacher import load_teacher, with_one_id_changed
from routing_replay import LLM, SamplingParams
from routing_replay.assets import tiny_moe_path
from routing_replay.assets.arithmetic import make_problems
from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.report import AuditSample, audit
from routing_replay.trace import decode_trace, encode_trace


@pytest.fixture(scope="module")
def samples() -> list[AuditSample]:
    llm = LLM(tiny_moe_path(), enable_return_routed_experts=True)
    conversations = [[{"role": "user", "content": p.question}] for p in make_problems(6, 5)]
    params = [SamplingParams(max_tokens=60, logprobs=0, seed=i) for i in range(6)]
    result: list[AuditSample] = []
    for output in llm.chat(conversations, params):
        completion = output.outputs[0]
        assert completion.logprobs is not None
        pairs = zip(completion.logprobs, completion.token_ids, strict=True)
        result.append(
            AuditSample(
                token_ids=(*output.prompt_token_ids, *completion.token_ids),
                num_prompt_tokens=len(output.prompt_token_ids),
                rollout_logprobs=np.array([entry[token].logprob for entry, token in pairs]),
                trace=completion.routing,
            )
        )
    return result


@pytest.fixture(scope="module")
def trainer() -> torch.nn.Module:
    return load_teacher(tiny_moe_path())


def test_audit_of_a_bfloat16_rollout(trainer: torch.nn.Module, samples: list[AuditSample]):
    result = audit(trainer, samples)
    assert result.num_response_tokens == sum(len(s.rollout_logprobs) for s in samples)
    assert result.num_rows == sum(len(s.token_ids) - 1 for s in samples)
    assert result.coverage == 1.0
    assert result.num_wrong_ids == 0
    assert result.native.mismatch_pairs > 0.01
    assert result.replayed.mismatch_pairs == 0
    assert result.control.kl_k3 < 1e-9 < result.native.kl_k3
    assert result.kl_wrong_rows > 100 * result.replayed.kl_k3
    np.testing.assert_allclose(
        np.mean(result.native.mismatch_per_layer), result.native.mismatch_pairs
    )
    assert (result.is_exact, result.ordered, result.fallback) == (True, True, 0.0)
    native = result.native
    assert native.layers_per_token == pytest.approx(native.mismatch_pairs * 8)
    # A set that differs has at least one of its eight experts elsewhere.
    for mismatch, overlap in zip(native.mismatch_per_layer, native.overlap_per_layer, strict=True):
        assert 1 - mismatch <= overlap <= 1 - mismatch / 8
    assert result.replayed.overlap == 1.0
    assert result.kl_ratio is not None
    assert result.kl_ratio.value == pytest.approx(result.replayed.kl_k3 / result.native.kl_k3)


def test_audit_notices_one_changed_id(trainer: torch.nn.Module, samples: list[AuditSample]):
    """A trace with one other id is replayed as it is: the replayed figures move, the native ones stay."""
    row = samples[0].num_prompt_tokens + 3
    changed = [
        replace(samples[0], trace=with_one_id_changed(samples[0].trace, row, 2)),
        *samples[1:],
    ]
    before, after = audit(trainer, samples), audit(trainer, changed)
    assert after.num_wrong_ids == 0
    # One id of thousands can move the mean KL either way, but never leaves it as it was.
    assert after.replayed.kl_k3 != before.replayed.kl_k3
    assert after.native.kl_k3 == before.native.kl_k3


def test_audit_refuses_a_trace_of_other_tokens(
    trainer: torch.nn.Module, samples: list[AuditSample]
):
    tokens = list(samples[0].token_ids)
    tokens[4] += 1
    with pytest.raises(TraceMismatchError, match="4"):
        audit(trainer, [replace(samples[0], token_ids=tuple(tokens)), samples[1]])


def test_audit_details_are_those_of_the_tokens(
    trainer: torch.nn.Module, samples: list[AuditSample]
):
    result = audit(trainer, samples)
    details = result.details
    assert details is not None
    token = int(np.flatnonzero(details.sample_index == 2)[5])
    sample, position = samples[2], int(details.position[token])
    assert position == sample.num_prompt_tokens + 5
    assert details.rollout_logprobs[token] == sample.rollout_logprobs[5]
    with torch.no_grad():
        output = trainer(
            input_ids=torch.tensor([sample.token_ids]), use_cache=False, output_router_logits=True
        )
    expected = output.logits[0, position - 1].double().log_softmax(-1)[sample.token_ids[position]]
    assert details.native_logprobs[token] == pytest.approx(float(expected), abs=1e-5)
    picked = torch.stack([logits[position - 1].topk(8).indices for logits in output.router_logits])
    wanted = np.sort(picked.numpy(), -1) != np.sort(sample.trace.ids[position - 1], -1)
    assert details.differs[token].tolist() == wanted.any(-1).tolist()
    assert details.expert_load.sum() == result.num_rows * 8 * 8
    assert details.expert_load[3, 7] == sum(int((s.trace.ids[:, 3] == 7).sum()) for s in samples)


def test_audit_of_traces_without_order_says_so(
    trainer: torch.nn.Module, samples: list[AuditSample]
):
    ordered = audit(trainer, samples)
    sets = [replace(s, trace=decode_trace(encode_trace(s.trace, codec="packed"))) for s in samples]
    result = audit(trainer, sets)
    assert (ordered.ordered, result.ordered) == (True, False)
    assert result.is_exact
    assert result.native == ordered.native
    assert result.replayed.mismatch_pairs == 0
    # The same experts in another order: equal but for the order in which they are summed.
    assert result.replayed.kl_k3 == pytest.approx(ordered.replayed.kl_k3, rel=0.02)


def test_audit_without_a_native_difference_has_no_ratio(
    trainer: torch.nn.Module, samples: list[AuditSample]
):
    details = audit(trainer, samples).details
    assert details is not None
    same = [
        replace(sample, rollout_logprobs=details.native_logprobs[details.sample_index == index])
        for index, sample in enumerate(samples)
    ]
    result = audit(trainer, same)
    assert (result.native.kl_k3, result.kl_ratio) == (0.0, None)
    assert result.is_exact


def test_audit_refuses_samples_that_it_cannot_compare(
    trainer: torch.nn.Module, samples: list[AuditSample]
):
    with pytest.raises(ConfigError, match="1 entries"):
        audit(trainer, samples[:1])
    short = replace(samples[1], rollout_logprobs=samples[1].rollout_logprobs[:-1])
    with pytest.raises(ConfigError, match="sample 1 has"):
        audit(trainer, [samples[0], short])
    no_response = replace(
        samples[0], num_prompt_tokens=len(samples[0].token_ids), rollout_logprobs=np.empty(0)
    )
    with pytest.raises(ConfigError, match="sample 0 has 0 logprobs for 0"):
        audit(trainer, [no_response, samples[1]])
