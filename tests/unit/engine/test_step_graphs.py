"""Steps that graphs run are those that run without: the same tokens, logprobs, rows, keys and values."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from _support.fake_graphs import FakeRecorder, lay_out_as_gpu, record_on_cpu
from _support.mtp_models import save_mtp_model
from _support.teacher import random_rows
from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay import LLM, RequestOutput, SamplingParams
from routing_replay.capture import BlockRef
from routing_replay.engine import EngineConfig
from routing_replay.engine.draws import Draws
from routing_replay.engine.graphs import GraphShape, StepGraphs, graph_shapes
from routing_replay.engine.request import Request
from routing_replay.engine.scheduler import ScheduledRequest
from routing_replay.engine.step_buffers import StepArrays
from routing_replay.engine.step_builder import StepBuilder
from routing_replay.errors import CaptureError, ConfigError

SHAPE = TinyShape(num_experts=8, top_k=2, num_layers=2)
SIZES, TOKENS = (1, 2, 4), (4, 8, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), SHAPE)


@pytest.fixture
def _recording(monkeypatch: pytest.MonkeyPatch) -> None:
    record_on_cpu(monkeypatch)
    lay_out_as_gpu(monkeypatch)


def _llm(folder: Path, *, eager: bool = False, **settings: object) -> LLM:
    settings = {"batch_invariant": True, "max_num_seqs": 4, "block_size": 8, "cuda_graph_sizes": SIZES,
                "cuda_graph_tokens": TOKENS, "max_num_batched_tokens": 64, "enforce_eager": eager, **settings}  # fmt: skip
    return LLM(folder, dtype="float32", device="cpu", enable_return_routed_experts=True, config=EngineConfig(**settings))  # fmt: skip  # pyright: ignore[reportArgumentType]


def _told(outputs: list[RequestOutput]) -> list[object]:
    """All that a user is told, logprobs as exact values, routing position by position."""
    return [
        (item.token_ids, item.finish_reason, item.logprobs, item.routing.ids.tolist(), output.prompt_logprobs)
        for output in outputs
        for item in output.outputs
    ]  # fmt: skip


def _counted(llm: LLM) -> dict[str, int]:
    """Steps by graph: `d4` is four decoding requests, `t16f` sixteen tokens of any, some forced."""
    counts = llm.core.runner.num_graph_steps
    return {
        f"{'d' if shape.is_decode else 't'}{shape.num_tokens}{'f' if is_forced else ''}": count
        for (shape, is_forced), count in counts.items()
    }


def _prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(4, 90, length).tolist() for length in lengths]


@pytest.mark.usefixtures("_recording")
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17])
def test_bucket_boundaries(folder: Path, length: int):
    """The prompt is a step of its own; its graph is the smallest that holds it, and past the last there is none."""
    params = SamplingParams(seed=1, max_tokens=4, logprobs=2, prompt_logprobs=1)
    eager, llm = (_llm(folder, eager=eager) for eager in (True, False))
    expected, found = (item.generate(_prompts(length), params) for item in (eager, llm))
    assert _told(found) == _told(expected)
    fitting = [f"t{size}" for size in TOKENS if length <= size][:1]
    if length == 1:  # which is one token of a sequence, sampled from: what decoding is
        assert _counted(llm) == {"d1": 4}
    else:
        assert _counted(llm) == dict.fromkeys(fitting, 1) | {"d1": 3}
    assert not _counted(eager)
    assert torch.equal(llm.core.runner._kv_cache, eager.core.runner._kv_cache)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.usefixtures("_recording")
@pytest.mark.parametrize("company", [0, 1, 3])
@pytest.mark.parametrize("length", [3, 4, 5, 11, 12, 13])
def test_prefill_beside_decoding_requests(folder: Path, length: int, company: int):
    """Mixed steps at the boundaries: requests that decode, and one that arrives when they do."""
    found: list[object] = []
    for eager in (True, False):
        llm = _llm(folder, eager=eager)
        core = llm.core
        params = [SamplingParams(seed=i, max_tokens=9, logprobs=0) for i in range(company + 1)]
        prompts = _prompts(*range(3, 3 + company), length)
        requests = [core.make_requests(*item)[0] for item in zip(prompts, params, strict=True)]
        for request in requests[:-1]:
            core.scheduler.add(request)
        ended = [*core.step(), *core.step()]
        core.scheduler.add(requests[-1])
        while core.has_work:
            ended += core.step()
        traces = {item.request.request_id: item.trace for item in ended}
        found.append([
            (r.token_ids, r.logprobs, traces[r.request_id].ids.tolist())  # pyright: ignore[reportOptionalMemberAccess]
            for r in requests
        ])  # fmt: skip
        total = length + company
        fitting = next((f"t{size}" for size in TOKENS if total <= size), None)
        assert eager or fitting is None or fitting in _counted(llm)
    assert found[0] == found[1]


SETTINGS: dict[str, dict[str, object]] = {
    "whole": {},
    "overlap": {"async_scheduling": True},
    "chunked": {"max_num_batched_tokens": 7},
    "chunked overlap": {"max_num_batched_tokens": 7, "async_scheduling": True},
    "preempted": {"num_kv_blocks": 10, "max_num_batched_tokens": 16},
    "preempted overlap": {
        "num_kv_blocks": 10,
        "async_scheduling": True,
        "max_num_batched_tokens": 16,
    },
    "drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
    "chunked drafts": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
        "max_num_batched_tokens": 7,
    },
}


def _params() -> list[SamplingParams]:
    shapes = [
        {"temperature": 0.0, "max_tokens": 9},
        {"seed": 1, "n": 3, "max_tokens": 7},
        {"seed": 2, "max_tokens": 9, "repetition_penalty": 1.3},
        {"seed": 4, "max_tokens": 1},
        {"seed": 5, "max_tokens": 8, "min_tokens": 4, "top_k": 5, "stop_token_ids": tuple(range(0, 90, 2))},
        {"seed": 6, "max_tokens": 8, "logprobs": 3, "prompt_logprobs": 0},
        {"temperature": 0.0, "max_tokens": 16},
    ]  # fmt: skip
    return [SamplingParams(**{"logprobs": 0, **shape}) for shape in shapes]  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("_recording")
@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_changes_for_requests(folder: Path, name: str):
    """Natively, on cached prefixes, and with every other request forced beside native ones."""
    settings = SETTINGS[name]
    most = settings.get("max_num_batched_tokens", 64)
    settings = {**settings, "cuda_graph_tokens": (4, 7) if most == 7 else (4, 12, most)}
    prompts = [*_prompts(3, 14, 22, 1, 9, 17), [5, 6] * 9]
    eager, llm = (_llm(folder, eager=eager, **settings) for eager in (True, False))
    cold = eager.generate(prompts, _params())
    expected = [cold, eager.generate(prompts, _params())]
    for outputs in expected:
        assert _told(llm.generate(prompts, _params())) == _told(outputs)
    assert _counted(llm)[f"t{most}"] > 0
    if "preempted" in name:
        assert sum(item.num_preemptions for item in cold) > 0
    if "drafts" in name:
        assert sum(item.num_accepted_tokens for item in cold) > 0
    single = [replace(params, n=1) for params in _params()]
    plain = eager.generate(prompts, single)
    traces = [
        random_rows(item.outputs[0].routing, i) if i % 2 else None for i, item in enumerate(plain)
    ]
    forced = [item.generate(prompts, single, replay=traces) for item in (eager, llm)]
    assert _told(forced[1]) == _told(forced[0])
    for output, trace in zip(forced[1], traces, strict=True):
        if trace is not None:
            found = output.outputs[0].routing.ids
            assert len(found) >= len(output.prompt_token_ids)
            assert np.array_equal(found, trace.ids[: len(found)])
    assert any(key.endswith("f") and key[0] == "t" for key in _counted(llm))


@pytest.mark.usefixtures("_recording")
@pytest.mark.parametrize("depths", [1, 2])
def test_hidden_states_for_drafting_layers(tmp_path: Path, depths: int):
    """Layers that draft take the rows of a graph's outputs before the next step writes over them."""
    save_mtp_model(tmp_path, SHAPE, depths=depths, repeats=True)
    drafting = {"speculative_config": {"method": "mtp", "num_speculative_tokens": depths}}
    params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=0)
    prompts = _prompts(3, 9, 17, 5, 2)
    eager, llm = (_llm(tmp_path, eager=eager, **drafting) for eager in (True, False))
    expected, found = (item.generate(prompts, params) for item in (eager, llm))
    assert _told(found) == _told(expected)
    drafts = [[(o.num_draft_tokens, o.num_accepted_tokens) for o in item] for item in (found, expected)]  # fmt: skip
    assert drafts[0] == drafts[1]
    assert sum(accepted for _, accepted in drafts[0]) > 0
    assert any(key[0] == "t" for key in _counted(llm))


