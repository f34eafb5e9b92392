import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace import RoutingTrace, pack_traces
from unit.trace.trace_cases import invalid_rows, random_trace, traces


def pieces_of(trace: RoutingTrace, cuts: list[int]) -> list[RoutingTrace]:
    """Cut a trace into pieces, some of them empty, whose metadata differ."""
    bounds = sorted({trace.start, *cuts, trace.end})
    pieces = [trace.slice(a, b) for a, b in itertools.pairwise(bounds)]
    pieces.append(trace.slice(trace.end, trace.end))
    return [
        dataclasses.replace(piece, ordered=bool(idx % 2)) for idx, piece in enumerate(pieces[::-1])
    ]


@given(traces(), st.data())
def test_unpack_gives_back_every_trace(trace: RoutingTrace, data: st.DataObject):
    cuts = data.draw(st.lists(st.integers(trace.start, trace.end), max_size=4))
    pieces = pieces_of(trace, cuts)
    extra = data.draw(st.lists(st.integers(0, 3), min_size=len(pieces), max_size=len(pieces)))
    lengths = [piece.end + more for piece, more in zip(pieces, extra, strict=True)]
    for packed in (pack_traces(pieces), pack_traces(pieces, lengths=lengths)):
        unpacked = packed.unpack()
        assert len(unpacked) == len(pieces)
        assert all(a.equals(b) for a, b in zip(unpacked, pieces, strict=True))


def test_pack_traces_puts_rows_one_after_the_other():
    first = invalid_rows(random_trace(0, rows=5), [2])
    second = random_trace(1, rows=3, start=4)
    packed = pack_traces([first, second])
    assert packed.cu_seqlens.tolist() == [0, 5, 8]
    assert packed.cu_seqlens.dtype == np.int32
    assert packed.max_seqlen == 5
    assert packed.ids.tolist() == first.ids.tolist() + second.ids.tolist()
    assert packed.valid.tolist() == [True, True, False, True, True, True, True, True]
    assert packed.token_digest.tolist() == [*first.token_digest, *second.token_digest]


def test_pack_traces_with_lengths_gives_every_token_its_row():
    first, second = random_trace(0, rows=3), random_trace(1, rows=2, start=1)
    packed = pack_traces([first, second], lengths=[4, 5])
    assert packed.cu_seqlens.tolist() == [0, 4, 9]
    filler = [[0, 1, 2, 3]] * 3
    expected = [*first.ids.tolist(), filler, filler, *second.ids.tolist(), filler, filler]
    assert packed.ids.tolist() == expected
    assert np.flatnonzero(packed.valid).tolist() == [0, 1, 2, 5, 6]
    assert [sequence.first_row for sequence in packed.sequences] == [0, 5]


def test_unpack_is_sensitive_to_one_id():
    trace = random_trace()
    ids = trace.ids.copy()
    ids[3, 1, 2] = next(i for i in range(64) if i not in ids[3, 1])
    (unpacked,) = pack_traces([dataclasses.replace(trace, ids=ids)]).unpack()
    assert not unpacked.equals(trace)


def test_pack_traces_shares_no_memory_and_is_read_only():
    trace = random_trace(weights=np.ones((7, 3, 4), np.float16))
    packed = pack_traces([trace])
    for name in ("ids", "valid", "token_digest", "weights", "cu_seqlens"):
        array = getattr(packed, name)
        assert not array.flags.writeable
        assert array.flags.owndata
        assert not np.shares_memory(array, getattr(trace, name, np.zeros(1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 63}, "num_experts = 63 but traces[0] has 64"),
        ({"num_experts": 300}, "num_experts = 300"),
        ({"top_k": 3}, "top_k = 3"),
        ({"layers": 2}, "num_layers = 4"),
        ({"num_layers": 9}, "num_layers = 9"),
        ({"layer_ids": (0, 1, 2)}, "layer_ids = (0, 1, 2) but traces[0] has (1, 3, 5)"),
        ({"weights": np.ones((7, 3, 4), np.float16)}, "weights of dtype = float16"),
    ],
)
def test_pack_traces_refuses_mixed_layouts(changes: dict[str, object], message: str):
    good = random_trace()
    with pytest.raises(TraceMismatchError) as caught:
        pack_traces([good, good, random_trace(**changes)])
    assert f"traces[2] has {message}" in str(caught.value)


def test_pack_traces_refuses_lengths_that_do_not_fit():
    trace = random_trace(start=2)
    with pytest.raises(ConfigError, match="traces is empty"):
        pack_traces([])
    with pytest.raises(ConfigError, match="1 entries for 2 traces"):
        pack_traces([trace, trace], lengths=[9])
    with pytest.raises(TraceMismatchError, match=r"token index 8 but lengths\[1\] = 8; .* 9"):
        pack_traces([trace, trace], lengths=[9, 8])
    with pytest.raises(ConfigError, match="2147483656 rows"):
        pack_traces([trace, trace], lengths=[9, (1 << 31) - 1])


def test_packed_traces_as_tensors_keep_every_id():
    packed = pack_traces([random_trace(0), random_trace(1)], lengths=[8, 8])
    tensors = packed.to_torch()
    assert tensors.ids.tolist() == packed.ids.tolist()
    assert tensors.valid.tolist() == packed.valid.tolist()
