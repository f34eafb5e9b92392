import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from routing_replay.errors import TraceFormatError
from routing_replay.trace import (
    RoutingTrace,
    decode_trace,
    encode_trace,
    load_trace,
    save_trace,
)
from unit.trace.trace_cases import random_trace, traces
from wire.trace_files import small_trace, wide_trace

GOLDEN = Path(__file__).parent / "golden"
FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "trace_format.md"


@given(traces())
def test_decode_trace_gives_back_the_trace(trace: RoutingTrace):
    data = encode_trace(trace)
    decoded = decode_trace(data)
    assert decoded.equals(trace)
    assert encode_trace(decoded) == data


@pytest.mark.parametrize("num_experts", [8, 64, 256, 257, 512])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_decode_trace_gives_back_every_id(num_experts: int, rows: int):
    trace = random_trace(rows=rows, num_experts=num_experts, top_k=8)
    decoded = decode_trace(encode_trace(trace))
    assert decoded.ids.dtype == trace.ids.dtype
    assert decoded.ids.tolist() == trace.ids.tolist()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_decode_trace_shares_no_memory_with_its_input(kind: type):
    trace = wide_trace()
    buffer = bytearray(encode_trace(trace))
    decoded = decode_trace(buffer if kind is bytearray else kind(buffer))
    buffer[:] = bytes(len(buffer))
    buffer.clear()
    assert decoded.equals(trace)
    assert not decoded.ids.flags.writeable


def test_decode_trace_reads_a_buffer_that_starts_at_an_odd_address():
    data = bytearray(b"x" + encode_trace(wide_trace()))
    assert decode_trace(memoryview(data)[1:]).equals(wide_trace())


@pytest.mark.parametrize(
    ("name", "trace"), [("v1_raw.rrt", small_trace()), ("v1_raw_weights.rrt", wide_trace())]
)
def test_golden_files_are_read_and_written_byte_for_byte(name: str, trace: RoutingTrace):
    data = (GOLDEN / name).read_bytes()
    assert encode_trace(trace) == data
    assert decode_trace(data).equals(trace)
    assert load_trace(GOLDEN / name).equals(trace)


def test_format_page_shows_the_bytes_of_the_golden_files():
    page = FORMAT_PAGE.read_text(encoding="utf-8")
    index, whole, payload = (
        bytes.fromhex(
            "".join(re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)", block, re.MULTILINE))
        )
        for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    )
    assert index == (GOLDEN / "v1_store.rrs" / "index").read_bytes()
    assert whole == (GOLDEN / "v1_raw.rrt").read_bytes()
    packed = (GOLDEN / "v1_packed.rrt").read_bytes()
    assert payload == packed[0x1C8:]
    assert len(payload) < len(whole) - 0x1C8


def test_encode_trace_refuses_what_no_reader_would_accept():
    ids = np.zeros((1, 1, 2), dtype=np.uint8)
    trace = RoutingTrace.from_rows(ids, token_ids=[1], layer_ids=[0], num_layers=1, num_experts=8)
    with pytest.raises(TraceFormatError, match="repeats an expert"):
        encode_trace(trace)


def test_encode_trace_refuses_a_header_that_is_too_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("routing_replay.trace._header.MAX_HEADER_BYTES", 200)
    with pytest.raises(TraceFormatError, match="exceeds 200"):
        encode_trace(small_trace())


def test_save_trace_replaces_the_file_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "one.rrt"
    save_trace(small_trace(), path)
    assert load_trace(path).equals(small_trace())
    save_trace(wide_trace(), str(path))
    assert load_trace(str(path)).equals(wide_trace())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_save_trace_keeps_the_old_file_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    path = tmp_path / "one.rrt"
    save_trace(small_trace(), path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(OSError, match="No space"):
            save_trace(wide_trace(), path)
    assert load_trace(path).equals(small_trace())
    assert list(tmp_path.iterdir()) == [path]


def test_save_trace_writes_nothing_of_an_invalid_trace(tmp_path: Path):
    trace = RoutingTrace.from_rows(
        np.ones((1, 1, 2), int), token_ids=[1], layer_ids=[0], num_layers=1, num_experts=8
    )
    with pytest.raises(TraceFormatError):
        save_trace(trace, tmp_path / "one.rrt")
    assert list(tmp_path.iterdir()) == []


def test_save_trace_needs_its_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        save_trace(small_trace(), tmp_path / "none" / "one.rrt")


def test_load_trace_names_the_file_that_is_bad(tmp_path: Path):
    path = tmp_path / "bad.rrt"
    path.write_bytes(encode_trace(small_trace())[:-1])
    with pytest.raises(TraceFormatError, match=r"bad\.rrt: payload has"):
        load_trace(path)
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "none.rrt")
