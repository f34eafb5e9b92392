import pytest

from routing_replay.errors import ConfigError
from routing_replay.replay import Packed, Padded


def test_padded_offsets_follow_the_side():
    assert Padded(lengths=(2, 4), seq_len=5).offsets() == (0, 5)
    assert Padded(lengths=(2, 4), seq_len=5, side="left").offsets() == (3, 6)
    assert Padded(lengths=(2, 4), seq_len=5).num_tokens == 10
    assert Padded(lengths=(2, 4), seq_len=5).shape == (2, 5)


def test_packed_offsets_are_cumulative_lengths():
    layout = Packed(lengths=(2, 4, 1))
    assert layout.offsets() == (0, 2, 6)
    assert layout.num_tokens == 7
    assert layout.shape == (1, 7)


@pytest.mark.parametrize("lengths", [(), [3, 4], (3, 0), (3, -1), (3, 2.0), (True,), 3])
def test_layouts_refuse_lengths(lengths: object):
    with pytest.raises(ConfigError, match="lengths"):
        Packed(lengths=lengths)
    with pytest.raises(ConfigError, match="lengths"):
        Padded(lengths=lengths, seq_len=9)


@pytest.mark.parametrize("seq_len", [3, 0, 4.0, None])
def test_padded_refuses_seq_len(seq_len: object):
    with pytest.raises(ConfigError, match=r"seq_len.*4 tokens"):
        Padded(lengths=(2, 4), seq_len=seq_len)


def test_padded_refuses_side():
    with pytest.raises(ConfigError, match="'middle'"):
        Padded(lengths=(2, 4), seq_len=5, side="middle")
