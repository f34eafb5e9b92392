import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_replay.errors import TraceFormatError
from routing_replay.trace import token_digests, trace_id_dtype

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


@given(TOKENS)
def test_token_digests_are_the_running_crc32(tokens: list[int]):
    encoded = np.array(tokens, dtype="<u4").tobytes()
    expected = [zlib.crc32(encoded[: 4 * (idx + 1)]) for idx in range(len(tokens))]
    digests = token_digests(tokens)
    assert digests.dtype == np.uint32
    assert digests.tolist() == expected


@given(TOKENS, st.data())
def test_token_digests_continue_from_any_token(tokens: list[int], data: st.DataObject):
    cut = data.draw(st.integers(1, max(1, len(tokens))))
    digests = token_digests(tokens)
    if tokens:
        rest = token_digests(tokens[cut:], previous=int(digests[cut - 1]))
        assert rest.tolist() == digests[cut:].tolist()


@given(TOKENS.filter(bool), st.integers(1, 2**32 - 1), st.data())
def test_token_digests_change_from_a_changed_token_on(
    tokens: list[int], change: int, data: st.DataObject
):
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [token ^ change if idx == at else token for idx, token in enumerate(tokens)]
    same = token_digests(tokens) == token_digests(other)
    assert same.tolist() == [idx < at for idx in range(len(tokens))]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_token_digests_do_not_depend_on_the_dtype(dtype: type):
    tokens = [0, 1, 127]
    assert token_digests(np.array(tokens, dtype=dtype)).tolist() == token_digests(tokens).tolist()


def test_token_digests_of_no_tokens_are_empty():
    assert token_digests([]).shape == (0,)
    assert token_digests(np.zeros(0, dtype=np.int64)).dtype == np.uint32


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([3, -1], r"token_ids\[1\] = -1 is outside"),
        ([2**32], r"token_ids\[0\] = 4294967296 is outside"),
        ([2**64 - 1], "is outside"),
        ([1.0], "dtype float64"),
        ([True], "dtype bool"),
        ([[1, 2]], "shape"),
        ([[1], [2, 3]], "ragged"),
        ([2**70], "dtype object"),
    ],
)
def test_token_digests_refuse_what_is_not_a_token(tokens: list[int], message: str):
    with pytest.raises(TraceFormatError, match=message):
        token_digests(tokens)


@pytest.mark.parametrize("previous", [-1, 2**32])
def test_token_digests_refuse_an_impossible_previous_digest(previous: int):
    with pytest.raises(TraceFormatError, match="previous"):
        token_digests([1], previous=previous)


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16)],
)
def test_trace_id_dtype_is_the_narrowest_that_fits(num_experts: int, dtype: type):
    assert trace_id_dtype(num_experts) == np.dtype(dtype)


@pytest.mark.parametrize("num_experts", [-1, 0, 65537])
def test_trace_id_dtype_refuses_other_counts(num_experts: int):
    with pytest.raises(TraceFormatError, match=f"num_experts = {num_experts} "):
        trace_id_dtype(num_experts)