def _parts(llm: LLM, *counts: int) -> list[ScheduledRequest]:
    """Parts of a step, each a prompt's first tokens with a block of its own."""
    parts: list[ScheduledRequest] = []
    for slot, count in enumerate(counts):
        request = Request(
            request_id=str(slot), prompt=None, token_ids=list(range(4, 4 + count)), num_prompt_tokens=count,
            params=SamplingParams(max_tokens=1, temperature=0.0), draws=Draws(0), eos_token_ids=(), slot=slot,
            blocks=[BlockRef(1 + slot, 0)],
        )  # fmt: skip
        parts.append(
            ScheduledRequest(
                request=request, start=0, num_tokens=count, num_samples=1, first_output=0
            )
        )
    assert llm.core.config.engine.block_size >= max(counts)
    return parts


@pytest.mark.usefixtures("_recording")
@pytest.mark.parametrize("counts", [(3,), (1, 6), (1, 1, 1, 5), (2, 2, 2, 2)])
def test_inputs_have_the_addresses_of_the_recording(folder: Path, counts: tuple[int, ...]):
    """And what a recording fixes on the host holds for every step of its shape."""
    llm = _llm(folder)
    builder = llm.core.runner._builder  # pyright: ignore[reportPrivateUsage]
    shape = GraphShape(8, is_decode=False)
    recorded, step = builder.inputs_of_shape(shape)
    tensors, own = builder.build(_parts(llm, *counts), shape=shape, capture_step=3)
    assert len(tensors.sample_rows) == len(counts)
    assert tensors.capture_step.tolist() == [3]
    names = ("given_tokens", "token_source", "positions", "slot_mapping", "block_tables", "query_starts", "context_lens", "capture_step")  # fmt: skip
    for name in names:
        ours, theirs = getattr(tensors, name), getattr(recorded, name)
        assert (ours.data_ptr(), ours.shape) == (theirs.data_ptr(), theirs.shape), name
    assert step.max_query_len == own.max_query_len == 8
    total, starts = sum(counts), tensors.query_starts.tolist()
    assert starts == sorted(starts)
    assert starts[-1] <= 8, "no sequence has rows that there are not"
    assert starts[: len(counts) + 1] == [0, *np.cumsum(counts).tolist()]
    assert tensors.context_lens.tolist() == [*counts, *[0] * (4 - len(counts))]
    assert tensors.slot_mapping[total:].tolist() == [-1] * (8 - total)
    sampled = (np.cumsum(counts) - 1).tolist()
    assert tensors.sample_rows.tolist() == sampled, "no row of padding is sampled"


