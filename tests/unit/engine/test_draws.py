"""A request's random numbers are those of its generator, in any order and as often as they are asked for."""

import torch

from routing_replay.engine.draws import Draws


def _one_by_one(seed: int, count: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.zeros(1, dtype=torch.float64).uniform_(generator=generator).item()
        for _ in range(count)
    ]


def test_numbers_are_those_of_one_draw_per_token():
    for seed in (0, 1, 2**63 - 1):
        draws = Draws(seed)
        assert [draws.at(index) for index in range(200)] == _one_by_one(seed, 200)


def test_numbers_do_not_depend_on_the_order_of_asking():
    draws = Draws(7)
    expected = _one_by_one(7, 300)
    assert draws.at(299) == expected[299]
    assert [draws.at(index) for index in (64, 63, 0, 128, 64)] == [
        expected[index] for index in (64, 63, 0, 128, 64)
    ]
    assert Draws(8).at(0) != expected[0]


def test_draws_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    Draws(5).at(1000)
    assert torch.equal(torch.random.get_rng_state(), before)
