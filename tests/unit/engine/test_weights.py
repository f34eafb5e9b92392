"""Weights change between steps, whole or not at all as far as requests can see."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay import LLM, RequestOutput, SamplingParams
from routing_replay.capture.staging import CpuStaging
from routing_replay.engine import EngineConfig
from routing_replay.errors import ConfigError, UnsupportedModelError
from routing_replay.models import weight_files

SHAPE = TinyShape(num_experts=8, top_k=2, num_layers=2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=0)
PROMPTS = [[4, 5, 6], [7] * 20, list(range(10, 40))]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("old"), SHAPE)


@pytest.fixture(scope="module")
def new(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model after a training step that changed every tensor."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("new")
    (folder / "config.json").write_text((old / "config.json").read_text())
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(old / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(params=["inline", "threaded"])
def _collecting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are collected by the caller, or by the thread that a GPU has."""
    monkeypatch.setattr(CpuStaging, "is_asynchronous", request.param == "threaded")


def _llm(folder: Path, **settings: object) -> LLM:
    config = EngineConfig(block_size=8, batch_invariant=True, **settings)  # pyright: ignore[reportArgumentType]
    return LLM(folder, dtype="float32", device="cpu", enable_return_routed_experts=True, config=config)  # fmt: skip


def _told(outputs: list[RequestOutput]) -> list[object]:
    return [
        (item.outputs[0].token_ids, item.outputs[0].logprobs, item.outputs[0].routing.ids.tolist())
        for item in outputs
    ]


def _tensors(folder: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(folder / "model.safetensors").items())


@pytest.mark.usefixtures("_collecting")
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("source", ["tensors", "folder"])
def test_new_weights_are_all_that_later_requests_see(
    old: Path, new: Path, source: str, is_async: bool
):
    llm = _llm(old, async_scheduling=is_async)
    before = llm.generate(PROMPTS, GREEDY)
    if source == "tensors":
        llm.update_weights(_tensors(new), weights_version=3)
    else:
        llm.load_weights(new, weights_version=3)
    after = llm.generate(PROMPTS, GREEDY)
    assert _told(after) == _told(_llm(new).generate(PROMPTS, GREEDY))
    assert _told(after) != _told(before)
    assert all(item.num_cached_tokens == 0 for item in after)
    assert {item.outputs[0].routing.weights_version for item in after} == {((0, 3),)}
    llm.load_weights(old, weights_version=4)
    assert _told(llm.generate(PROMPTS, GREEDY)) == _told(before)
    llm.close()


