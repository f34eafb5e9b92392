"""Samples made beside plain ones, under penalties and speculation, are those of each request alone."""

from collections.abc import Sequence

import pytest
import torch

from _support.sampling import sample
from routing_replay.engine.config import LogprobsMode
from routing_replay.engine.draws import Draws
from routing_replay.engine.penalties import TokenCounts, penalize_rows
from routing_replay.engine.processing import keep_likely, largest, process
from routing_replay.engine.request import Request
from routing_replay.engine.sampler import launch_sample, plain_inputs
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.errors import ConfigError
from routing_replay.kernels.sampling import PlainSamples, sample_plain

VOCAB_SIZE = 300
SETTINGS: Sequence[dict[str, object]] = (
    {},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 0.7, "logprobs": 0},
    {"top_k": 5, "logprobs": 2},
    {"top_p": 0.8},
    {"min_p": 0.1, "temperature": 1.5, "logprobs": 400},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"min_tokens": 2, "stop_token_ids": (3, 8), "temperature": 0.0},
    {"logprobs": 3},
)


def _request(seed: int, settings: dict[str, object]) -> Request:
    params = SamplingParams(**settings)  # pyright: ignore[reportArgumentType]
    request = Request(
        request_id=str(seed),
        prompt=None,
        token_ids=[1, 2],
        num_prompt_tokens=2,
        params=params,
        draws=Draws(seed),
        eos_token_ids=(4,),
    )
    if params.has_penalties:
        request.token_counts = TokenCounts(VOCAB_SIZE, [1, 2], torch.device("cpu"))
    return request


def _requests() -> list[Request]:
    return [_request(seed, settings) for seed, settings in enumerate(SETTINGS)]


@pytest.mark.parametrize("mode", list(LogprobsMode))
def test_rows_beside_plain_ones_are_those_of_each_request_alone(mode: LogprobsMode):
    logits = torch.randn(len(SETTINGS), VOCAB_SIZE) * 2
    alone = _requests()
    expected = [
        sample(logits[row : row + 1], [request], mode)[0] for row, request in enumerate(alone)
    ]
    index = [0] * len(SETTINGS)
    temperature, drawn = plain_inputs(_requests(), index)
    uniform = torch.tensor(drawn, dtype=torch.float64)
    plain = sample_plain(logits, torch.tensor(temperature), uniform)
    before = plain.packed.clone()
    given = launch_sample(logits, plain, _requests(), mode, output_index=index, uniform=uniform)
    own = launch_sample(logits, None, _requests(), mode, output_index=index, uniform=uniform)
    assert given.wait() == own.wait() == expected
    assert given.token_ids.tolist() == [token.token_id for token in expected]
    assert torch.equal(plain.packed, before)
    # The settings matter, so that the rows above are not plain ones by accident.
    assert plain.token_ids.tolist() != given.token_ids.tolist()


def test_plain_inputs_are_temperatures_and_draws():
    requests = [_request(3, {"temperature": 0.5}), _request(4, {"temperature": 0.0})]
    assert plain_inputs(requests, [0, 9]) == ([0.5, 0.0], [Draws(3).at(0), 0.0])


def test_plain_samples_are_taken_as_they_are():
    requests = [_request(0, {}), _request(1, {"logprobs": 0})]
    plain = PlainSamples(torch.zeros(2, 3, dtype=torch.int64))
    plain.token_ids.copy_(torch.tensor([7, 9]))
    plain.raw_logprobs.fill_(-2.0)
    plain.logprobs.fill_(-4.0)
    plain.ranks.fill_(3)
    plain.processed_ranks.fill_(5)
    logits = torch.zeros(2, VOCAB_SIZE)
    for mode, expected in ((LogprobsMode.RAW, (-2.0, 3)), (LogprobsMode.PROCESSED, (-4.0, 5))):
        pending = launch_sample(logits, plain, requests, mode, output_index=[0, 0])
        first, second = pending.wait()
        assert (first.token_id, first.logprobs) == (7, None)
        assert second.logprobs is not None
        assert (second.logprobs[9].logprob, second.logprobs[9].rank) == expected


