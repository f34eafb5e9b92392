"""Sampling follows its settings and its seed, and nothing else."""

import numpy as np
import pytest
import torch

from _support.sampling import sample
from routing_replay.engine.config import LogprobsMode
from routing_replay.engine.draws import Draws
from routing_replay.engine.request import Request
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.errors import ConfigError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def _request(seed: int = 0, **settings: float) -> Request:
    params = SamplingParams(**settings)  # pyright: ignore[reportArgumentType]
    return Request(
        request_id=str(seed),
        prompt=None,
        token_ids=[1],
        num_prompt_tokens=1,
        params=params,
        draws=Draws(seed),
        eos_token_ids=(),
    )


def _draw(count: int, **settings: float) -> np.ndarray:
    requests = [_request(seed, **settings) for seed in range(count)]
    sampled = sample(LOGITS.expand(count, -1), requests, LogprobsMode.RAW)
    return np.bincount([token.token_id for token in sampled], minlength=5) / count


def test_frequencies_follow_the_softmax():
    for temperature in (1.0, 0.5):
        expected = (LOGITS / temperature).softmax(0).numpy()
        np.testing.assert_allclose(_draw(4000, temperature=temperature), expected, atol=0.03)


def test_top_k_and_top_p_cut_and_renormalise():
    top_two = LOGITS[:2].softmax(0).numpy()
    np.testing.assert_allclose(_draw(2000, top_k=2)[:2], top_two, atol=0.04)
    assert _draw(500, top_k=2)[2:].sum() == 0
    assert _draw(500, top_p=0.7)[2:].sum() == 0  # 0.64 alone does not reach 0.7, two tokens do
    assert _draw(500, top_p=0.6)[1:].sum() == 0
    assert _draw(500, top_p=1e-9)[0] == 1


@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 4001])
def test_draws_are_those_of_the_running_sum_over_the_whole_vocabulary(vocab_size: int):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(64, vocab_size, generator=generator) * 3
    if vocab_size > 128:
        logits[:, :128] = -torch.inf  # a whole block without any probability
    requests = [_request(seed) for seed in range(64)]
    drawn = [token.token_id for token in sample(logits, requests, LogprobsMode.RAW)]
    uniform = torch.stack(
        [
            torch.zeros(1, dtype=torch.float64).uniform_(
                generator=torch.Generator().manual_seed(seed)
            )
            for seed in range(64)
        ]
    )
    cumulative = logits.softmax(-1).double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    assert drawn == expected.tolist()
    assert (logits.softmax(-1).gather(1, torch.tensor(drawn)[:, None]) > 0).all()


def test_greedy_takes_the_smaller_id_of_a_tie():
    logits = torch.tensor([[0.0, 3.0, 3.0]])
    assert sample(logits, [_request(temperature=0.0)], LogprobsMode.RAW)[0].token_id == 1


def test_a_token_does_not_depend_on_its_neighbours():
    logits = torch.randn(4, 50)
    together = sample(logits, [_request(s) for s in range(4)], LogprobsMode.RAW)
    alone = [sample(logits[s : s + 1], [_request(s)], LogprobsMode.RAW)[0] for s in range(4)]
    assert [t.token_id for t in together] == [t.token_id for t in alone]


def test_logprobs_are_raw_or_processed():
    raw = sample(LOGITS[None], [_request(temperature=0.5, top_k=1, logprobs=2)], LogprobsMode.RAW)
    entry = raw[0].logprobs
    assert entry is not None
    assert entry[0].logprob == pytest.approx(float(LOGITS.log_softmax(0)[0]))
    assert [(token, value.rank) for token, value in entry.items()] == [(0, 1), (1, 2)]
    processed = sample(
        LOGITS[None], [_request(temperature=0.5, top_k=1, logprobs=0)], LogprobsMode.PROCESSED
    )
    assert processed[0].logprobs is not None
    assert processed[0].logprobs[0].logprob == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -2),
     ("max_tokens", 0), ("logprobs", -1)],
)  # fmt: skip
def test_sampling_params_refuse_a_bad_value(name: str, value: float):
    with pytest.raises(ConfigError, match=f"{name}=.*accepted"):
        SamplingParams(**{name: value})  # pyright: ignore[reportArgumentType]
