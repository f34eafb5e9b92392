"""Sampling draws from the distribution that it is given, and the Triton kernels (interpreted) as the reference."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from routing_replay.errors import ConfigError
from routing_replay.kernels.sampling import (
    PlainSamples,
    choose_tokens,
    inverse_cdf,
    log_softmax,
    sample_plain,
)

LAST = 1 - 2.0**-53


def test_sample_plain_gives_token_logprobs_and_ranks():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]]).expand(3, 4)
    temperature = torch.tensor([0.0, 1.0, 0.5])
    samples = sample_plain(logits, temperature, torch.tensor([0.9, LAST, 0.0], dtype=torch.float64))
    assert samples.token_ids.tolist() == [1, 3, 0]
    raw, halved = logits[0].log_softmax(0), (logits[0] / 0.5).log_softmax(0)
    assert samples.raw_logprobs.tolist() == [raw[1], raw[3], raw[0]]
    assert samples.logprobs.tolist() == [raw[1], raw[3], halved[0]]
    assert samples.ranks.tolist() == [1, 1, 4]
    assert samples.processed_ranks.tolist() == [1, 1, 4]
    part = PlainSamples(samples.packed[1:2])
    assert part.token_ids.tolist() == [3]
    assert part.ranks.tolist() == [1]
    assert part.logprobs.tolist() == [raw[3]]


def test_sample_plain_without_logprobs_says_so():
    samples = sample_plain(
        torch.randn(2, 9), torch.ones(2), torch.rand(2, dtype=torch.float64), with_logprobs=False
    )
    assert samples.raw_logprobs.isnan().all()
    assert samples.logprobs.isnan().all()
    assert samples.ranks.tolist() == samples.processed_ranks.tolist() == [0, 0]


def test_frequencies_follow_the_softmax():
    count = 20_000
    logits = torch.randn(300)
    uniform = torch.rand(count, dtype=torch.float64)
    samples = sample_plain(logits.expand(count, -1), torch.full((count,), 0.8), uniform)
    expected = (logits / 0.8).softmax(0).double().numpy() * count
    found = np.bincount(samples.token_ids.numpy(), minlength=300)
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert abs(chi_square - 299) < 5 * (2 * 299) ** 0.5


@pytest.mark.parametrize("is_greedy", [(False,) * 3, (True,) * 3, (True, False, True)])
def test_choose_tokens_are_those_of_sample_plain(is_greedy: tuple[bool, ...]):
    logits, uniform = torch.randn(3, 200), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    temperature = torch.tensor([0.0 if greedy else 1.0 for greedy in is_greedy])
    expected = sample_plain(logits, temperature, uniform).token_ids
    assert torch.equal(choose_tokens(logits, uniform, is_greedy), expected)
    assert (expected == logits.argmax(-1)).tolist() >= list(is_greedy)


@pytest.mark.parametrize("number", [0.0, 0.25, 0.5, LAST])
def test_inverse_cdf_never_takes_a_token_without_probability(number: float):
    probs = torch.zeros(2, 700)
    probs[0, [130, 131, 699]] = torch.tensor([0.25, 0.25, 0.5])
    probs[1, 3] = 1e-45
    drawn = inverse_cdf(probs, torch.full((2, 1), number, dtype=torch.float64))
    assert drawn.tolist() == [{0.0: 130, 0.25: 131, 0.5: 699, LAST: 699}[number], 3]


def test_log_softmax_is_that_of_torch():
    logits = torch.randn(3, 50)
    assert torch.equal(log_softmax(logits), logits.log_softmax(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 5, dtype=torch.bfloat16)}, "logits is torch.bfloat16"),
        ({"logits": torch.zeros(5)}, r"logits has shape \(5,\); accepted is \[B, V\]"),
        ({"logits": torch.zeros(2, 0)}, r"logits has shape \(2, 0\)"),
        ({"logits": torch.zeros(5, 2).t()}, "logits has strides"),
        ({"temperature": torch.zeros(2, dtype=torch.float64)}, "temperature is torch.float64"),
        ({"temperature": torch.zeros(3)}, r"temperature has shape \(3,\).*accepted is \(2,\)"),
        ({"uniform": torch.zeros(2)}, "uniform is torch.float32; accepted is torch.float64"),
        ({"uniform": torch.zeros(4, dtype=torch.float64)[::2]}, r"uniform .* strides \(2,\)"),
        ({"backend": "triton"}, "backend='triton' on cpu"),
    ],
)
def test_sample_plain_refuses_bad_arguments(change: dict[str, object], message: str):
    arguments: dict[str, object] = {
        "logits": torch.zeros(2, 5),
        "temperature": torch.zeros(2),
        "uniform": torch.zeros(2, dtype=torch.float64),
    }
    with pytest.raises(ConfigError, match=message):
        sample_plain(**{**arguments, **change})  # pyright: ignore[reportArgumentType]


def test_ops_pass_opcheck():
    logits, uniform = torch.randn(3, 40), torch.rand(3, dtype=torch.float64)
    for with_logprobs in (True, False):
        torch.library.opcheck(
            torch.ops.routing_replay.sample_plain.default,
            (logits, torch.tensor([0.0, 1.0, 0.5]), uniform, with_logprobs, "reference"),
        )


def test_triton_kernels_equal_the_reference_in_the_interpreter(tmp_path: Path):
    # The interpreter is chosen when a kernel is defined, so it needs a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("interpreted_sampling.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
