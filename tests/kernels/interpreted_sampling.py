"""Run by `test_sampling.py` in a process of its own: the sampling kernels in Triton's interpreter."""

import torch
from torch import Tensor

from routing_replay.kernels.sampling import PlainSamples, sample_plain_reference
from routing_replay.kernels.sampling._triton import launch_log_softmax, launch_sample_plain

LAST = 1 - 2.0**-53
INFINITY = float("inf")
CHUNK = 64


def sampled(logits: Tensor, temperature: Tensor, uniform: Tensor, **settings: bool) -> PlainSamples:
    packed = torch.full((len(logits), 3), 77, dtype=torch.int64)
    launch_sample_plain(logits, temperature, uniform, packed, chunk=CHUNK, **settings)
    return PlainSamples(packed)


def table(logits: Tensor) -> Tensor:
    out = torch.full(logits.shape, 77.0)
    launch_log_softmax(logits, out, chunk=CHUNK)
    return out


def check_against_reference() -> None:
    for vocab_size in (1, 63, 64, 65, 300):
        logits = torch.randn(6, vocab_size) * 3
        if vocab_size > 64:
            logits[:, :64] = -INFINITY
        temperature = torch.tensor([0.0, 1.0, 0.5, 1.7, 0.0, 1.0])
        uniform = torch.rand(6, dtype=torch.float64)
        uniform[5] = LAST
        found = sampled(logits, temperature, uniform)
        expected = sample_plain_reference(logits, temperature, uniform)
        assert found.token_ids.tolist() == expected.token_ids.tolist(), vocab_size
        torch.testing.assert_close(found.raw_logprobs, expected.raw_logprobs, rtol=0, atol=3e-6)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=3e-6)
        # Ranks exactly: among the logprobs of the same kernels.
        raw = table(logits)
        of_token = raw.gather(1, found.token_ids[:, None])
        assert torch.equal(of_token.squeeze(1), found.raw_logprobs)
        assert found.ranks.tolist() == ((raw > of_token).sum(1) + 1).tolist()
        scale = temperature.masked_fill(temperature == 0, 1.0)
        scaled = table(logits / scale[:, None])
        of_token = scaled.gather(1, found.token_ids[:, None])
        assert torch.equal(of_token.squeeze(1), found.logprobs)
        assert found.processed_ranks.tolist() == ((scaled > of_token).sum(1) + 1).tolist()
        torch.testing.assert_close(raw, logits.log_softmax(-1), rtol=0, atol=3e-6)
        tokens_alone = sampled(logits, temperature, uniform, with_logprobs=False)
        assert torch.equal(tokens_alone.token_ids, found.token_ids)
        assert tokens_alone.raw_logprobs.isnan().all()
        assert (tokens_alone.ranks == 0).all()


def check_ranks_among_rounded_logprobs() -> None:
    """A high temperature makes ties of logits that differ by one bit: the two ranks are those of their own logprobs."""
    logits = (16 + torch.arange(200) * 2.0**-19).flip(0)[None]
    temperature = torch.tensor([100.0])
    found = sampled(logits, temperature, torch.tensor([0.7], dtype=torch.float64))
    token = int(found.token_ids)
    assert found.ranks.tolist() == [token + 1]
    scaled = table(logits / 100)[0]
    assert found.processed_ranks.tolist() == [int((scaled > scaled[token]).sum()) + 1]
    assert int(found.processed_ranks) < int(found.ranks)


def check_edges() -> None:
    ties = torch.zeros(200)
    peak = torch.full((200,), -INFINITY)
    peak[130] = 5.0
    two = torch.full((200,), -INFINITY)
    two[[70, 199]] = torch.tensor([1.0, 1.0])
    late = torch.linspace(-200, 0, 200)  # the first tokens' probabilities vanish
    logits = torch.stack([ties, ties, ties, peak, peak, two, two, two, late, late])
    temperature = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0])
    uniform = torch.tensor([0.3, 0.0, LAST, 0.0, LAST, 0.0, 0.5, LAST, 0.0, LAST]).double()
    uniform[[2, 4, 7, 9]] = LAST
    found = sampled(logits, temperature, uniform)
    tokens = found.token_ids.tolist()
    assert tokens[:8] == [0, 0, 199, 130, 130, 70, 199, 199], tokens
    assert logits[8].softmax(0)[tokens[8]] > 0
    assert tokens[9] == 199
    assert found.ranks.tolist()[:8] == [1] * 8
    assert found.raw_logprobs[3:5].tolist() == [0.0, 0.0]
    # Half of equal tokens lie below one half.
    middle = sampled(ties[None], torch.ones(1), torch.tensor([0.5], dtype=torch.float64))
    assert middle.token_ids.tolist() == [100]


def check_rows_without_a_distribution() -> None:
    good = torch.randn(130)
    rows = [good.clone() for _ in range(6)]
    rows[1][5] = float("nan")
    rows[2][129] = INFINITY
    rows[3][:] = -INFINITY
    rows[4][:] = float("nan")
    logits = torch.stack(rows)
    for temperature in (0.0, 1.0, 0.7):
        found = sampled(logits, torch.full((6,), temperature), torch.full((6,), 0.9).double())
        assert ((found.token_ids >= 0) & (found.token_ids < 130)).all()
        assert found.raw_logprobs.isnan().tolist() == [False, True, True, True, True, False]
        assert found.logprobs.isnan().tolist() == [False, True, True, True, True, False]
        assert torch.equal(found.packed[0], found.packed[5])
    assert table(logits).isnan().all(1).tolist() == [False, True, True, True, True, False]


def check_independence() -> None:
    wide = torch.randn(5, 207) * 2
    logits = wide[:, :201]  # rows that are no whole number of 16 bytes apart
    temperature = torch.tensor([1.0, 0.6, 0.0, 1.0, 2.0])
    uniform = torch.rand(5, dtype=torch.float64)
    together = sampled(logits, temperature, uniform).packed
    for row in range(5):
        own = slice(row, row + 1)
        alone = sampled(logits[own].clone(), temperature[own], uniform[own]).packed
        assert torch.equal(alone, together[own])
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = sampled(logits[order], temperature[order], uniform[order]).packed
    assert torch.equal(moved, together[order])
    assert sampled(logits[:0], temperature[:0], uniform[:0]).packed.shape == (0, 3)


torch.manual_seed(0)
check_against_reference()
check_ranks_among_rounded_logprobs()
check_edges()
check_rows_without_a_distribution()
check_independence()
print("equal")  # noqa: T201
