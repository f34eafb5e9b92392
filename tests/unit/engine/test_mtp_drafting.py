"""The checkpoint's own layers draft: as one pass over the whole request would, and nothing changes for requests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from _support.mtp_models import save_mtp_model
from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay import LLM, RequestOutput, SamplingParams
from routing_replay.engine import EngineConfig
from routing_replay.engine.request import Request
from routing_replay.errors import ConfigError, EngineStoppedError, StepError
from routing_replay.models import RoutingBuffers, SequenceSpan, StepInputs

SHAPE = TinyShape(num_experts=8, top_k=2, num_layers=2)
DEPTHS = 2


@pytest.fixture(scope="module", params=["random", "repeats"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return save_mtp_model(folder, SHAPE, depths=DEPTHS, repeats=request.param == "repeats")


def _llm(folder: Path, drafts: int, **settings: object) -> LLM:
    speculation = {"method": "mtp", "num_speculative_tokens": drafts} if drafts else None
    settings = {"block_size": 8, "batch_invariant": True, **settings}
    config = EngineConfig(speculative_config=speculation, **settings)  # pyright: ignore[reportArgumentType]
    return LLM(folder, dtype="float32", enable_return_routed_experts=True, config=config)


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(4, 90, length).tolist() for length in (1, 2, 9, 33, 16, 7)]


def _params() -> list[SamplingParams]:
    shapes = [
        {"temperature": 0.0, "max_tokens": 30},
        {"temperature": 0.0, "max_tokens": 24, "repetition_penalty": 1.05},
        {"seed": 1, "n": 3, "temperature": 0.2, "max_tokens": 14},
        {"seed": 3, "temperature": 0.3, "max_tokens": 20, "stop_token_ids": tuple(range(4, 50)), "min_tokens": 7},
        {"seed": 5, "temperature": 0.4, "top_k": 4, "max_tokens": 18, "prompt_logprobs": 0},
        {"temperature": 0.0, "max_tokens": 1},
    ]  # fmt: skip
    return [SamplingParams(**{"logprobs": 0, **shape}) for shape in shapes]  # pyright: ignore[reportArgumentType]


def _told(outputs: Sequence[RequestOutput]) -> list[object]:
    return [
        (item.token_ids, item.finish_reason, item.logprobs, item.routing.ids.tolist(), output.prompt_logprobs)
        for output in outputs
        for item in output.outputs
    ]  # fmt: skip


@pytest.fixture(scope="module")
def told(folder: Path) -> list[object]:
    return _told(_llm(folder, 0).generate(_prompts(), _params()))


@pytest.mark.parametrize(
    ("drafts", "settings"),
    [
        (1, {}),
        (2, {}),
        (2, {"num_kv_blocks": 8, "max_num_seqs": 4}),
        (2, {"max_num_batched_tokens": 7, "max_num_seqs": 3}),
    ],
    ids=str,
)
def test_nothing_changes_for_requests(
    folder: Path, told: list[object], drafts: int, settings: dict[str, object]
):
    llm = _llm(folder, drafts, **settings)
    num_preemptions = 0
    for _ in range(2):  # the second time with prefix hits
        outputs = llm.generate(_prompts(), _params())
        num_preemptions += sum(item.num_preemptions for item in outputs)
        assert _told(outputs) == told
        assert sum(item.num_draft_tokens for item in outputs) > 0
        assert outputs[0].outputs[0].routing.layer_ids == (0, 1)
    if "num_kv_blocks" in settings:
        assert num_preemptions > 0
    if folder.name.startswith("repeats"):
        assert sum(item.num_accepted_tokens for item in outputs) > 20
    assert llm.core.kv_blocks.num_free == llm.core.kv_blocks.num_blocks


@torch.inference_mode()
def _drafts_of_one_pass(llm: LLM, tokens: list[int], drafts: int) -> list[int]:
    """By the definition: whole sequences at every depth, each draft appended to the tokens of the next depth."""
    model, count = llm.core.runner.model, len(tokens) - 1
    rows = torch.arange(count)

    def step(token_ids: list[int]) -> StepInputs:
        return StepInputs(
            token_ids=torch.tensor(token_ids),
            positions=rows,
            slot_mapping=rows,
            block_tables=torch.zeros(1, 1, dtype=torch.int64),
            spans=(SequenceSpan(first_row=0, num_tokens=count, context_len=count),),
            num_decodes=0,
            decode_mask=None,
        )

    caches = torch.zeros(SHAPE.num_layers + drafts, 2, 1, 128, 2, 16)
    states = model(step(tokens[:-1]), caches, RoutingBuffers())
    found: list[int] = []
    for depth in range(drafts):
        after = [*tokens, *found][1 + depth :][:count]
        states = model.draft(step(after), states, caches[SHAPE.num_layers + depth], depth=depth)
        found.append(int(model.compute_draft_logits(states[-1:], depth=depth).argmax()))
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 5, "max_num_seqs": 2}], ids=str
)
def test_drafts_are_those_of_one_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
):
    """In steps of one token, of accepted and of rejected drafts, behind prompts in one piece and in several."""
    llm = _llm(folder, DEPTHS, enable_prefix_caching=False, **settings)
    seen: list[tuple[list[int], list[int]]] = []
    drafts_of = llm.core.scheduler._drafts_of  # pyright: ignore[reportPrivateUsage]
    assert drafts_of is not None

    def watch(request: Request, most: int) -> Sequence[int]:
        seen.append((list(request.token_ids), list(request.drafts)))
        return drafts_of(request, most)

    monkeypatch.setattr(llm.core.scheduler, "_drafts_of", watch)
    params = SamplingParams(temperature=0.3, seed=2, max_tokens=20)
    llm.generate(_prompts()[1:4], params)
    with_drafts = [item for item in seen if item[1]]
    assert len(with_drafts) > 15
    for tokens, drafts in with_drafts:
        assert drafts == _drafts_of_one_pass(llm, tokens, DEPTHS), len(tokens)


def test_tail_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The twin: without the rows before a step, keys and values of rejected drafts stay, and some draft is another."""
    folder = save_mtp_model(tmp_path / "m", SHAPE, depths=DEPTHS, repeats=False)
    params = SamplingParams(temperature=0.3, seed=2, max_tokens=30)
    drafts: list[list[list[int]]] = []
    for is_cut in (False, True):
        llm = _llm(folder, DEPTHS, enable_prefix_caching=False)
        drafter = llm.core.runner._drafter  # pyright: ignore[reportPrivateUsage]
        assert drafter is not None
        seen: list[list[int]] = []
        run = drafter._run  # pyright: ignore[reportPrivateUsage]

        def watch(parts, states, kv_cache, run=run, seen=seen, is_cut=is_cut):  # noqa: ANN001
            found = run(parts, states, kv_cache)
            seen.extend(found)
            for part in parts:
                part.request.draft_tail = None if is_cut else part.request.draft_tail
            return found

        monkeypatch.setattr(drafter, "_run", watch)
        llm.generate(_prompts()[1:4], params)
        drafts.append(seen)
    assert drafts[0] != drafts[1]