def test_weights_arrive_from_another_process(old: Path, new: Path, tmp_path: Path):
    peer = str(Path(__file__).with_name("receiving_peer.py"))
    peers = [
        subprocess.Popen(
            [sys.executable, peer, str(rank), str(old), str(new), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [peer.communicate(timeout=100)[0] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    assert [peer.returncode for peer in peers] == [0, 0], outputs
    told = json.loads((tmp_path / "told.json").read_text())
    params = SamplingParams(temperature=0.0, max_tokens=9)
    expected = _llm(new).generate([[4, 5, 6]], params)[0].outputs[0]
    assert tuple(told["tokens"]) == expected.token_ids
    assert told["versions"] == [[0, 4]]


@pytest.mark.usefixtures("_collecting")
def test_cache_may_be_kept(old: Path):
    llm = _llm(old)
    llm.generate(PROMPTS[2:], GREEDY)
    llm.update_weights([], weights_version=1, reset_prefix_cache=False)
    kept = llm.generate(PROMPTS[2:], GREEDY)[0]
    assert (kept.num_cached_tokens, kept.outputs[0].routing.weights_version) == (24, ((0, 0), (24, 1)))  # fmt: skip
    llm.update_weights([], weights_version=2)
    assert llm.generate(PROMPTS[2:], GREEDY)[0].num_cached_tokens == 0


def test_running_request_offers_no_blocks_of_mixed_weights(old: Path, new: Path):
    """Keys and values that it computes after an update stand on those from before: nobody else may continue from them."""
    llm = _llm(old)
    core = llm.core
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    request = core.make_requests([4] * 13, params)[0]
    core.scheduler.add(request)
    for _ in range(2):
        core.step()
    llm.load_weights(new, weights_version=1)
    (ended,) = core.run(())
    mixed = ended.request.token_ids
    # The whole blocks of a prompt with new weights, then what the old request has put behind them.
    first = llm.generate([mixed[:17]], SamplingParams(temperature=0.0, max_tokens=1))[0]
    assert first.num_cached_tokens == 0
    second = llm.generate([mixed], GREEDY)
    assert second[0].num_cached_tokens == 16
    assert _told(second) == _told(_llm(new).generate([mixed], GREEDY))


def _breaking(folder: Path, count: int, error: Exception) -> Iterator[tuple[str, torch.Tensor]]:
    """A trainer that dies after so many tensors."""
    yield from _tensors(folder)[:count]
    raise error


def _wrong(folder: Path, count: int) -> list[tuple[str, torch.Tensor]]:
    return [*_tensors(folder)[:count], ("model.norm.weight", torch.zeros(3))]


@pytest.mark.usefixtures("_collecting")
@pytest.mark.parametrize("case", ["iterator", "name", "shape", "version", "folder", "file", "receive"])  # fmt: skip
def test_update_that_does_not_begin_changes_nothing(
    old: Path, new: Path, tmp_path: Path, case: str
):
    llm = _llm(old)
    before = llm.generate(PROMPTS, GREEDY)
    if case == "iterator":
        with pytest.raises(OSError, match="gone"):
            llm.update_weights(_breaking(new, 0, OSError("gone")), weights_version=1)
    elif case == "name":
        with pytest.raises(UnsupportedModelError, match="nonsense"):
            llm.update_weights([("nonsense", torch.zeros(1))], weights_version=1)
    elif case == "shape":
        with pytest.raises(UnsupportedModelError, match="shape"):
            llm.update_weights(_wrong(new, 0), weights_version=1)
    elif case == "version":
        with pytest.raises(ConfigError, match="weights_version=-1"):
            llm.update_weights(_tensors(new), weights_version=-1)
    elif case == "folder":
        other = save_tiny_model(tmp_path, TinyShape(num_experts=4, top_k=2, num_layers=2))
        with pytest.raises(UnsupportedModelError, match="num_experts"):
            llm.load_weights(other, weights_version=1)
    elif case == "file":
        (tmp_path / "config.json").write_text((new / "config.json").read_text())
        data = (new / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[:-100])
        with pytest.raises(ConfigError, match="cannot be read"):
            llm.load_weights(tmp_path, weights_version=1)
    else:
        from routing_replay.models import describe_weights

        with pytest.raises(UnsupportedModelError, match="shape"):
            llm.receive_weights(describe_weights(_wrong(new, 3)), weights_version=1)
    after = llm.generate(PROMPTS, GREEDY)
    assert _told(after) == _told(before)
    assert after[2].num_cached_tokens == 24, "what is cached still fits"
    assert after[0].outputs[0].routing.weights_version == ((0, 0),)


@pytest.mark.usefixtures("_collecting")
@pytest.mark.parametrize("case", ["iterator", "shape", "placing", "file"])
def test_update_that_fails_halfway_stops_requests_until_one_succeeds(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch, case: str
):
    llm = _llm(old)
    llm.generate(PROMPTS, GREEDY)
    if case == "iterator":
        with pytest.raises(OSError, match="gone"):
            llm.update_weights(_breaking(new, 1, OSError("gone")), weights_version=1)
    elif case == "shape":
        with pytest.raises(UnsupportedModelError, match="shape"):
            llm.update_weights(_wrong(new, 1), weights_version=1)
    elif case == "placing":
        half = torch.zeros(32).to_sparse()  # nothing that can be copied into a weight
        monkeypatch.setattr(torch.Tensor, "copy_", _fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.update_weights([("model.norm.weight", half)], weights_version=1)
    else:
        reads = iter(range(100))
        read = weight_files._read  # pyright: ignore[reportPrivateUsage]

        def broken(file, offset, target):  # noqa: ANN001
            if next(reads) == 3:
                raise OSError("disk")
            read(file, offset, target)

        monkeypatch.setattr(weight_files, "_read", broken)
        with pytest.raises(ConfigError, match="disk"):
            llm.load_weights(new, weights_version=1)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"failed halfway \(to version 1: .*load_weights\(\)"):
            llm.generate(PROMPTS, GREEDY)
    with pytest.raises(UnsupportedModelError):  # one more that does not even begin
        llm.update_weights(_wrong(new, 0), weights_version=2)
    with pytest.raises(ConfigError, match="failed halfway"):
        llm.generate(PROMPTS, GREEDY)
    llm.load_weights(new, weights_version=2)
    after = llm.generate(PROMPTS, GREEDY)
    assert _told(after) == _told(_llm(new).generate(PROMPTS, GREEDY))
    assert after[0].outputs[0].routing.weights_version == ((0, 2),)


def _fail(*_: object, **__: object) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.usefixtures("_collecting")
@pytest.mark.parametrize("is_async", [False, True])
def test_running_requests_end_when_an_update_fails_halfway(old: Path, new: Path, is_async: bool):
    llm = _llm(old, async_scheduling=is_async)
    core = llm.core
    running = core.run(core.make_requests([4, 5], GREEDY))
    core.scheduler.add(core.make_requests([6, 7], SamplingParams(max_tokens=1))[0])
    next(running)  # the short one has ended
    with pytest.raises(OSError, match="gone"):
        llm.update_weights(_breaking(new, 4, OSError("gone")), weights_version=1)
    with pytest.raises(ConfigError, match="failed halfway"):
        next(running)
    pipeline = core.runner.pipeline
    assert pipeline is not None
    pipeline.drain()
    assert pipeline.host_cache.num_requests == 0
    assert core.kv_blocks.num_free == core.kv_blocks.num_blocks
    assert not core.has_work
    llm.load_weights(old, weights_version=2)
    assert llm.generate(PROMPTS, GREEDY)[0].outputs[0].routing.is_complete


def test_dummy_weights_follow_the_seed_and_tables_the_longest_sequence(old: Path):
    def made(**settings: object) -> LLM:
        return _llm(old, load_format="dummy", **settings)

    def weights(llm: LLM) -> torch.Tensor:
        return llm.core.runner.model.embed_tokens.weight

    one = made(seed=1, max_model_len=50)
    assert torch.equal(weights(one), weights(made(seed=1)))
    assert not torch.equal(weights(one), weights(made(seed=2)))
    assert one.core.runner.model.rotary[0].shape[0] == 56
    assert made().core.runner.model.rotary[0].shape[0] == 256
    longest = one.generate([[4] * 41], SamplingParams(seed=0, max_tokens=9, ignore_eos=True))[0]
    assert longest.outputs[0].routing.num_rows == 49