@pytest.mark.usefixtures("_recording")
@pytest.mark.parametrize("is_inert", [True, False])
def test_padding_touches_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, is_inert: bool):
    """Keys and values, rows and tokens of nobody are as before; a padding row that has a slot is found out."""
    pad = StepBuilder._pad_rows  # pyright: ignore[reportPrivateUsage]

    def pad_badly(self: StepBuilder, arrays: StepArrays, num_rows: int, num_parts: int) -> None:
        pad(self, arrays, num_rows, num_parts)
        arrays.slot_mapping[num_rows:] = 8 * 9 + np.arange(len(arrays.slot_mapping) - num_rows)

    llm = _llm(folder)
    runner = llm.core.runner
    if not is_inert:
        monkeypatch.setattr(StepBuilder, "_pad_rows", pad_badly)
    cache = runner._kv_cache  # pyright: ignore[reportPrivateUsage]
    cache.fill_(7.0)
    llm.generate(_prompts(5), SamplingParams(max_tokens=1))
    assert _counted(llm) == {"t8": 1}
    changed = (cache != 7.0).flatten(4).any(-1).any(0).any(0)  # [num_blocks, block_size]
    assert (changed.sum().item() == 5) is is_inert
    assert changed[:, :5].any(0).tolist() == [True] * 5
    assert runner.pipeline is not None
    rows = torch.stack([runner.pipeline.device_cache.layer(i) for i in range(SHAPE.num_layers)])
    assert bool((rows == -1).all()), "rows of padding are reset as well"


