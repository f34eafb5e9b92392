"""In float32 the engine picks Transformers' experts, position by position, under every schedule; and forced, the given ones."""

from pathlib import Path

import numpy as np
import pytest

from _support.teacher import (
    check_against_teacher,
    engine_logprobs,
    load_teacher,
    num_wrong,
    random_rows,
    teach,
    with_one_id_changed,
)
from routing_replay import LLM, SamplingParams
from routing_replay.engine import EngineConfig
from routing_replay.errors import TraceMismatchError

MAX_TOKENS = 12


def _prompts() -> list[list[int]]:
    """Lengths around the block size, and a prefix that two prompts share."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, 90, length).tolist() for length in (1, 15, 16, 17, 33, 48)]
    return [*prompts, [*prompts[-1][:32], 7, 8, 9]]


def _params(count: int) -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=MAX_TOKENS, seed=i, logprobs=2, ignore_eos=True)
        for i in range(count)
    ]


def _llm(folder: Path, **settings: int) -> LLM:
    config = EngineConfig(block_size=16, **settings)
    return LLM(folder, dtype="float32", enable_return_routed_experts=True, config=config)


def test_captured_ids_equal_transformers_batched(model_folder: Path):
    outputs = _llm(model_folder).generate(_prompts(), _params(7))
    check_against_teacher(model_folder, outputs)


def test_captured_ids_equal_transformers_one_by_one(model_folder: Path):
    llm = _llm(model_folder)
    outputs = [llm.generate([p], [s])[0] for p, s in zip(_prompts(), _params(7), strict=True)]
    check_against_teacher(model_folder, outputs)


def test_captured_ids_equal_transformers_after_prefix_hits(model_folder: Path):
    llm = _llm(model_folder)
    cold = llm.generate(_prompts(), _params(7))
    warm = llm.generate(_prompts(), _params(7))
    assert [output.num_cached_tokens for output in warm] == [0, 0, 0, 16, 32, 32, 32]
    assert cold[6].num_cached_tokens == 0  # in one batch nothing is published yet
    check_against_teacher(model_folder, warm)
    for before, after in zip(cold, warm, strict=True):
        assert before.outputs[0].token_ids == after.outputs[0].token_ids


def test_captured_ids_equal_transformers_in_odd_chunks(model_folder: Path):
    llm = _llm(model_folder, max_num_batched_tokens=11, max_num_seqs=5)
    check_against_teacher(model_folder, llm.generate(_prompts(), _params(7)))


@pytest.mark.parametrize("chunk", [4096, 9])
def test_forced_ids_are_recorded_in_every_row(model_folder: Path, chunk: int):
    llm = _llm(model_folder, max_num_batched_tokens=chunk, max_num_seqs=7)
    native = llm.generate(_prompts(), _params(7))
    forced = [random_rows(out.outputs[0].routing, i) for i, out in enumerate(native)]
    # Every other request stays native in the same batch.
    mixed = [trace if i % 2 else None for i, trace in enumerate(forced)]
    outputs = llm.generate(_prompts(), _params(7), replay=mixed)
    teacher_model = load_teacher(model_folder)
    for output, trace, before in zip(outputs, mixed, native, strict=True):
        recorded = output.outputs[0].routing
        if trace is None:
            assert num_wrong(recorded, teach(teacher_model, before)) == 0
            assert output.outputs[0].token_ids == before.outputs[0].token_ids
            continue
        assert np.array_equal(recorded.ids, trace.ids)
        assert output.num_cached_tokens == 0  # a native prefix must not serve a forced request
        teacher = teach(teacher_model, output, forced=recorded)
        np.testing.assert_allclose(engine_logprobs(output), teacher.logprobs, atol=1e-4, rtol=0)
        # The twins: one other id in one layer is recorded, and moves the trainer away.
        changed = with_one_id_changed(trace, 0, 0)
        other = llm.generate([list(output.prompt_token_ids)], _params(1), replay=[changed])[0]
        assert (other.outputs[0].routing.ids != trace.ids).sum() == 1
        moved = teach(teacher_model, output, forced=with_one_id_changed(recorded, 0, 0))
        assert np.abs(moved.logprobs - teacher.logprobs).max() > 1e-6


def test_forced_trace_of_other_tokens_is_refused(model_folder: Path):
    llm = _llm(model_folder)
    prompt = _prompts()[3]
    trace = llm.generate([prompt], _params(1))[0].outputs[0].routing
    other = [*prompt[:5], (prompt[5] + 1) % 90, *prompt[6:]]
    with pytest.raises(TraceMismatchError, match="5"):
        llm.generate([other], _params(1), replay=[trace])
    with pytest.raises(TraceMismatchError, match="lower max_tokens"):
        llm.generate([prompt], SamplingParams(max_tokens=MAX_TOKENS + 5), replay=[trace])
    assert (
        llm.generate([prompt], _params(1), replay=[trace])[0].outputs[0].finish_reason == "length"
    )


def test_bfloat16_capture_does_not_change_tokens(model_folder: Path):
    with_capture = LLM(model_folder, enable_return_routed_experts=True)
    without = LLM(model_folder)
    for first, second in zip(
        with_capture.generate(_prompts(), _params(7)),
        without.generate(_prompts(), _params(7)),
        strict=True,
    ):
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
        assert np.array_equal(engine_logprobs(first), engine_logprobs(second))
