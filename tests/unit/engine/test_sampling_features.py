"""Penalties, min-p, minimum lengths, stop strings and scoring, as users of vLLM know them."""

import numpy as np
import pytest
import torch

from _support.sampling import sample
from routing_replay import LLM, SamplingParams
from routing_replay.assets import tiny_moe_path
from routing_replay.engine.config import LogprobsMode
from routing_replay.engine.draws import Draws
from routing_replay.engine.penalties import TokenCounts
from routing_replay.engine.request import Request
from routing_replay.engine.sampler import score
from routing_replay.engine.stop_strings import StopStrings
from routing_replay.errors import ConfigError

QUESTION = "Ada has 12 pens. Ben brings 30 more. Then 20 get lost. How many pens are there now?"
PROMPT = f"<|user|>{QUESTION}<|assistant|>"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny_moe_path(), dtype="float32", enable_return_routed_experts=True)


def _request(params: SamplingParams, *, seed: int = 0, eos: tuple[int, ...] = ()) -> Request:
    return Request(
        request_id="r",
        prompt=None,
        token_ids=[1, 2],
        num_prompt_tokens=2,
        params=params,
        draws=Draws(seed),
        eos_token_ids=eos,
    )


def test_penalties_follow_their_definitions():
    counts = TokenCounts(5, [0, 1], torch.device("cpu"))
    for token in (2, 2, 3):
        counts.add(token)
    logits = torch.tensor([2.0, -2.0, 3.0, -1.0, 4.0])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    expected = [2 / 2, -2 * 2, 3 / 2 - 0.5 - 2 * 0.25, -1 * 2 - 0.5 - 0.25, 4.0]
    assert counts.penalize(logits, params).tolist() == pytest.approx(expected)
    assert logits.tolist() == [2.0, -2.0, 3.0, -1.0, 4.0]


def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(50)
    seen = [3, 7, 7, 11]
    counts = TokenCounts(50, seen[:2], torch.device("cpu"))
    for token in seen[2:]:
        counts.add(token)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits[None].clone())
    found = counts.penalize(logits, SamplingParams(repetition_penalty=1.7))
    assert torch.equal(found, expected[0])


def test_min_p_keeps_tokens_of_a_share_of_the_most_probable():
    probs = torch.tensor([[0.5, 0.26, 0.14, 0.1]])
    params = SamplingParams(min_p=0.3, temperature=1.0)
    drawn = {
        sample(probs.log(), [_request(params, seed=s)], LogprobsMode.RAW)[0].token_id
        for s in range(300)
    }
    assert drawn == {0, 1}


def test_min_tokens_bans_what_would_end_the_output():
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]])
    params = SamplingParams(temperature=0.0, min_tokens=1, stop_token_ids=(2,))
    request = _request(params, eos=(1,))
    assert sample(logits, [request], LogprobsMode.RAW)[0].token_id == 3
    request.num_pending += 1
    request.accept(3, None)
    assert sample(logits, [request], LogprobsMode.RAW)[0].token_id == 1


def test_drawing_never_takes_a_token_of_no_probability():
    logits = torch.full((64, 1000), -torch.inf)
    logits[:, 500] = 0.0
    requests = [_request(SamplingParams(), seed=s) for s in range(64)]
    assert {t.token_id for t in sample(logits, requests, LogprobsMode.RAW)} == {500}


def test_score_gives_each_token_and_its_rivals():
    logits = torch.randn(3, 20)
    entries = score(logits, [4, 0, 19], 2)
    expected = logits.log_softmax(-1)
    for row, (token, entry) in enumerate(zip([4, 0, 19], entries, strict=True)):
        assert entry[token].logprob == pytest.approx(float(expected[row, token]))
        assert entry[token].rank == int((expected[row] > expected[row, token]).sum()) + 1
        assert int(expected[row].argmax()) in entry


