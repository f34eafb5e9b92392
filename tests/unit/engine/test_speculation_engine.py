"""Drafts change nothing but the number of steps: tokens, logprobs and routing are those of an engine without them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from _support.teacher import random_rows
from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay import LLM, RequestOutput, SamplingParams
from routing_replay.engine import EngineConfig, SpeculativeConfig, accepting, speculation
from routing_replay.engine.accepting import accept_samples
from routing_replay.engine.config import ResolvedConfig
from routing_replay.engine.draws import Draws
from routing_replay.engine.kv_blocks import KVBlocks
from routing_replay.engine.request import Request
from routing_replay.engine.sampler import SampledToken
from routing_replay.engine.scheduler import Scheduler
from routing_replay.errors import ConfigError, StepError

SHAPE = TinyShape(num_experts=8, top_k=2, num_layers=2)
MOST = 3
LOOKUP = {"method": "ngram", "num_speculative_tokens": MOST, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), SHAPE)


def _llm(folder: Path, *, drafts: bool, **settings: object) -> LLM:
    settings = {"block_size": 8, "batch_invariant": True, **settings}
    config = EngineConfig(speculative_config=LOOKUP if drafts else None, **settings)  # pyright: ignore[reportArgumentType]
    return LLM(folder, dtype="float32", enable_return_routed_experts=True, config=config)


def _prompts() -> list[list[int]]:
    """Repetitive ones, so that something is there to be found, and random ones."""
    rng = np.random.default_rng(7)
    repeated = [rng.integers(4, 90, length).tolist() * 6 for length in (1, 2, 3, 5)]
    return [*repeated, *(rng.integers(4, 90, length).tolist() for length in (1, 9, 33, 16))]


def _params() -> list[SamplingParams]:
    shapes = [
        {"temperature": 0.0, "max_tokens": 40},
        {"temperature": 0.0, "max_tokens": 30, "repetition_penalty": 1.05},
        {"seed": 1, "n": 3, "temperature": 0.2, "max_tokens": 20},
        {"seed": 2, "temperature": 0.3, "max_tokens": 25, "frequency_penalty": 0.1, "presence_penalty": 0.2},
        {"seed": 3, "temperature": 0.3, "max_tokens": 30, "stop_token_ids": tuple(range(4, 50)), "min_tokens": 7},
        {"temperature": 0.0, "max_tokens": 33, "min_tokens": 12, "stop_token_ids": tuple(range(0, 90, 2))},
        {"seed": 5, "temperature": 0.4, "top_k": 4, "top_p": 0.9, "max_tokens": 18, "prompt_logprobs": 0},
        {"seed": 6, "temperature": 0.2, "max_tokens": 1},
    ]  # fmt: skip
    return [SamplingParams(**{"logprobs": 1, **shape}) for shape in shapes]  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def told(folder: Path) -> list[object]:
    """What `_params` give without drafts: under every schedule the same, which `tests/parity/test_schedules.py` shows."""
    outputs = _llm(folder, drafts=False).generate(_prompts(), _params())
    assert (_accepted(outputs), _drafted(outputs)) == (0, 0)
    return _told(outputs)


def _told(outputs: Sequence[RequestOutput]) -> list[object]:
    """All that a user is told, routing position by position."""
    return [
        (item.token_ids, item.finish_reason, item.stop_reason, item.logprobs, item.routing.ids.tolist(),
         item.routing.weights_version, output.prompt_logprobs)
        for output in outputs
        for item in output.outputs
    ]  # fmt: skip


def _accepted(outputs: Sequence[RequestOutput]) -> int:
    return sum(output.num_accepted_tokens for output in outputs)


def _drafted(outputs: Sequence[RequestOutput]) -> int:
    return sum(output.num_draft_tokens for output in outputs)


def _draft_with(monkeypatch: pytest.MonkeyPatch, rule: Callable[[list[int]], list[int]]) -> None:
    """Let another rule draft, from a request's tokens."""
    monkeypatch.setattr(speculation, "propose", lambda tokens, _config: rule(tokens.tolist()))


