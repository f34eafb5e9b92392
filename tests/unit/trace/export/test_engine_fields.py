"""The fields of vLLM's and SGLang's answers, read back by the lines that their documentation gives."""

import base64
import io

import numpy as np
import pytest

from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace import RoutingTrace
from routing_replay.trace.export import (
    to_sglang,
    to_skyrl_generate,
    to_vllm,
    to_vllm_generate,
    to_vllm_split,
)
from unit.trace.trace_cases import invalid_rows, random_trace

IDS = np.array([[[5, 2], [0, 7]], [[1, 3], [6, 4]], [[7, 6], [5, 4]]])
ROWS = [
    [[0, 1], [5, 2], [0, 1], [0, 7]],
    [[0, 1], [1, 3], [0, 1], [6, 4]],
    [[0, 1], [7, 6], [0, 1], [5, 4]],
]


def small_trace(num_experts: int = 8) -> RoutingTrace:
    return RoutingTrace.from_rows(
        IDS, token_ids=[9, 8, 7], layer_ids=[1, 3], num_layers=4, num_experts=num_experts
    )


def read_npy(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)


@pytest.mark.parametrize(("num_experts", "dtype"), [(8, "uint8"), (256, "uint8"), (257, "uint16")])
def test_vllm_field_holds_all_layers(num_experts: int, dtype: str):
    array = read_npy(to_vllm(small_trace(num_experts), num_tokens=4))
    assert array.dtype.name == dtype
    assert array.tolist() == ROWS
    assert not array.flags.f_contiguous


def test_vllm_field_starts_where_the_request_said():
    assert read_npy(to_vllm(small_trace(), num_tokens=4, prompt_start=2)).tolist() == ROWS[2:]
    assert read_npy(to_vllm(small_trace(), num_tokens=4, prompt_start=3)).shape == (0, 4, 2)
    later = small_trace().slice(1, 3)
    assert read_npy(to_vllm(later, num_tokens=4, prompt_start=1)).tolist() == ROWS[1:]
    with pytest.raises(TraceMismatchError, match="token index 0 is missing"):
        to_vllm(later, num_tokens=4)
    with pytest.raises(ConfigError, match=r"prompt_start=4; accepted is a token index in \[0, 3\]"):
        to_vllm(small_trace(), num_tokens=4, prompt_start=4)
    with pytest.raises(ConfigError, match="prompt_start=-1"):
        to_vllm(small_trace(), num_tokens=4, prompt_start=-1)


def test_vllm_generate_says_where_it_starts():
    whole = to_vllm_generate(small_trace(), num_tokens=4)
    assert (whole["start"], whole["shape"], whole["dtype"]) == (0, [3, 4, 2], "uint8")
    later = to_vllm_generate(small_trace(300).slice(1, 3), num_tokens=4)
    assert (later["start"], later["shape"], later["dtype"]) == (1, [2, 4, 2], "uint16")
    data = np.frombuffer(base64.b64decode(later["data"]), "<u2").reshape(later["shape"])
    assert data.tolist() == ROWS[1:]
    assert to_vllm_generate(small_trace(), num_tokens=4, prompt_start=2)["start"] == 2
    with pytest.raises(TraceMismatchError, match="token index 1 is missing"):
        to_vllm_generate(invalid_rows(small_trace(), [1]), num_tokens=4)


def test_vllm_split_parts_prompt_and_completion():
    fields = to_vllm_split(small_trace(), num_tokens=4, num_prompt_tokens=2)
    assert fields["prompt_routed_experts"].tolist() == ROWS[:2]
    assert fields["routed_experts"].tolist() == ROWS[2:]
    one = to_vllm_split(small_trace(), num_tokens=4, num_prompt_tokens=3)
    assert one["routed_experts"].shape == (0, 4, 2)
    for num_prompt in (0, 4):
        with pytest.raises(ConfigError, match=f"num_prompt_tokens={num_prompt}"):
            to_vllm_split(small_trace(), num_tokens=4, num_prompt_tokens=num_prompt)


@pytest.mark.parametrize("num_experts", [8, 300, 65536])
def test_sglang_field_is_raw_int32(num_experts: int):
    text = to_sglang(small_trace(num_experts), num_tokens=4)
    assert np.frombuffer(base64.b64decode(text), "<i4").reshape(3, 4, 2).tolist() == ROWS
    later = to_sglang(small_trace(num_experts), num_tokens=4, start_len=1)
    assert np.frombuffer(base64.b64decode(later), "<i4").reshape(2, 4, 2).tolist() == ROWS[1:]
    with pytest.raises(ConfigError, match="start_len=4"):
        to_sglang(small_trace(num_experts), num_tokens=4, start_len=4)
    with pytest.raises(TraceMismatchError, match="SGLang's field cannot say so"):
        to_sglang(invalid_rows(small_trace(num_experts), [2]), num_tokens=4)


def test_skyrl_wire_keeps_the_dtype_of_its_own_rows():
    trace = random_trace(3, num_experts=512)
    whole = to_skyrl_generate(trace, num_tokens=8)
    assert list(whole) == ["data", "shape", "dtype"]
    assert (whole["shape"], whole["dtype"]) == ([7, 6, 4], "int16")
    data = np.frombuffer(base64.b64decode(whole["data"]), "<i2").reshape(7, 6, 4)
    assert np.array_equal(data[:, 1::2], trace.ids)
    delta = to_skyrl_generate(small_trace(512), num_tokens=4, prompt_start=2)
    assert (delta["shape"], delta["dtype"]) == ([1, 4, 2], "uint8")
    with pytest.raises(TraceMismatchError, match="token index 3 is missing"):
        to_skyrl_generate(invalid_rows(trace, [3]), num_tokens=8)