def test_stop_string_may_span_tokens_and_is_cut_off():
    pieces = {1: "Hel", 2: "lo wo", 3: None, 4: "rld!", 5: " more"}
    for include, expected in ((False, "Hel"), (True, "Hello world")):
        stop = StopStrings(["lo world", "zz"], include_in_text=include, decode=pieces.__getitem__)
        assert [stop.add(token, may_stop=True) for token in (1, 2, 3)] == [None, None, None]
        assert stop.add(4, may_stop=True) == "lo world"
        assert stop.text == expected
    early = StopStrings(["Hel"], include_in_text=False, decode=pieces.__getitem__)
    assert early.add(1, may_stop=False) is None
    assert (
        early.add(2, may_stop=True) is None
    )  # what was passed while too short does not end it later
    first = StopStrings(["world", "lo"], include_in_text=False, decode={1: "hello world"}.get)
    assert (first.add(1, may_stop=True), first.text) == ("lo", "hel")


def test_stop_strings_end_a_real_output(llm: LLM):
    free = llm.generate(PROMPT, SamplingParams(max_tokens=60, temperature=0.0))[0].outputs[0]
    stop = free.text[len(free.text) // 2 :][:4]
    output = llm.generate(PROMPT, SamplingParams(max_tokens=60, temperature=0.0, stop=(stop,)))[0]
    cut = output.outputs[0]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert cut.routing.num_rows == len(output.prompt_token_ids) + len(cut.token_ids) - 1
    kept = SamplingParams(
        max_tokens=60, temperature=0.0, stop=(stop,), include_stop_str_in_output=True
    )
    assert llm.generate(PROMPT, kept)[0].outputs[0].text == cut.text + stop
    late = SamplingParams(
        max_tokens=60, temperature=0.0, stop=(stop,), min_tokens=len(cut.token_ids) + 1
    )
    assert len(llm.generate(PROMPT, late)[0].outputs[0].token_ids) > len(cut.token_ids)


def test_stop_strings_need_a_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from _support.tiny_models import TinyShape, save_tiny_model

    shape = TinyShape(num_experts=8, top_k=2, num_layers=1)
    bare = LLM(save_tiny_model(tmp_path_factory.mktemp("bare"), shape), dtype="float32")
    with pytest.raises(ConfigError, match=r"stop=\('x',\) needs a tokenizer"):
        bare.generate([[1, 2]], SamplingParams(stop=("x",)))
    with pytest.raises(ConfigError, match="stop_token_ids entry 0 is 999"):
        bare.generate([[1, 2]], SamplingParams(stop_token_ids=(999,)))
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        bare.generate([[1]], SamplingParams(max_tokens=0, prompt_logprobs=0))


def test_prompt_logprobs_come_with_text_and_without_cached_prefixes(llm: LLM):
    params = SamplingParams(max_tokens=1, prompt_logprobs=2)
    for _ in range(2):
        output = llm.generate(PROMPT, params)[0]
        assert output.num_cached_tokens == 0
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        entry = output.prompt_logprobs[5]
        assert entry is not None
        assert entry[output.prompt_token_ids[5]].decoded_token
        assert len(entry) in (2, 3)


def test_completions_differ_by_seed_and_share_the_prompt(llm: LLM):
    output = llm.generate(PROMPT, SamplingParams(n=4, seed=3, max_tokens=30))[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    traces = [completion.routing for completion in output.outputs]
    rows = len(output.prompt_token_ids) - 1
    assert all(np.array_equal(trace.ids[:rows], traces[0].ids[:rows]) for trace in traces)
    assert len({completion.token_ids for completion in output.outputs}) > 1
    again = llm.generate(PROMPT, SamplingParams(seed=5, max_tokens=30))[0].outputs[0]
    assert again.token_ids == output.outputs[2].token_ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"n": 0}, "n=0; accepted"), ({"min_p": 1.5}, "min_p=1.5"), ({"repetition_penalty": 0.0}, "repetition_penalty"),
     ({"presence_penalty": 3.0}, "presence_penalty=3.0"), ({"frequency_penalty": -2.5}, "frequency_penalty"),
     ({"min_tokens": 20}, "min_tokens=20 is above max_tokens=16"), ({"stop": "x"}, "stop='x'; accepted is a tuple"),
     ({"stop": ("",)}, "not empty"), ({"prompt_logprobs": -1}, "prompt_logprobs=-1"), ({"seed": -1}, "seed=-1"),
     ({"n": 2, "max_tokens": 0, "prompt_logprobs": 0}, "n=2 with max_tokens=0")],
)  # fmt: skip
def test_bad_setting_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**settings)  # pyright: ignore[reportArgumentType]