def _foretold(told: Sequence[RequestOutput], count: int) -> Callable[[list[int]], list[int]]:
    """Draft what requests with distinct prompts are known to get, one completion each."""
    whole = [[*item.prompt_token_ids, *item.outputs[0].token_ids] for item in told]

    def rule(tokens: list[int]) -> list[int]:
        (found,) = [item for item in whole if item[: len(tokens)] == tokens]
        return found[len(tokens) :][:count]

    return rule


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_prefix_caching": False},
        {"num_kv_blocks": 12, "max_num_seqs": 4},
        {"num_kv_blocks": 12, "max_num_seqs": 4, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"max_num_batched_tokens": 4, "max_num_seqs": 4},
    ],
    ids=str,
)
def test_nothing_changes_for_requests(
    folder: Path, told: list[object], settings: dict[str, object]
):
    llm = _llm(folder, drafts=True, **settings)
    found = llm.generate(_prompts(), _params())
    assert _told(found) == told
    assert 0 < _accepted(found) < _drafted(found)
    if "num_kv_blocks" in settings:
        assert sum(item.num_preemptions for item in found) > 0
    assert llm.core.kv_blocks.num_free == llm.core.kv_blocks.num_blocks
    if settings == {}:
        warm = llm.generate(_prompts(), _params())
        assert _told(warm) == told
        assert sum(item.num_cached_tokens for item in warm) > 0


def test_greedy_tokens_stay_without_batch_invariance(folder: Path):
    params = SamplingParams(temperature=0.0, max_tokens=40)
    expected, found = (
        _llm(folder, drafts=drafts, batch_invariant=False).generate(_prompts(), params)
        for drafts in (False, True)
    )
    assert [item.outputs[0].token_ids for item in found] == [item.outputs[0].token_ids for item in expected]  # fmt: skip
    assert _accepted(found) > 40


def test_accepted_drafts_save_steps(folder: Path, monkeypatch: pytest.MonkeyPatch):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=1 + 4 * 7)
    plain = _llm(folder, drafts=False).generate([[5, 6, 7]], params)
    llm = _llm(folder, drafts=True)
    _draft_with(monkeypatch, _foretold(plain, MOST))
    steps = _count_steps(llm, monkeypatch)
    found = llm.generate([[5, 6, 7]], params)
    assert _told(found) == _told(plain)
    assert (found[0].num_draft_tokens, found[0].num_accepted_tokens) == (21, 21)
    assert len(steps) == 1 + 7  # the prompt, and four tokens a step


def _count_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    steps: list[int] = []
    launch = llm.core.runner.launch

    def count(schedule, **options):  # noqa: ANN001, ANN003
        steps.append(sum(part.num_tokens for part in schedule.parts))
        return launch(schedule, **options)

    monkeypatch.setattr(llm.core.runner, "launch", count)
    return steps


RULES: dict[str, Callable[[list[int]], list[int]]] = {
    "always wrong": lambda tokens: [(tokens[-1] + 1 + i) % 90 for i in range(MOST)],
    "one token again and again": lambda tokens: [tokens[-1]] * MOST,
    "longer than allowed": lambda tokens: [tokens[-1]] * 50,
    "none": lambda _tokens: [],
    "now and then": lambda tokens: [tokens[-1]] * (len(tokens) % (MOST + 1)),
}


@pytest.mark.parametrize("rule", RULES)
def test_whatever_is_drafted(
    folder: Path, told: list[object], monkeypatch: pytest.MonkeyPatch, rule: str
):
    """With prefix hits the second time, and so few blocks and rows that not every draft has a place."""
    budget = 12
    llm = _llm(folder, drafts=True, num_kv_blocks=14, max_num_seqs=4, max_num_batched_tokens=budget)
    _draft_with(monkeypatch, RULES[rule])
    steps = _count_steps(llm, monkeypatch)
    for _ in range(2):
        outputs = llm.generate(_prompts(), _params())
        assert _told(outputs) == told
        assert (_drafted(outputs) == 0) == (rule == "none")
    assert max(steps) == budget
    assert llm.core.kv_blocks.num_free == llm.core.kv_blocks.num_blocks


