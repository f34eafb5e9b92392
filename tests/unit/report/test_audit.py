"""The audit sees what it claims to see: each figure moves when its cause does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from _support.teacher import load_teacher, with_one_id_changed
from routing_replay import LLM, SamplingParams
from routing_replay.assets import tiny_moe_path
from routing_replay.assets.arithmetic import make_problems
from routing_replay.errors import TraceMismatchError
from routing_replay.report import AuditSample, audit


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
