"""Drafts are what followed before; what is kept is what the model would have sampled without them."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from routing_replay.engine.speculation import PromptLookup, SpeculativeConfig, propose, verify
from routing_replay.errors import ConfigError


def _config(tokens: int = 3, longest: int = 4, shortest: int = 1) -> SpeculativeConfig:
    return SpeculativeConfig(
        num_speculative_tokens=tokens, prompt_lookup_max=longest, prompt_lookup_min=shortest
    )


def _slow(tokens: Sequence[int], config: SpeculativeConfig) -> list[int]:
    """The definition, written out."""
    for length in range(config.prompt_lookup_max, config.prompt_lookup_min - 1, -1):
        last = list(tokens[-length:])
        starts = [
            start + length
            for start in range(len(tokens) - length)
            if list(tokens[start : start + length]) == last
        ]
        if starts and len(last) == length:
            whole = [s for s in starts if s + config.num_speculative_tokens <= len(tokens)]
            start = whole[-1] if whole else starts[0]
            return list(tokens[start : start + config.num_speculative_tokens])
    return []


@pytest.mark.parametrize(
    ("tokens", "config", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2], _config(), [3, 4, 9]),
        ([1, 2, 7, 5, 2, 8, 1, 2], _config(2), [7, 5]),  # the longer match, not the later one
        ([1, 2, 7, 7, 1, 2, 8, 8, 1, 2], _config(2), [8, 8]),  # the later of two equally long
        ([5, 5, 5], _config(3, 1), [5, 5]),  # nothing whole follows: the most that does
        ([5, 5, 5], _config(3), [5]),  # two tokens match, and only one follows them
        ([5, 5, 5, 5, 5, 5, 5], _config(3), [5, 5, 5]),
        ([1, 2, 3], _config(), []),
        ([1, 2, 9, 3, 2], _config(3, 4, 2), []),  # one token is too short a match
        ([4], _config(), []),
        ([], _config(), []),
    ],
)
def test_propose_drafts_what_followed(tokens: list[int], config: SpeculativeConfig, expected: list[int]):  # fmt: skip
    assert propose(tokens, config) == expected


def test_propose_is_its_definition_on_random_tokens():
    generator = random.Random(0)
    found = 0
    for _ in range(400):
        tokens = [generator.randrange(4) for _ in range(generator.randrange(40))]
        shortest = generator.randrange(1, 4)
        config = _config(generator.randrange(1, 5), shortest + generator.randrange(3), shortest)
        assert propose(tokens, config) == _slow(tokens, config), (tokens, config)
        assert propose(np.array(tokens, np.int32), config) == _slow(tokens, config)
        found += bool(propose(tokens, config))
    assert 100 < found < 400


def test_prompt_lookup_grows_with_its_request():
    generator = random.Random(1)
    tokens = [generator.randrange(5) for _ in range(20)]
    lookup = PromptLookup(tokens, _config())
    for _ in range(100):
        assert lookup.propose() == propose(tokens, _config())
        more = [generator.randrange(5) for _ in range(generator.randrange(1, 4))]
        tokens += more
        lookup.extend(more)


@pytest.mark.parametrize(
    ("drafts", "sampled", "kept"),
    [
        ([], [4], [4]),
        ([4, 5, 6], [4, 5, 6, 7], [4, 5, 6, 7]),
        ([4, 5, 6], [4, 9, 6, 7], [4, 9]),
        ([4, 5, 6], [9, 5, 6, 7], [9]),
    ],
)
def test_verify_keeps_up_to_the_first_difference(drafts: list[int], sampled: list[int], kept: list[int]):  # fmt: skip
    assert verify(drafts, sampled) == kept


def test_verify_is_exact():
    """Whatever the drafts are, tokens come as a model without drafts gives them: here one that hashes its input."""
    generator = random.Random(2)

    def token_after(tokens: Sequence[int]) -> int:
        return hash((len(tokens), *tokens[-3:])) % 3

    plain = [0]
    while len(plain) < 200:
        plain.append(token_after(plain))
    tokens = [0]
    num_steps = 0
    while len(tokens) < 200:
        drafts = [
            plain[len(tokens) + place] if generator.random() < 0.7 else generator.randrange(3)
            for place in range(min(3, 200 - len(tokens)))
        ]
        sampled = [token_after([*tokens, *drafts[:place]]) for place in range(len(drafts) + 1)]
        tokens += verify(drafts, sampled)
        num_steps += 1
    assert tokens[:200] == plain
    assert num_steps < 150


def test_verify_refuses_a_wrong_number_of_samples():
    with pytest.raises(ConfigError, match="2 sampled tokens for 2 drafts"):
        verify([1, 2], [1, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "eagle"}, "method='eagle'; accepted are 'ngram', 'mtp'"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens=0"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min=5 is above prompt_lookup_max=4"),
        ({"num_draft_tokens": 5}, "has 'num_draft_tokens'; accepted are method, num_speculative"),
        ({"num_speculative_tokens": "3"}, "num_speculative_tokens='3'; accepted is of type int"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens=True"),
    ],
)
def test_speculative_config_refuses_bad_settings(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig.of(settings)


def test_speculative_config_takes_vllms_mapping():
    settings = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2}
    config = SpeculativeConfig.of(settings)
    assert config == SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_max=2)
    assert SpeculativeConfig.of(config) is config