def test_foretold_drafts_longer_than_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Every draft is right, and the engine takes no more of it than it may: not one token past `max_tokens`."""
    prompts = _prompts()[4:]
    for most in (1, 2, 3, 4, 5, 6, 11):
        params = SamplingParams(temperature=0.5, seed=4, max_tokens=most, logprobs=0)
        plain = _llm(folder, drafts=False).generate(prompts, params)
        with monkeypatch.context() as patch:
            _draft_with(patch, _foretold(plain, 50))
            llm = _llm(folder, drafts=True)
            found = llm.generate(prompts, params)
        assert _told(found) == _told(plain)
        for item in found:
            # Of the four tokens of a step three were drafted; a prompt of one token decodes at once.
            left = most if len(item.prompt_token_ids) == 1 else most - 1
            expected = left // (MOST + 1) * MOST + max(left % (MOST + 1) - 1, 0)
            assert (item.num_accepted_tokens, item.num_draft_tokens) == (expected, expected)


def test_request_that_ends_within_its_drafts(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The stop token is a draft that was right; what was right behind it is dropped."""
    free = SamplingParams(temperature=2.0, seed=8, max_tokens=24, logprobs=0)
    prompt = [9, 10, 11, 12, 13]
    plain = _llm(folder, drafts=False).generate([prompt], free)
    tokens = plain[0].outputs[0].token_ids
    firsts = [i for i, token in enumerate(tokens) if token not in tokens[:i] and 2 < i < 20]
    assert len({i % 4 for i in firsts}) == 4, "an end at every place of a draft"
    llm = _llm(folder, drafts=True)
    for end in firsts:
        params = SamplingParams(
            temperature=2.0, seed=8, max_tokens=24, logprobs=0, stop_token_ids=(tokens[end],)
        )
        _draft_with(monkeypatch, _foretold(plain, MOST))
        output = llm.generate([prompt], params)[0]
        completion = output.outputs[0]
        assert (completion.token_ids, completion.finish_reason) == (tokens[: end + 1], "stop")
        assert completion.stop_reason == tokens[end]
        assert completion.logprobs == plain[0].outputs[0].logprobs[: end + 1]  # pyright: ignore[reportOptionalSubscript]
        assert completion.routing.num_rows == len(prompt) + end
        assert np.array_equal(
            completion.routing.ids, plain[0].outputs[0].routing.ids[: len(prompt) + end]
        )
        assert output.num_accepted_tokens <= end
        # Blocks are offered as far as tokens are the request's, the last one left out: it was no input.
        again = llm.generate([[*prompt, *completion.token_ids, 3]], SamplingParams(max_tokens=1))[0]
        assert again.num_cached_tokens <= (len(prompt) + end) // 8 * 8
        llm.core.reset_prefix_cache()


def test_row_of_a_rejected_draft_is_found_if_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The twin: without `truncate`, rows of drafts would stand where rows of tokens belong."""
    params = SamplingParams(temperature=0.0, max_tokens=30)
    _draft_with(monkeypatch, RULES["always wrong"])
    plain = _llm(folder, drafts=False).generate(_prompts(), params)
    llm = _llm(folder, drafts=True)
    pipeline = llm.core.runner.pipeline
    assert pipeline is not None
    monkeypatch.setattr(pipeline, "truncate", lambda *_: None)
    found = llm.generate(_prompts(), params)
    for one, two in zip(plain, found, strict=True):
        assert one.outputs[0].token_ids == two.outputs[0].token_ids
        expected, kept = one.outputs[0].routing.ids, two.outputs[0].routing.ids
        first = len(one.prompt_token_ids)
        assert np.array_equal(expected[:first], kept[:first])
        assert not np.array_equal(expected[first:], kept[first:])


def test_key_of_a_rejected_draft_is_found_if_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The twin: where the next step goes on behind the drafts, tokens and rows differ."""
    params = SamplingParams(temperature=0.0, max_tokens=30, logprobs=0)
    plain = _llm(folder, drafts=False).generate(_prompts(), params)
    _draft_with(monkeypatch, RULES["always wrong"])
    monkeypatch.setattr(accepting, "verify", lambda drafts, sampled: [*drafts, sampled[-1]])
    found = _llm(folder, drafts=True).generate(_prompts(), params)
    assert [item.outputs[0].token_ids for item in found] != [item.outputs[0].token_ids for item in plain]  # fmt: skip
    assert _told(found) != _told(plain)


def test_changed_id_is_found(folder: Path):
    """The twin of the comparison itself: one id of one row."""
    params = SamplingParams(temperature=0.0, max_tokens=20)
    plain = _llm(folder, drafts=False).generate([_prompts()[2]], params)
    llm = _llm(folder, drafts=True)
    pipeline = llm.core.runner.pipeline
    assert pipeline is not None
    take = pipeline.host_cache.take

    def change(request_id: str, num_rows: int):
        rows = take(request_id, num_rows)
        row = rows.ids[num_rows - 2, 1]
        row[0] = next(i for i in range(8) if i not in row)
        return rows

    pipeline.host_cache.take = change  # pyright: ignore[reportAttributeAccessIssue]
    found = llm.generate([_prompts()[2]], params)
    assert _accepted(found) > 0
    differs = (found[0].outputs[0].routing.ids != plain[0].outputs[0].routing.ids).any(axis=(1, 2))
    assert np.flatnonzero(differs).tolist() == [len(differs) - 2]


