"""A step that fails ends its own requests, with the reason; two in a row end the engine."""

from pathlib import Path

import pytest
import torch

from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay import LLM, SamplingParams
from routing_replay.engine import EngineConfig
from routing_replay.engine.runner import LaunchedStep
from routing_replay.engine.scheduler import Schedule
from routing_replay.errors import EngineStoppedError, StepError

SHAPE = TinyShape(num_experts=8, top_k=2, num_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), SHAPE)


def _llm(folder: Path, **settings: object) -> LLM:
    config = EngineConfig(block_size=8, **settings)  # pyright: ignore[reportArgumentType]
    return LLM(folder, dtype="float32", enable_return_routed_experts=True, config=config)


def _break_steps(llm: LLM, broken: set[int], error: Exception) -> None:
    """Let the launches of these numbers, from 1 on, fail after the layers have run."""
    launch, count = llm.core.runner.launch, 0

    def fail(schedule: Schedule, *, weights_version: int) -> LaunchedStep:
        nonlocal count
        count += 1
        if count in broken:
            llm.core.runner.pipeline.device_cache.layer(0)[:2] = 3  # pyright: ignore[reportOptionalMemberAccess]
            raise error
        return launch(schedule, weights_version=weights_version)

    llm.core.runner.launch = fail  # pyright: ignore[reportAttributeAccessIssue]


def _is_clean(llm: LLM) -> bool:
    pipeline = llm.core.runner.pipeline
    assert pipeline is not None
    pipeline.drain()
    blocks = llm.core.kv_blocks
    return blocks.num_free == blocks.num_blocks and pipeline.host_cache.num_requests == 0


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("kernel")])
def test_step_that_fails_ends_its_requests_alone(folder: Path, is_async: bool, error: Exception):
    llm = _llm(folder, async_scheduling=is_async, max_num_seqs=2, num_kv_blocks=12)
    _break_steps(llm, {4}, error)
    params = [SamplingParams(seed=i, max_tokens=12, ignore_eos=True) for i in range(5)]
    outputs = [item.outputs[0] for item in llm.generate([[4 + i, 5, 6] for i in range(5)], params)]
    failed = [item for item in outputs if item.finish_reason == "error"]
    assert [item.finish_reason for item in outputs] == ["error", "error", *["length"] * 3]
    for item in failed:
        assert isinstance(item.error, StepError)
        assert str(error) in str(item.error)
        with pytest.raises(StepError):
            _ = item.routing
    for item in outputs[2:]:
        assert item.routing.is_complete
    assert _is_clean(llm)


def test_rows_of_a_failed_step_never_pass_as_later_ones(folder: Path):
    """The step that failed has left ids in the device cache; a layer that then writes nothing must still be found out."""
    llm = _llm(folder, max_num_seqs=1)
    _break_steps(llm, {2}, RuntimeError("kernel"))
    cache = llm.core.runner.pipeline.device_cache  # pyright: ignore[reportOptionalMemberAccess]
    llm.generate([[4, 5]], SamplingParams(seed=0, max_tokens=4))
    layer = cache.layer
    dead = torch.empty_like(layer(0))
    cache.layer = lambda index: layer(index) if index else dead  # pyright: ignore[reportAttributeAccessIssue]
    output = llm.generate([[4, 5]], SamplingParams(seed=0, max_tokens=4))[0].outputs[0]
    assert output.finish_reason == "error"
    assert "layer 0 wrote no ids" in str(output.error)


@pytest.mark.parametrize("is_async", [False, True])
def test_second_failure_in_a_row_stops_the_engine(folder: Path, is_async: bool):
    llm = _llm(folder, async_scheduling=is_async, max_num_seqs=1)
    _break_steps(llm, {3, 4}, RuntimeError("device lost"))
    with pytest.raises(EngineStoppedError, match=r"two steps in a row failed.*device lost"):
        llm.generate(
            [[4, 5], [6, 7], [8, 9]], SamplingParams(seed=0, max_tokens=9, ignore_eos=True)
        )
    with pytest.raises(EngineStoppedError):
        llm.generate([[4, 5]], SamplingParams(max_tokens=2))
    assert _is_clean(llm)


def test_failures_that_do_not_follow_each_other_do_not_stop_it(folder: Path):
    llm = _llm(folder, max_num_seqs=1)
    _break_steps(llm, {3, 6, 9}, RuntimeError("kernel"))
    outputs = llm.generate([[4 + i, 5] for i in range(6)], SamplingParams(seed=0, max_tokens=6, ignore_eos=True))  # fmt: skip
    assert [item.outputs[0].finish_reason for item in outputs].count("error") == 3


@pytest.mark.parametrize("is_async", [False, True])
def test_poisoned_logits_fail_the_request_they_belong_to(folder: Path, is_async: bool):
    llm = _llm(folder, async_scheduling=is_async)
    weight = llm.core.runner.model.embed_tokens.weight
    before = weight[7].clone()
    weight[7] = torch.nan
    outputs = llm.generate([[4, 5], [6, 7]], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))  # fmt: skip
    good, bad = (item.outputs[0] for item in outputs)
    assert good.finish_reason == "length" or 7 in good.token_ids
    assert bad.finish_reason == "error"
    assert "logits after token index 1 are not finite" in str(bad.error)
    weight[7] = before
    assert llm.generate([[6, 7]], SamplingParams(max_tokens=2))[0].outputs[0].routing.is_complete
    assert _is_clean(llm)
