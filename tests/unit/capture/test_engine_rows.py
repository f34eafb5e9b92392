"""Which rows a request gets when prefixes are shared, blocks reused, weights changed, and rows are not there."""

from pathlib import Path

import numpy as np
import pytest
import torch

from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay import LLM, SamplingParams
from routing_replay.capture import StepRows, UncachedPrefix
from routing_replay.engine import EngineConfig

PREFIX = list(range(1, 17))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyShape(num_experts=8, top_k=2, num_layers=2)
    return save_tiny_model(tmp_path_factory.mktemp("model"), shape)


def _llm(folder: Path, **settings: object) -> LLM:
    config = EngineConfig(block_size=8, **settings)  # pyright: ignore[reportArgumentType]
    return LLM(folder, dtype="float32", enable_return_routed_experts=True, config=config)


def _params(seed: int = 0, max_tokens: int = 4) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)


def test_samples_that_computed_the_same_prefix_keep_their_own_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    llm = _llm(folder)
    pipeline = llm.core.runner.pipeline
    assert pipeline is not None
    gather = pipeline.device_cache.gather

    def differ(num_rows: int, *, num_reset: int, out: StepRows) -> None:
        """Give the second sample other experts at its third token, as another kernel might pick."""
        gather(num_rows, num_reset=num_reset, out=out)
        if num_rows == 2 * len(PREFIX) + 2:
            out.rows[len(PREFIX) + 1 + 2] = (out.rows[len(PREFIX) + 1 + 2] + 1) % 8

    monkeypatch.setattr(pipeline.device_cache, "gather", differ)
    first, second = llm.generate([[*PREFIX, 20], [*PREFIX, 21]], [_params(), _params()])
    monkeypatch.undo()
    one, two = first.outputs[0].routing.ids, second.outputs[0].routing.ids
    assert (one[:16] != two[:16]).any(axis=(1, 2)).nonzero()[0].tolist() == [2]
    # A later hit takes the rows of the blocks that it attends to: those that were published first.
    third = llm.generate([[*PREFIX, 22]], _params())[0]
    assert third.num_cached_tokens == 16
    assert np.array_equal(third.outputs[0].routing.ids[:16], one[:16])


def test_block_that_was_reused_never_gives_its_old_rows(folder: Path):
    llm = _llm(folder, num_kv_blocks=4, max_num_seqs=1)
    before = llm.generate([[*PREFIX, 20]], _params())[0].outputs[0].routing
    for start in range(30, 60, 5):  # every block changes hands
        llm.generate([list(range(start, start + 17))], _params())
    again = llm.generate([[*PREFIX, 20]], _params())[0]
    assert again.num_cached_tokens == 0
    assert np.array_equal(again.outputs[0].routing.ids, before.ids)


@pytest.mark.parametrize("policy", list(UncachedPrefix))
def test_prefix_hit_without_rows_follows_the_policy(folder: Path, policy: UncachedPrefix):
    llm = _llm(folder, uncached_prefix=policy)
    cold = llm.generate([[*PREFIX, 20]], _params())[0].outputs[0]
    pipeline = llm.core.runner.pipeline
    assert pipeline is not None
    # Forget the rows of the second block, as if its keys and values had come from elsewhere.
    pipeline.host_cache._block_valid[1] = False  # pyright: ignore[reportPrivateUsage]
    warm = llm.generate([[*PREFIX, 20]], _params())[0]
    trace = warm.outputs[0].routing
    assert warm.outputs[0].token_ids == cold.token_ids
    if policy is UncachedPrefix.RECOMPUTE:
        assert warm.num_cached_tokens == 8
        assert trace.is_complete
        assert np.array_equal(trace.ids, cold.routing.ids)
    else:
        assert warm.num_cached_tokens == 16
        assert np.flatnonzero(~trace.valid).tolist() == list(range(8, 16))
        assert np.array_equal(trace.ids[trace.valid], cold.routing.ids[trace.valid])


def test_preempted_request_keeps_the_rows_of_its_first_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    llm = _llm(folder, num_kv_blocks=6, max_num_seqs=2, enable_prefix_caching=False)
    pipeline = llm.core.runner.pipeline
    assert pipeline is not None
    append, log = pipeline.host_cache.append, list[tuple[str, int, int]]()

    def record(name: str, start: int, ids: np.ndarray, *, weights_version: int) -> None:
        log.append((name, start, len(ids)))
        marked = ids if start or name != "2" or len(ids) < 18 else 7 - ids  # a second pass differs
        append(name, start, marked, weights_version=weights_version)

    monkeypatch.setattr(pipeline.host_cache, "append", record)
    outputs = llm.generate([[*PREFIX, 20], [*PREFIX, 21]], _params(max_tokens=14))
    assert outputs[1].num_preemptions == 1
    recomputed = [count for name, start, count in log if name == "2" and start == 0 and count > 17]
    assert len(recomputed) == 1
    alone = _llm(folder).generate([[*PREFIX, 21]], _params(max_tokens=14))[0].outputs[0]
    assert outputs[1].outputs[0].token_ids == alone.token_ids
    found, expected = outputs[1].outputs[0].routing.ids, alone.routing.ids
    # Only the last token that it had when it gave way was new to the second pass.
    new = recomputed[0] - 1
    assert np.array_equal(np.delete(found, new, 0), np.delete(expected, new, 0))
    assert np.array_equal(found[new], 7 - expected[new])


def test_rows_carry_the_version_of_the_weights_that_computed_them(folder: Path):
    llm = _llm(folder)
    core = llm.core
    request = core.make_requests([*PREFIX, 20], _params(max_tokens=6))[0]
    core.scheduler.add(request)
    for _ in range(3):
        core.step()
    state = core.runner.model.fused_places()
    name = "model.layers.0.mlp.experts.down_proj"
    old = state[name][0].clone()
    llm.update_weights([(name, torch.zeros_like(old))], weights_version=7)
    finished = []
    while not finished:
        finished = core.step()
    trace = finished[0].trace
    assert trace is not None
    assert trace.weights_version == ((0, 0), (19, 7))
    # Cached prefixes of the old weights are gone; new requests carry the new version alone.
    output = llm.generate([[*PREFIX, 20]], _params())[0]
    assert (output.num_cached_tokens, output.outputs[0].routing.weights_version) == (0, ((0, 7),))
    llm.update_weights([(name, old)], weights_version=8)
    fresh = _llm(folder).generate([[*PREFIX, 20]], _params())[0].outputs[0]
    assert llm.generate([[*PREFIX, 20]], _params())[0].outputs[0].token_ids == fresh.token_ids


def test_ten_thousand_requests_leave_memory_flat(folder: Path):
    llm = _llm(folder, max_num_seqs=128, num_kv_blocks=512)
    pipeline = llm.core.runner.pipeline
    assert pipeline is not None
    rng = np.random.default_rng(0)

    def serve(count: int) -> None:
        prompts = rng.integers(1, 90, (count, 9)).tolist()
        for output in llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True)):
            assert output.outputs[0].routing.num_rows == 11

    serve(1000)
    before = _resident_bytes()
    for _ in range(18):
        serve(500)
    grown = _resident_bytes() - before
    assert pipeline.host_cache.num_requests == 0
    assert pipeline.host_cache.nbytes == 0
    assert llm.core.kv_blocks.num_free == 512
    # 9,000 requests with their 99,000 rows would hold 0.4 MB in ids alone, and far more in objects.
    assert grown < 4e6


def _resident_bytes() -> int:
    import gc

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
