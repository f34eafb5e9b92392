"""The replay buffer holds exactly the last step's ids, and -1 everywhere else."""

import numpy as np
import pytest
import torch

from routing_replay.capture import ReplayBuffer, RoutingSpec
from routing_replay.errors import CaptureOverflowError, ConfigError

SPEC = RoutingSpec(layer_ids=(0, 2), num_layers=3, num_experts=8, top_k=2)


def _buffer() -> ReplayBuffer:
    return ReplayBuffer(SPEC, num_rows=6, device=torch.device("cpu"))


def _ids(buffer: ReplayBuffer) -> np.ndarray:
    return np.stack([buffer.layer(i).numpy() for i in range(2)]).transpose(1, 0, 2)


def test_fill_sets_a_step_and_returns_what_the_last_one_left_to_native():
    buffer = _buffer()
    addresses = [buffer.layer(i).data_ptr() for i in range(2)]
    rows = np.arange(20, dtype=np.int16).reshape(5, 2, 2)
    buffer.fill(rows)
    assert np.array_equal(_ids(buffer)[:5], rows)
    assert (_ids(buffer)[5:] == -1).all()
    fewer = -rows[:2]
    buffer.fill(fewer)
    fewer = fewer.copy()
    rows[:] = 77  # the caller's own again
    assert np.array_equal(_ids(buffer)[:2], fewer)
    assert (_ids(buffer)[2:] == -1).all()
    buffer.fill(rows[:0])
    assert (_ids(buffer) == -1).all()
    assert [buffer.layer(i).data_ptr() for i in range(2)] == addresses


@pytest.mark.parametrize(
    "rows",
    [np.zeros((2, 2, 2), np.int64), np.zeros((2, 3, 2), np.int16), np.zeros((2, 2, 1), np.int16)],
)
def test_fill_refuses_another_dtype_or_shape(rows: np.ndarray):
    with pytest.raises(ConfigError, match=r"accepted is int16 \[n, 2, 2\]"):
        _buffer().fill(rows)


def test_fill_refuses_more_rows_than_there_are():
    with pytest.raises(CaptureOverflowError, match="7 rows does not fit the replay buffer of 6"):
        _buffer().fill(np.zeros((7, 2, 2), np.int16))
