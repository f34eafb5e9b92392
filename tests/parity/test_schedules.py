"""Ids and logprobs stay Transformers' whatever the scheduler does to a request."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from _support.teacher import (
    all_tokens,
    check_against_teacher,
    load_teacher,
    num_wrong,
    random_rows,
    teach,
    with_one_id_changed,
)
from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay import LLM, RequestOutput, SamplingParams
from routing_replay.engine import EngineConfig
from routing_replay.trace import RoutingTrace

MAX_TOKENS = 20


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(4, 90, length).tolist() for length in (3, 17, 16, 30, 9, 33)]


def _params(count: int, **settings: object) -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=MAX_TOKENS, seed=i, logprobs=0, ignore_eos=True, **settings)  # pyright: ignore[reportArgumentType]
        for i in range(count)
    ]


def _llm(folder: Path, **settings: object) -> LLM:
    config = EngineConfig(block_size=8, **settings)  # pyright: ignore[reportArgumentType]
    return LLM(folder, dtype="float32", enable_return_routed_experts=True, config=config)


def _tight(folder: Path, **settings: object) -> LLM:
    """So few blocks that requests must give theirs back again and again."""
    return _llm(folder, num_kv_blocks=10, max_num_seqs=4, **settings)


def _tokens(outputs: Sequence[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_requests(model_folder: Path, prefix_caching: bool):
    llm = _tight(model_folder, enable_prefix_caching=prefix_caching)
    outputs = llm.generate(_prompts(), _params(6))
    assert sum(output.num_preemptions for output in outputs) >= 3
    assert llm.core.kv_blocks.num_free == 10
    check_against_teacher(model_folder, outputs)
    assert _tokens(outputs) == _tokens(_llm(model_folder).generate(_prompts(), _params(6)))


def test_preempted_in_the_middle_of_a_chunked_prompt(model_folder: Path):
    llm = _tight(model_folder, max_num_batched_tokens=7)
    outputs = llm.generate(_prompts(), _params(6))
    assert sum(output.num_preemptions for output in outputs) >= 1
    check_against_teacher(model_folder, outputs)


@pytest.mark.parametrize("chunk", [4, 13])
def test_odd_chunks(model_folder: Path, chunk: int):
    llm = _llm(model_folder, max_num_batched_tokens=chunk, max_num_seqs=4)
    check_against_teacher(model_folder, llm.generate(_prompts(), _params(6)))


def test_penalties(model_folder: Path):
    settings = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7}
    outputs = _llm(model_folder).generate(_prompts(), _params(6, min_p=0.01, **settings))
    check_against_teacher(model_folder, outputs)  # logprobs are raw: the model's own
    assert _tokens(outputs) != _tokens(_llm(model_folder).generate(_prompts(), _params(6)))


def test_aborted_neighbours(model_folder: Path):
    core = _llm(model_folder).core
    groups = [
        core.make_requests(tokens, params)
        for tokens, params in zip(_prompts(), _params(6), strict=True)
    ]
    requests = [request for group in groups for request in group]
    for request in requests:
        core.scheduler.add(request)
    finished = {}
    for step in range(100):
        if step == 5:
            for name in (requests[1].request_id, requests[3].request_id):
                item = core.abort(name)
                assert item is not None
                finished[name] = item
        finished |= {item.request.request_id: item for item in core.step()}
        if not core.scheduler.has_work:
            break
    assert core.kv_blocks.num_free == core.kv_blocks.num_blocks
    expected = _llm(model_folder).generate(_prompts(), _params(6))
    for request, output in zip(requests, expected, strict=True):
        item = finished[request.request_id]
        assert item.trace is not None
        whole = output.outputs[0]
        if request.finish_reason == "abort":
            count = len(request.output_ids)
            assert 0 < count < MAX_TOKENS
            assert tuple(request.output_ids) == whole.token_ids[:count]
        else:
            assert tuple(request.output_ids) == whole.token_ids
        rows = item.trace.num_rows
        assert rows == len(request.token_ids) - 1
        assert np.array_equal(item.trace.ids, whole.routing.ids[:rows])
        item.trace.validate(request.token_ids)


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 3},
                                      {"num_kv_blocks": 12, "max_num_seqs": 5}, {"enable_prefix_caching": False}])  # fmt: skip
def test_several_completions_of_a_prompt(model_folder: Path, settings: dict[str, int]):
    llm = _llm(model_folder, **settings)
    outputs = llm.generate(_prompts()[1:5], _params(4, n=3))
    flat = [
        RequestOutput(
            request_id=output.request_id,
            prompt=None,
            prompt_token_ids=output.prompt_token_ids,
            outputs=(completion,),
        )
        for output in outputs
        for completion in output.outputs
    ]
    assert [completion.index for completion in outputs[0].outputs] == [0, 1, 2]
    assert len({completion.token_ids for output in outputs for completion in output.outputs}) == 12
    check_against_teacher(model_folder, flat)
    # A completion's tokens are those of its own seed, alone.
    alone = _llm(model_folder).generate(
        [_prompts()[2]],
        [SamplingParams(max_tokens=MAX_TOKENS, seed=1 + 2, logprobs=0, ignore_eos=True)],
    )
    assert outputs[1].outputs[2].token_ids == _tokens(alone)[0]
    assert llm.core.kv_blocks.num_free == llm.core.kv_blocks.num_blocks


def _half_forced(trace: RoutingTrace, seed: int) -> RoutingTrace:
    """Random rows at about half of the tokens; the others are marked as missing."""
    forced = random_rows(trace, seed)
    valid = np.random.default_rng(seed).random(trace.num_rows) < 0.5
    return RoutingTrace.from_rows(
        forced.ids,
        token_ids=np.arange(trace.num_rows),
        layer_ids=trace.layer_ids,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        valid=valid,
    )


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 3},
                                      {"num_kv_blocks": 10, "max_num_seqs": 4}])  # fmt: skip
def test_forced_and_native_rows_in_every_mix(model_folder: Path, settings: dict[str, int]):
    llm = _llm(model_folder, **settings)
    native = llm.generate(_prompts(), _params(6))
    wanted: list[RoutingTrace | None] = []
    for index, output in enumerate(native):
        trace = output.outputs[0].routing
        whole = random_rows(trace, index)
        rows = _half_forced(trace, index)
        # The prompt's digests are the request's own: rebuild them over its tokens.
        half = RoutingTrace.from_rows(
            rows.ids,
            token_ids=all_tokens(output),
            layer_ids=trace.layer_ids,
            num_layers=trace.num_layers,
            num_experts=trace.num_experts,
            valid=rows.valid,
        )
        wanted.append((None, whole, half, half.slice(0, 5))[index % 4])
    outputs = llm.generate(_prompts(), _params(6), replay=wanted, on_missing="native")
    teacher_model = load_teacher(model_folder)
    for output, trace in zip(outputs, wanted, strict=True):
        recorded = output.outputs[0].routing
        if trace is not None:
            rows = np.flatnonzero(trace.valid)
            assert np.array_equal(recorded.ids[rows], trace.ids[rows])
        # Every row, forced or not: Transformers at the recorded experts gives the engine's logprobs.
        teacher = teach(teacher_model, output, forced=recorded)
        np.testing.assert_allclose(_logprobs(output), teacher.logprobs, atol=1e-4, rtol=0)
        moved = teach(teacher_model, output, forced=with_one_id_changed(recorded, 1, 0))
        assert np.abs(moved.logprobs - teacher.logprobs).max() > 1e-6
        if trace is None:
            assert num_wrong(recorded, teach(teacher_model, output)) == 0


def _logprobs(output: RequestOutput) -> np.ndarray:
    completion = output.outputs[0]
    assert completion.logprobs is not None
    pairs = zip(completion.logprobs, completion.token_ids, strict=True)
    return np.array([entry[token].logprob for entry, token in pairs])


def test_same_schedule_gives_the_same_bits(model_folder: Path):
    first = _llm(model_folder).generate(_prompts(), _params(6))
    second = _llm(model_folder).generate(_prompts(), _params(6))
    for one, two in zip(first, second, strict=True):
        assert np.array_equal(_logprobs(one), _logprobs(two))
        assert np.array_equal(one.outputs[0].routing.ids, two.outputs[0].routing.ids)


SCHEDULES = (
    {},
    {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    {"num_kv_blocks": 10, "max_num_seqs": 4},
    {"max_num_seqs": 1},
)


def test_batch_invariant_bits_are_equal_under_every_schedule(model_folder: Path):
    expected: list[RequestOutput] | None = None
    for settings in SCHEDULES:
        llm = _llm(model_folder, batch_invariant=True, **settings)
        outputs = llm.generate(_prompts(), _params(6, prompt_logprobs=0))
        if expected is None:
            expected = outputs
            check_against_teacher(model_folder, outputs)
        for one, two in zip(expected, outputs, strict=True):
            assert np.array_equal(_logprobs(one), _logprobs(two))
            assert one.prompt_logprobs == two.prompt_logprobs
            assert np.array_equal(one.outputs[0].routing.ids, two.outputs[0].routing.ids)
        warm = llm.generate(_prompts(), _params(6))  # prefix hits and forks change no bit either
        for one, two in zip(expected, warm, strict=True):
            assert np.array_equal(_logprobs(one), _logprobs(two))
    forked = _llm(model_folder, batch_invariant=True).generate([_prompts()[3]], _params(1, n=3))
    alone = _llm(model_folder, batch_invariant=True).generate(
        [_prompts()[3]],
        [SamplingParams(max_tokens=MAX_TOKENS, seed=2, logprobs=0, ignore_eos=True)],
    )
    third = RequestOutput(
        request_id="", prompt=None, prompt_token_ids=(), outputs=(forked[0].outputs[2],)
    )
    assert np.array_equal(_logprobs(third), _logprobs(alone[0]))
    # The twin: another expert in one row of one layer is seen in the bits.
    assert expected is not None
    trace = with_one_id_changed(expected[3].outputs[0].routing, 2, 0)
    changed = _llm(model_folder, batch_invariant=True).generate(
        [_prompts()[3]], _params(6)[3:4], replay=[trace]
    )
    assert not np.array_equal(_logprobs(changed[0]), _logprobs(expected[3]))


def test_batch_invariant_bits_are_equal_in_bfloat16(tmp_path: Path):
    shape = TinyShape(num_experts=16, top_k=4, num_layers=2)
    folder = save_tiny_model(tmp_path, shape)
    expected: list[RequestOutput] | None = None
    for settings in SCHEDULES:
        config = EngineConfig(block_size=8, batch_invariant=True, **settings)
        llm = LLM(folder, enable_return_routed_experts=True, config=config)
        outputs = llm.generate(_prompts(), _params(6))
        expected = expected or outputs
        for one, two in zip(expected, outputs, strict=True):
            assert np.array_equal(_logprobs(one), _logprobs(two))
            assert np.array_equal(one.outputs[0].routing.ids, two.outputs[0].routing.ids)
    plain = LLM(folder, config=EngineConfig(block_size=8)).generate(_prompts(), _params(6))
    assert expected is not None
    # The twin: without it, other sums leave other bits somewhere.
    assert any(
        not np.array_equal(_logprobs(one), _logprobs(two))
        for one, two in zip(expected, plain, strict=True)
    )


def test_prompt_logprobs_and_scoring_equal_transformers(model_folder: Path):
    import torch

    llm = _llm(model_folder, max_num_batched_tokens=11, max_num_seqs=3)
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    outputs = llm.generate(_prompts(), params)
    model = load_teacher(model_folder)
    for prompt, output in zip(_prompts(), outputs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].double()
        expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        entries = output.prompt_logprobs[1:]
        found = [entry[token].logprob for entry, token in zip(entries, prompt[1:], strict=True)]  # pyright: ignore[reportOptionalSubscript]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=0)
        completion = output.outputs[0]
        assert (completion.token_ids, completion.finish_reason) == ((), "length")
        assert completion.routing.num_rows == len(prompt) - 1
        completion.routing.validate(prompt)
    # Scoring under given routing: the trace of the sequence itself has exactly the rows that it takes.
    forced = [random_rows(output.outputs[0].routing, 3) for output in outputs]
    scored = llm.generate(_prompts(), params, replay=forced)
    for output, trace in zip(scored, forced, strict=True):
        assert np.array_equal(output.outputs[0].routing.ids, trace.ids)
    assert scored[3].prompt_logprobs != outputs[3].prompt_logprobs
