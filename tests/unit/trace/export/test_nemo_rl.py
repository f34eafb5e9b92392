"""NeMo-RL: signed ids, a row of -1 for its own router, and a batch padded with distinct ids."""

import base64

import numpy as np
import pytest

from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace.export import to_nemo_rl, to_nemo_rl_batch, to_nemo_rl_envelope
from unit.trace.trace_cases import invalid_rows, random_trace


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(8, np.int8), (128, np.int8), (129, np.int16), (32768, np.int16), (32769, np.int32)],
)
def test_dtype_is_the_narrowest_that_holds_minus_one(num_experts: int, dtype: type):
    trace = random_trace(1, rows=2, layers=2, num_experts=num_experts)
    rows = to_nemo_rl(trace, num_tokens=3)
    assert (rows.dtype, rows.shape) == (dtype, (3, 2, 4))
    assert np.array_equal(rows[:2], trace.ids)
    assert rows[2].tolist() == [[0, 1, 2, 3]] * 2


def test_missing_rows_are_minus_one_only_where_the_caller_says_so():
    trace = invalid_rows(random_trace(1, start=1), [2, 6])
    rows = to_nemo_rl(trace, num_tokens=10, on_missing="native")
    gaps = [0, 3, 7, 8]
    assert [row for row in range(10) if (rows[row] == -1).all()] == gaps
    assert not (np.delete(rows, gaps, axis=0) == -1).any()
    kept = [0, 1, 3, 4, 5]
    assert np.array_equal(rows[[row + 1 for row in kept]], trace.ids[kept])
    assert rows[9].tolist() == [[0, 1, 2, 3]] * 3
    with pytest.raises(TraceMismatchError, match="token index 0 is missing"):
        to_nemo_rl(trace, num_tokens=10)
    with pytest.raises(ConfigError, match="on_missing='arange' is not offered by NeMo-RL"):
        to_nemo_rl(trace, num_tokens=10, on_missing="arange")


def test_last_row_is_the_captured_one_where_there_is_one():
    trace = random_trace(1)
    assert np.array_equal(to_nemo_rl(trace, num_tokens=7), trace.ids)


def test_envelope_says_dtype_and_shape():
    trace = random_trace(1, num_experts=257)
    magic, dtype, shape, data = to_nemo_rl_envelope(trace, num_tokens=8).split(":", 3)
    assert (magic, dtype, shape) == ("nrlre1", "int16", "8x3x4")
    rows = np.frombuffer(base64.b64decode(data, validate=True), "<i2").reshape(8, 3, 4)
    assert np.array_equal(rows, to_nemo_rl(trace, num_tokens=8))


def test_batch_is_padded_on_the_right():
    traces = (random_trace(1), random_trace(2, rows=3), invalid_rows(random_trace(3, rows=4), [1]))
    batch = to_nemo_rl_batch(traces, num_tokens=(8, 4, 5), seq_len=9, on_missing="native")
    assert (batch.dtype, batch.shape) == (np.int8, (3, 9, 3, 4))
    for row, (trace, tokens) in enumerate(zip(traces, (8, 4, 5), strict=True)):
        alone = to_nemo_rl(trace, num_tokens=tokens, on_missing="native")
        assert np.array_equal(batch[row, :tokens], alone)
        assert (batch[row, tokens:] == np.arange(4)).all()
    assert (batch[2, 1] == -1).all()


def test_batch_refuses_other_models_and_lengths():
    with pytest.raises(ConfigError, match="seq_len=7 but a sequence has 8 tokens"):
        to_nemo_rl_batch([random_trace(1)], num_tokens=[8], seq_len=7)
    with pytest.raises(ConfigError, match="num_tokens has 2 numbers for 1 traces"):
        to_nemo_rl_batch([random_trace(1)], num_tokens=[8, 8], seq_len=8)
    with pytest.raises(ConfigError, match="traces is empty"):
        to_nemo_rl_batch([], num_tokens=[], seq_len=8)
    with pytest.raises(TraceMismatchError, match=r"traces\[1\] has num_experts = 128"):
        to_nemo_rl_batch(
            [random_trace(1), random_trace(1, num_experts=128)], num_tokens=[8, 8], seq_len=8
        )