def test_layer_that_fails_ends_its_requests_and_then_the_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    llm = _llm(folder, 1)
    draft, calls = llm.core.runner.model.draft, list[int]()

    def fail(*args: object, **options: object) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) in (1, 3, 4):
            raise RuntimeError("no memory")
        return draft(*args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(llm.core.runner.model, "draft", fail)
    params = SamplingParams(temperature=0.0, max_tokens=2)
    failed = llm.generate([[5, 6]], params)[0].outputs[0]
    assert isinstance(failed.error, StepError)
    assert "no memory" in str(failed.error)
    assert llm.generate([[5, 6]], params)[0].outputs[0].error is None
    assert llm.core.kv_blocks.num_free == llm.core.kv_blocks.num_blocks
    assert isinstance(llm.generate([[5, 6]], params)[0].outputs[0].error, StepError)
    llm.generate([[5, 6]], params)  # it ends with this second failure in a row
    with pytest.raises(EngineStoppedError):
        llm.generate([[5, 6]], params)


def test_more_drafts_than_layers_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"num_speculative_tokens=3 .* num_nextn_predict_layers=2"
    ):
        _llm(folder, 3)
    other = save_tiny_model(tmp_path / "m", SHAPE)
    with pytest.raises(ConfigError, match="has no num_nextn_predict_layers"):
        _llm(other, 1)