class _Faulty(FakeRecorder):
    """One of the recordings does something else, or nothing."""

    def __init__(self, number: int, fault: Callable[[Callable[[], Any]], Any]) -> None:
        super().__init__()
        self._number, self._fault = number, fault

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        replay = super().record(run)
        if self.num_recorded != self._number:
            return replay
        return lambda: self._fault(replay)


NUM_GRAPHS = 2 * len((*SIZES, *TOKENS))


@pytest.mark.parametrize("number", range(1, NUM_GRAPHS + 1))
def test_canary_looks_at_every_graph(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    """Native and forced: one that does not write its rows is refused at the start."""
    record_on_cpu(monkeypatch, lambda: _Faulty(number, lambda _replay: None))
    with pytest.raises(CaptureError, match="did not gather"):
        _llm(folder)


@pytest.mark.parametrize("number", range(2, NUM_GRAPHS + 1, 2))
def test_canary_finds_a_graph_that_routes_by_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """The forced form of a shape follows the native one; here the native one runs in its place."""
    native: list[Callable[[], Any]] = []

    class Swapped(FakeRecorder):
        def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
            native.append(super().record(run))
            return native[-2] if self.num_recorded == number else native[-1]

    record_on_cpu(monkeypatch, Swapped)
    with pytest.raises(CaptureError, match="canary"):
        _llm(folder)


@pytest.mark.usefixtures("_recording")
def test_a_graph_that_misses_a_layer_fails_its_requests_alone(folder: Path):
    llm = _llm(folder)
    runner = llm.core.runner
    cache, params = runner.pipeline.device_cache, SamplingParams(temperature=0.0, max_tokens=3)  # pyright: ignore[reportOptionalMemberAccess]
    own, elsewhere = cache.layer, torch.empty_like(cache.layer(1))
    cache.layer = lambda index: elsewhere if index == 1 else own(index)  # pyright: ignore[reportAttributeAccessIssue]
    runner.record_graphs()
    output = llm.generate(_prompts(7), params)[0].outputs[0]
    assert "layer 1 wrote no ids" in str(output.error)
    cache.layer = own  # pyright: ignore[reportAttributeAccessIssue]
    runner.record_graphs()
    assert llm.generate(_prompts(7), params)[0].outputs[0].error is None


@pytest.mark.usefixtures("_recording")
def test_graphs_are_recorded_again_after_sleep(folder: Path):
    llm = _llm(folder)
    graphs, params = llm.core.runner.graphs, SamplingParams(temperature=0.0, max_tokens=9, logprobs=0)  # fmt: skip
    assert graphs is not None
    assert len(graphs.recorded) == NUM_GRAPHS
    expected = _told(llm.generate(_prompts(7, 3), params))
    old = dict(graphs.recorded)
    llm.sleep()
    assert not graphs.recorded
    llm.wake_up()
    assert set(graphs.recorded) == set(old)
    assert _told(llm.generate(_prompts(7, 3), params)) == expected
    with pytest.raises(AssertionError, match="given back"):
        next(iter(old.values()))()


@pytest.mark.usefixtures("_recording")
def test_abort_between_two_graphs(folder: Path):
    """What another request goes on with, after one ended in flight, is what it has alone."""
    alone = _llm(folder, async_scheduling=True)
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=0)
    expected = alone.generate(_prompts(6), params)[0].outputs[0]
    core = _llm(folder, async_scheduling=True).core
    kept, dropped = (core.make_requests(tokens, params)[0] for tokens in (_prompts(6)[0], _prompts(11)[0]))  # fmt: skip
    for request in (dropped, kept):
        core.scheduler.add(request)
    core.step()
    core.step()
    assert core.abort(dropped.request_id) is not None
    while core.has_work:
        core.step()
    assert tuple(kept.token_ids[6:]) == tuple(expected.token_ids)