def test_blocks_hold_rows_of_tokens_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A later request takes the rows of blocks that rejected drafts have been written to."""
    params = SamplingParams(temperature=0.0, max_tokens=40)
    prompts = _prompts()[4:7]
    _draft_with(monkeypatch, RULES["always wrong"])
    llm = _llm(folder, drafts=True)
    first = llm.generate(prompts, params)
    longer = [[*item.prompt_token_ids, *item.outputs[0].token_ids, 7] for item in first]
    hit = llm.generate(longer, SamplingParams(temperature=0.0, max_tokens=2, logprobs=0))
    cold = _llm(folder, drafts=False).generate(longer, SamplingParams(temperature=0.0, max_tokens=2, logprobs=0))  # fmt: skip
    assert all(item.num_cached_tokens >= len(tokens) // 8 * 8 - 8 for item, tokens in zip(hit, longer, strict=True))  # fmt: skip
    assert _told(hit) == _told(cold)


def test_forced_requests_with_drafts(folder: Path):
    params = [SamplingParams(temperature=0.0, max_tokens=24, logprobs=0) for _ in _prompts()]
    native = _llm(folder, drafts=False).generate(_prompts(), params)
    forced = [
        random_rows(item.outputs[0].routing, seed) if seed % 2 else None
        for seed, item in enumerate(native)
    ]
    plain = _llm(folder, drafts=False).generate(_prompts(), params, replay=forced)
    found = _llm(folder, drafts=True).generate(_prompts(), params, replay=forced)
    assert _told(found) == _told(plain)
    assert sum(item.num_accepted_tokens for item in found[1::2]) > 0, "forced requests drafted"
    for item, trace in zip(found, forced, strict=True):
        if trace is not None:
            assert np.array_equal(item.outputs[0].routing.ids, trace.ids)


def test_abort_between_steps_returns_accepted_tokens_alone(folder: Path):
    params = SamplingParams(temperature=0.0, max_tokens=40)
    prompt = _prompts()[2]
    plain = _llm(folder, drafts=False).generate([prompt], params)[0].outputs[0]
    core = _llm(folder, drafts=True).core
    request = core.make_requests(prompt, params)[0]
    core.scheduler.add(request)
    while request.num_accepted_tokens < 3:
        core.step()
    aborted = core.abort(request.request_id)
    assert aborted is not None
    assert aborted.trace is not None
    count = len(request.output_ids)
    assert 3 < count < 40
    assert tuple(request.output_ids) == plain.token_ids[:count]
    assert aborted.trace.num_rows == len(prompt) + count - 1
    assert np.array_equal(aborted.trace.ids, plain.routing.ids[: len(prompt) + count - 1])
    assert not core.has_work
    assert core.kv_blocks.num_free == core.kv_blocks.num_blocks


def test_poisoned_row_fails_its_request_only_if_its_token_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    params = SamplingParams(temperature=0.0, max_tokens=12)
    plain = _llm(folder, drafts=False).generate([[5, 6, 7]], params)
    llm = _llm(folder, drafts=True)
    model = llm.core.runner.model
    compute = model.compute_logits

    def poison(row: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def logits_of(hidden_states: torch.Tensor) -> torch.Tensor:
            logits = compute(hidden_states)
            if len(logits) > 1:
                logits[row] = torch.nan
            return logits

        return logits_of

    _draft_with(monkeypatch, RULES["always wrong"])
    monkeypatch.setattr(model, "compute_logits", poison(-1))
    found = llm.generate([[5, 6, 7]], params)
    assert _told(found) == _told(plain), "a row that is not looked at"
    _draft_with(monkeypatch, _foretold(plain, MOST))
    failed = llm.generate([[5, 6, 7]], params)[0].outputs[0]
    assert isinstance(failed.error, StepError)
    assert "after token index 6 " in str(failed.error)
    assert failed.token_ids == plain[0].outputs[0].token_ids[:4]
    assert llm.core.kv_blocks.num_free == llm.core.kv_blocks.num_blocks


def test_speculation_and_a_step_ahead_exclude_each_other(folder: Path):
    with pytest.raises(ConfigError, match="async_scheduling=True with a speculative_config"):
        EngineConfig(speculative_config=LOOKUP, async_scheduling=True)
    with pytest.raises(ConfigError, match="method='eagle'"):
        EngineConfig(speculative_config={"method": "eagle"})
    config = EngineConfig(speculative_config=LOOKUP)
    assert config.speculation == SpeculativeConfig(num_speculative_tokens=MOST, prompt_lookup_max=3)
    assert _llm(folder, drafts=True).core.config.engine.async_scheduling is False


@pytest.mark.parametrize("is_async", [False, True], ids=["drafts", "a step ahead"])
def test_stop_string_waits_for_min_tokens_that_are_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_async: bool
):
    """A token in flight, or the rest of a draft, makes an output no longer than it is."""
    prompt = [8, 9] * 8

    def stopped(llm: LLM, least: int, text: str) -> RequestOutput:
        llm.core._intake._make_decoder = lambda: lambda token: chr(200 + token)  # pyright: ignore[reportPrivateUsage]
        params = SamplingParams(temperature=0.0, max_tokens=16, min_tokens=least, stop=(text,))
        return llm.generate([prompt], params)[0]

    free = _llm(folder, drafts=False).generate([prompt], SamplingParams(temperature=0.0))[0]
    tokens = free.outputs[0].token_ids
    text = chr(200 + tokens[5])
    _draft_with(monkeypatch, _foretold([free], MOST))
    for least in range(1, 9):
        plain = stopped(_llm(folder, drafts=False), least, text)
        other = _llm(folder, drafts=not is_async, async_scheduling=is_async)
        found = stopped(other, least, text)
        assert len(found.outputs[0].token_ids) >= least
        assert _told([found]) == _told([plain])
        assert is_async or least < 5 or found.num_accepted_tokens > 0


def _scheduler(num_blocks: int, drafts: int, **settings: int) -> Scheduler:
    engine = EngineConfig(
        block_size=4, speculative_config={"num_speculative_tokens": drafts}, **settings
    )
    config = ResolvedConfig(engine=engine, max_model_len=64, num_kv_blocks=num_blocks)
    blocks = KVBlocks(num_blocks, 4, enable_prefix_caching=False)
    return Scheduler(config, blocks, lambda _, most: [7] * most)


def _request(name: str, length: int, max_tokens: int = 20) -> Request:
    return Request(
        request_id=name,
        prompt=None,
        token_ids=list(range(1, length + 1)),
        num_prompt_tokens=length,
        params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        draws=Draws(0),
        eos_token_ids=(),
    )


def _run(scheduler: Scheduler, sample: int) -> list[tuple[str, int, int]]:
    """Pretend to compute a step in which every row samples the same token; say where each part starts, and its drafts."""
    schedule = scheduler.schedule()
    for part in schedule.parts:
        accept_samples(part, [SampledToken(sample, None)] * part.num_samples)
    scheduler.retire()
    return [(part.request.request_id, part.start, len(part.drafts)) for part in schedule.parts]


def test_drafts_take_what_is_left_of_a_step():
    scheduler = _scheduler(32, 3, max_num_batched_tokens=8, max_num_seqs=4)
    for name, length in (("a", 2), ("b", 2)):
        scheduler.add(_request(name, length))
    assert _run(scheduler, 7) == [("a", 0, 0), ("b", 0, 0)]
    scheduler.add(_request("c", 9))
    # The prompt goes first; what is left of its chunk's budget is for drafts.
    assert sorted(_run(scheduler, 7)) == [("a", 2, 0), ("b", 2, 0), ("c", 0, 0)]
    assert sorted(_run(scheduler, 7)) == [("a", 3, 3), ("b", 3, 0), ("c", 6, 0)]
    # All were right: the next part begins behind them. With wrong ones it begins one token further on.
    assert sorted(_run(scheduler, 5)) == [("a", 7, 3), ("b", 4, 2), ("c", 9, 0)]
    assert sorted(_run(scheduler, 5)) == [("a", 8, 3), ("b", 5, 2), ("c", 10, 0)]


def test_drafts_end_where_their_request_does():
    for max_tokens in range(1, 8):
        scheduler = _scheduler(32, 3)
        request = _request("a", 2, max_tokens)
        scheduler.add(request)
        while scheduler.has_work:
            _run(scheduler, 7)
        assert len(request.output_ids) == max_tokens
        assert request.num_accepted_tokens == request.num_draft_tokens


def test_drafts_take_no_block_that_another_request_asks_for():
    scheduler = _scheduler(3, 3, max_num_seqs=4)
    first = _request("a", 3, 8)
    scheduler.add(first)
    assert _run(scheduler, 5) == [("a", 0, 0)]
    assert _run(scheduler, 5) == [("a", 3, 3)]  # into a second block, and all of them wrong
    assert len(first.blocks) == 2
    scheduler.add(_request("b", 7, 2))  # waits for two blocks, one is free
    assert _run(scheduler, 5) == [("a", 4, 3)]
    assert _run(scheduler, 5) == [("a", 5, 2)]
    assert _run(scheduler, 5) == [("a", 6, 1)]
    assert _run(scheduler, 5) == [("a", 7, 0)]
    assert (len(first.blocks), first.num_preemptions) == (2, 0)
