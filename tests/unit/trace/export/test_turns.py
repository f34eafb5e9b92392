"""Several turns, cut samples and changed weights: what reaches the trainer."""

import numpy as np
import pytest

from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace import RolloutSample, RolloutWriter, RoutingTrace
from routing_replay.trace.export import EXPORT_FORMATS, ExportParameters, to_prime_rl, to_verl
from unit.trace.trace_cases import invalid_rows, random_ids, random_trace, tokens_of


def sample_of(trace: RoutingTrace, *, num_prompt: int = 3, num_tokens: int = 8) -> RolloutSample:
    tokens = tokens_of(1, num_tokens)
    return RolloutSample(
        key="a",
        prompt_token_ids=tuple(tokens[:num_prompt]),
        token_ids=tuple(tokens[num_prompt:]),
        logprobs=tuple(-0.5 * idx for idx in range(num_tokens - num_prompt)),
        trace=trace,
        text="five tokens",
        finish_reason="stop",
    )


def test_next_turn_refreshes_the_row_of_the_last_token():
    """Token 7 ended turn one without a row; turn two computes it as part of its prompt."""
    filler = random_trace(1, rows=8, valid=[True] * 7 + [False])
    second = random_trace(1, rows=12)
    delta = second.slice(7, 12)
    turns = filler.merge(delta, token_ids=tokens_of(1, 12))
    assert np.array_equal(to_verl(turns, num_tokens=13)[7, 1::2], second.ids[7])
    assert np.array_equal(to_verl(turns, num_tokens=13)[:7, 1::2], filler.ids[:7])
    with pytest.raises(TraceMismatchError, match="token index 7 is missing"):
        to_verl(filler.merge(invalid_rows(delta, [0])), num_tokens=13)


def test_next_turn_replaces_a_repeated_last_row():
    """A trainer that repeats the last row must not keep the repetition in the next turn."""
    ids = random_ids(1, rows=7, layers=3, num_experts=64, top_k=4)
    first = RoutingTrace.from_rows(
        np.concatenate((ids, ids[-1:])),
        token_ids=tokens_of(1, 8),
        layer_ids=(1, 3, 5),
        num_layers=6,
        num_experts=64,
    )
    second = random_trace(1, rows=12)
    merged = first.merge(second.slice(7, 12))
    data = np.frombuffer(to_prime_rl(merged, num_tokens=12)["data"], np.uint8).reshape(12, 6, 4)
    assert np.array_equal(data[7, 1::2], second.ids[7])
    assert not np.array_equal(data[7, 1::2], first.ids[7])


@pytest.mark.parametrize("name", [item.name for item in EXPORT_FORMATS])
def test_partial_rollout_over_two_weights_is_exported(name: str):
    first = random_trace(1, weights_version=3)
    whole = random_trace(1, rows=12, weights_version=4)
    merged = first.merge(whole.slice(7, 12), token_ids=tokens_of(1, 13))
    assert merged.weights_version == ((0, 3), (7, 4))
    chosen = next(item for item in EXPORT_FORMATS if item.name == name)
    parameters = ExportParameters(num_tokens=13, num_prompt_tokens=2)
    same = random_trace(1, weights_version=3).merge(
        random_trace(1, rows=12, weights_version=3).slice(7, 12)
    )
    assert (chosen.encode(merged, parameters) == chosen.encode(same, parameters)) == (
        name not in ("npz", "safetensors")
    )


def test_truncated_sample_is_whole():
    sample = sample_of(random_trace(1))
    for kept in range(3, 8):
        cut = sample.truncate(kept)
        assert cut.all_token_ids == sample.all_token_ids[:kept]
        assert cut.logprobs == sample.logprobs[: kept - 3]
        assert cut.trace.equals(sample.trace.slice(0, kept - 1))
        assert (cut.text, cut.finish_reason, cut.key) == ("", "length", "a")
        cut.trace.validate(cut.all_token_ids)
        assert len(to_verl(cut.trace, num_tokens=kept)) == kept - 1
    assert sample.truncate(8) is sample
    assert sample.truncate(99) is sample
    for kept in (2, 0, -1):
        with pytest.raises(
            ConfigError, match=rf"truncate\({kept}\) cuts the prompt of sample 'a'.* 3 tokens"
        ):
            sample.truncate(kept)


def test_truncated_sample_can_be_written(tmp_path: pytest.TempPathFactory):
    with RolloutWriter(f"{tmp_path}/r", facts={}) as writer:
        writer.append(sample_of(random_trace(1)).truncate(5))


def test_truncated_sample_keeps_versions_and_gaps():
    trace = invalid_rows(random_trace(1, weights_version=((0, 1), (4, 2))), [5])
    cut = sample_of(trace).truncate(6)
    assert cut.trace.weights_version == ((0, 1), (4, 2))
    assert cut.trace.is_complete
    assert sample_of(trace).truncate(5).trace.weights_version == ((0, 1),)
    assert not sample_of(trace).truncate(7).trace.is_complete


def test_truncated_tokens_alone_are_refused():
    with pytest.raises(TraceMismatchError, match="num_tokens=5"):
        to_verl(random_trace(1), num_tokens=5)