def test_without_capture_no_form_is_forced(folder: Path, monkeypatch: pytest.MonkeyPatch):
    record_on_cpu(monkeypatch)
    config = EngineConfig(max_num_seqs=2, cuda_graph_tokens=(8,), max_num_batched_tokens=16)
    llm = LLM(folder, dtype="float32", device="cpu", config=config)
    graphs = llm.core.runner.graphs
    assert graphs is not None
    assert {key for key in graphs.recorded if key[1]} == set()
    assert len(graphs.recorded) == len(graphs.shapes) == 3


def test_default_sizes():
    def sizes(*, is_decode: bool, **settings: object) -> list[int]:
        config = EngineConfig(**settings)  # pyright: ignore[reportArgumentType]
        return [s.num_tokens for s in graph_shapes(config) if s.is_decode is is_decode]

    doubling = [4, 8, 16, 32, 64, 128, 256]
    assert sizes(is_decode=False) == [*doubling, 512, 1024, 1536, 2048]
    assert sizes(is_decode=False, max_num_batched_tokens=1300) == [*doubling, 512, 1024, 1300]
    assert sizes(is_decode=False, max_num_batched_tokens=512) == [*doubling, 512]
    assert sizes(is_decode=False, max_num_batched_tokens=300) == [*doubling, 300]
    assert sizes(is_decode=False, max_num_batched_tokens=4, max_num_seqs=4) == [4]
    assert sizes(is_decode=False, max_num_batched_tokens=2, max_num_seqs=2) == [2]
    assert sizes(is_decode=False, cuda_graph_tokens=()) == []
    assert sizes(is_decode=False, cuda_graph_tokens=(3, 99)) == [3, 99]
    assert sizes(is_decode=True, max_num_seqs=20) == [1, 2, 4, 8, 16, 20]
    assert sizes(is_decode=True, cuda_graph_sizes=(5,)) == [5]
    assert graph_shapes(EngineConfig(enforce_eager=True)) == ()


def test_the_smallest_shape_of_a_kind():
    shapes = [GraphShape(8, is_decode=False), GraphShape(2, is_decode=True), GraphShape(4, is_decode=False)]  # fmt: skip
    graphs = StepGraphs(shapes, lambda _shape: lambda _is_forced: None, FakeRecorder())
    assert graphs.shapes == tuple(sorted(shapes))
    for count, size in ((1, 4), (4, 4), (5, 8), (8, 8)):
        assert graphs.shape_of(count, is_decode=False) == GraphShape(size, is_decode=False)
    assert graphs.shape_of(9, is_decode=False) is None
    assert graphs.shape_of(2, is_decode=True) == GraphShape(2, is_decode=True)
    assert graphs.shape_of(3, is_decode=True) is None, (
        "a step that only decodes has its own kernels"
    )
    with pytest.raises(KeyError):
        graphs.replay(shapes[0], is_forced=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cuda_graph_tokens": (8, 4)}, "cuda_graph_tokens=(8, 4); accepted are numbers of 1 or more, each larger"),
        ({"cuda_graph_tokens": (0, 4)}, "cuda_graph_tokens=(0, 4)"),
        ({"cuda_graph_tokens": (4, 9000)}, "goes beyond max_num_batched_tokens=4096"),
        ({"cuda_graph_sizes": (1, 1)}, "cuda_graph_sizes=(1, 1)"),
        ({"cuda_graph_sizes": ()}, "enforce_eager=True records no graph"),
        ({"cuda_graph_sizes": (999,)}, "goes beyond max_num_seqs=128"),
    ],
)  # fmt: skip
def test_bad_sizes_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings)
    assert said in str(caught.value)