def test_penalties_see_tokens_that_the_host_has_not_seen():
    logits = torch.zeros(1, VOCAB_SIZE)
    settings: dict[str, object] = {"temperature": 0.0, "presence_penalty": 1.0}
    request = _request(0, settings)
    tokens = [
        launch_sample(logits, None, [request], LogprobsMode.RAW, output_index=[n]).token_ids.item()
        for n in range(200)
    ]
    assert request.num_output_tokens == 0
    assert tokens == list(range(200))
    # The 50th again, as after a rejected draft or a preemption: what came after it does not count.
    again = launch_sample(logits, None, [request], LogprobsMode.RAW, output_index=[50])
    assert again.token_ids.item() == 50


def test_rows_of_one_request_are_its_tokens_one_by_one():
    logits = torch.randn(4, VOCAB_SIZE)
    settings: dict[str, object] = {
        "repetition_penalty": 1.8,
        "frequency_penalty": 0.5,
        "min_tokens": 2,
    }
    settings["logprobs"] = 1
    alone = _request(5, settings)
    expected = []
    for row in range(4):
        token = sample(logits[row : row + 1], [alone], LogprobsMode.RAW)[0]
        alone.num_pending += 1
        alone.accept(token.token_id, token.logprobs)
        expected.append(token)
    request = _request(5, settings)
    counts = request.token_counts
    assert counts is not None
    counts.place(0, torch.tensor([token.token_id for token in expected[:3]]))
    index = list(range(4))
    uniform = torch.tensor([Draws(5).at(n) for n in index], dtype=torch.float64)
    drafted = launch_sample(
        logits, None, [request] * 4, LogprobsMode.RAW, output_index=index, uniform=uniform
    )
    assert drafted.wait() == expected


def test_launch_sample_refuses_other_numbers_of_rows():
    with pytest.raises(ConfigError, match="rows for 1 requests"):
        launch_sample(
            torch.zeros(2, 5), None, [_request(0, {})], LogprobsMode.RAW, output_index=[0]
        )


def test_penalties_of_rows_are_those_of_each_request():
    logits = torch.randn(3, 20)
    params = [
        SamplingParams(repetition_penalty=1.3, max_tokens=99),
        SamplingParams(presence_penalty=0.7),
        SamplingParams(frequency_penalty=-0.4, repetition_penalty=0.8),
    ]
    counts = [TokenCounts(20, [row, 3], torch.device("cpu")) for row in range(3)]
    outputs = ([], [5, 5, 6], [7] * 100)
    for item, output in zip(counts, outputs, strict=True):
        for token in output:
            item.add(token)
    lengths = [len(output) for output in outputs]
    together = penalize_rows(logits, params, counts, lengths)
    for row in range(3):
        assert torch.equal(together[row], counts[row].penalize(logits[row], params[row]))
    assert together[2, 7] < logits[2, 7] + 100 * 0.4 * 1.3
    fewer = penalize_rows(logits, params, counts, [0, 2, 1])
    assert fewer[1, 6] == logits[1, 6]
    assert not torch.equal(fewer[2], together[2])


@pytest.mark.parametrize("vocab_size", [40, 4000])
def test_exact_cuts_are_those_of_torch(vocab_size: int):
    logits = torch.randn(12, vocab_size) * 3
    logits[:4] = logits[:4].round()  # many ties
    logits[3, vocab_size // 2 :] = -torch.inf
    params = [
        SamplingParams(top_k=top_k, top_p=top_p)
        for top_k in (0, 3, 20, 2000)
        for top_p in (1.0, 0.35, 0.9)
    ]
    requests = [_request(0, {"top_k": item.top_k, "top_p": item.top_p}) for item in params]
    expected = process(logits, requests, [0] * 12)
    together = keep_likely(logits, params)
    assert torch.equal(together, expected)
    for row in range(12):
        alone = keep_likely(logits[row : row + 1], params[row : row + 1])
        assert torch.equal(alone[0], together[row])
    assert (together[2] == -torch.inf).sum() > (logits[2] == -torch.inf).sum()


@pytest.mark.parametrize("count", [1, 5, 150, 300])
def test_largest_orders_ties_by_place(count: int):
    values = torch.randn(6, 300).round()
    values[0] = -torch.inf
    values[1, ::2] = -0.0
    values[1, 1::2] = 0.0
    values[2, 7] = torch.inf
    expected = values.argsort(dim=-1, descending=True, stable=True)[:, :count]
    assert torch.equal(largest(values, count), expected)
