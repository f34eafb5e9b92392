"""A step ahead of the tokens: nothing changes for requests, and the classic races do not happen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay import LLM, RequestOutput, SamplingParams
from routing_replay.engine import EngineConfig

SHAPE = TinyShape(num_experts=8, top_k=2, num_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), SHAPE)


def _llm(folder: Path, *, is_async: bool, **settings: object) -> LLM:
    config = EngineConfig(block_size=8, batch_invariant=True, async_scheduling=is_async, **settings)  # pyright: ignore[reportArgumentType]
    return LLM(folder, dtype="float32", enable_return_routed_experts=True, config=config)


def _prompts(count: int, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(4, 90, length).tolist() for length in rng.integers(1, longest, count)]


def _told(outputs: Sequence[RequestOutput]) -> list[object]:
    """All that a user is told, routing position by position."""
    return [
        (item.token_ids, item.finish_reason, item.stop_reason, item.logprobs, item.routing.ids.tolist())
        for output in outputs
        for item in output.outputs
    ]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_kv_blocks": 10, "max_num_seqs": 4},
        {"num_kv_blocks": 10, "max_num_seqs": 4, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    ],
)
def test_nothing_changes_for_requests(folder: Path, settings: dict[str, object]):
    prompts = _prompts(7)
    shapes = [
        {"temperature": 0.0, "max_tokens": 20},
        {"seed": 1, "n": 3, "max_tokens": 9},
        {"seed": 2, "max_tokens": 14, "repetition_penalty": 1.3},
        {"seed": 3, "max_tokens": 17, "stop_token_ids": tuple(range(30, 60))},
        {"seed": 4, "max_tokens": 1},
        {"seed": 5, "max_tokens": 12, "min_tokens": 4, "top_k": 5, "stop_token_ids": tuple(range(0, 90, 2))},
        {"seed": 6, "max_tokens": 8, "logprobs": 3, "prompt_logprobs": 0},
    ]  # fmt: skip
    params = [SamplingParams(**{"logprobs": 0, **shape}) for shape in shapes]  # pyright: ignore[reportArgumentType]
    expected, found = (
        _llm(folder, is_async=is_async, **settings).generate(prompts, params)
        for is_async in (False, True)
    )
    assert _told(found) == _told(expected)
    assert [item.prompt_logprobs for item in found] == [item.prompt_logprobs for item in expected]
    if settings.get("num_kv_blocks") == 10:
        assert sum(item.num_preemptions for item in found) > 0


def test_token_past_the_end_is_computed_and_never_seen(folder: Path):
    """The step in flight when a stop token arrives has computed a row for it; neither row nor KV outlives the request."""
    llm = _llm(folder, is_async=True)
    prompt = [5, 6, 7]
    # A seed whose tokens have one that comes only once, and would fill a KV block if it were an input.
    end = 12
    assert (len(prompt) + end + 1) % 8 == 0
    for seed in range(20):
        free = SamplingParams(seed=seed, max_tokens=20, ignore_eos=True)
        tokens = llm.generate([prompt], free)[0].outputs[0].token_ids
        if tokens[end] not in tokens[:end]:
            break
    else:
        raise AssertionError("no example found")
    rows_seen: list[tuple[int, int]] = []
    pipeline = llm.core.runner.pipeline
    assert pipeline is not None
    submit = pipeline.submit

    def watch(spans, **options):  # noqa: ANN001, ANN003
        rows_seen.extend((span.start, span.num_rows) for span in spans)
        return submit(spans, **options)

    pipeline.submit = watch  # pyright: ignore[reportAttributeAccessIssue]
    llm.core.reset_prefix_cache()
    params = SamplingParams(
        seed=seed, max_tokens=20, ignore_eos=True, stop_token_ids=(tokens[end],)
    )
    output = llm.generate([prompt], params)[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (tokens[: end + 1], "stop")
    assert output.routing.num_rows == len(prompt) + end
    assert (
        max(start for start, _ in rows_seen) == len(prompt) + end
    )  # the row of the stop token itself
    again = llm.generate([[*prompt, *output.token_ids, 9]], SamplingParams(max_tokens=1))[0]
    assert again.num_cached_tokens == 8, "the block that holds the discarded row was offered"


def test_slot_is_given_on_while_its_old_step_runs(folder: Path):
    llm = _llm(folder, is_async=True, max_num_seqs=1)
    prompts = _prompts(6, longest=9)
    params = [SamplingParams(seed=i, max_tokens=1 + i % 4, ignore_eos=True) for i in range(6)]
    together = llm.generate(prompts, params)
    alone = [llm.generate([prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)]
    assert _told(together) == _told(alone)


def test_abort_with_a_step_in_flight_frees_once(folder: Path):
    llm = _llm(folder, is_async=True, num_kv_blocks=20)
    core = llm.core
    requests = [
        core.make_requests(prompt, SamplingParams(seed=i, max_tokens=30, ignore_eos=True))[0]
        for i, prompt in enumerate(_prompts(3))
    ]
    for request in requests:
        core.scheduler.add(request)
    for _ in range(4):
        core.step()
    aborted = core.abort(requests[1].request_id)
    assert aborted is not None
    assert aborted.request.finish_reason == "abort"
    assert aborted.trace is not None
    assert aborted.trace.num_rows == len(aborted.request.token_ids) - 1
    assert core.abort(requests[1].request_id) is None
    others = {item.request.request_id for item in core.run(())}
    assert others == {requests[0].request_id, requests[2].request_id}
    assert core.kv_blocks.num_free == core.kv_blocks.num_blocks


def test_abort_of_a_request_that_ends_in_the_step_in_flight_returns_it_finished(folder: Path):
    core = _llm(folder, is_async=True).core
    request = core.make_requests([4, 5], SamplingParams(seed=0, max_tokens=1))[0]
    core.scheduler.add(request)
    assert core.step() == []
    finished = core.abort(request.request_id)
    assert finished is not None
    assert finished.request.finish_reason in ("length", "stop")
    assert not core.has_work


def test_weights_change_between_steps_and_rows_know_it(folder: Path):
    core = _llm(folder, is_async=True).core
    request = core.make_requests([4, 5, 6], SamplingParams(seed=0, max_tokens=8, ignore_eos=True))[
        0
    ]
    core.scheduler.add(request)
    for _ in range(3):
        core.step()
    known = len(request.token_ids)
    core.update_weights([], weights_version=5)
    assert len(request.token_ids) == known + 1, (
        "the step in flight was settled with the old weights"
    )
    finished = [*core.run(())]
    assert finished[0].trace is not None
    assert finished[0].trace.weights_version == ((0, 0), (known, 5))
