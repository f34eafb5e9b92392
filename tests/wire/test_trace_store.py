"""A store survives a kill at any byte, refuses damage by name, and can be read while it grows."""

import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing_replay.errors import ConfigError, TraceFormatError
from routing_replay.trace import RoutingTrace, TraceStoreReader, TraceStoreWriter, encode_trace
from routing_replay.trace._store_index import IndexEntry, encode_entry, encode_head
from wire.trace_files import golden_store, write_golden_store

GOLDEN = Path(__file__).parent / "golden"


def _trace(seed: int, rows: int = 5) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    ids = rng.random((rows, 3, 16)).argsort(-1)[..., :4]
    return RoutingTrace.from_rows(
        ids,
        token_ids=rng.integers(0, 1000, rows + 1),
        layer_ids=(1, 2, 4),
        num_layers=5,
        num_experts=16,
    )


def _fill(path: Path, count: int, first: int = 0) -> None:
    with TraceStoreWriter(path) as writer:
        for number in range(first, first + count):
            writer.append(f"sample/{number}", _trace(number, rows=number % 7))


def _check(reader: TraceStoreReader, count: int) -> None:
    assert reader.keys() == tuple(f"sample/{number}" for number in range(count))
    for number in reversed(range(count)):
        assert reader[f"sample/{number}"].equals(_trace(number, rows=number % 7))


def test_traces_come_back_in_any_order_and_after_more_were_appended(tmp_path: Path):
    _fill(tmp_path / "s.rrs", 20)
    with TraceStoreReader(tmp_path / "s.rrs") as reader:
        _check(reader, 20)
        _fill(tmp_path / "s.rrs", 10, first=20)
        assert len(reader) == 20
        assert reader.refresh() == 10
        _check(reader, 30)
        assert reader.refresh() == 0
        assert "sample/3" in reader
        assert "sample/30" not in reader
        with pytest.raises(KeyError):
            reader["sample/30"]


def test_empty_store_and_empty_key(tmp_path: Path):
    TraceStoreWriter(tmp_path / "s.rrs").close()
    with TraceStoreReader(tmp_path / "s.rrs") as reader:
        assert (len(reader), reader.keys()) == (0, ())
    with TraceStoreWriter(tmp_path / "s.rrs") as writer:
        writer.append("", _trace(1))
        writer.append("ключ/☃", _trace(2))
        assert len(writer) == 2
    with TraceStoreReader(tmp_path / "s.rrs") as reader:
        assert reader[""].equals(_trace(1))
        assert reader["ключ/☃"].equals(_trace(2))


def test_reader_sees_each_trace_as_soon_as_it_is_appended(tmp_path: Path):
    writer = TraceStoreWriter(tmp_path / "s.rrs")
    with TraceStoreReader(tmp_path / "s.rrs") as reader:
        for number in range(5):
            writer.append(f"sample/{number}", _trace(number, rows=number % 7))
            assert reader.refresh() == 1
            _check(reader, number + 1)
    writer.close()
    writer.close()
    for use in (lambda: writer.append("x", _trace(0)), writer.flush):
        with pytest.raises(ConfigError, match="is closed"):
            use()
    reader.close()
    for use in (lambda: reader["sample/0"], reader.refresh):
        with pytest.raises(ConfigError, match="is closed"):
            use()


def test_second_writer_and_duplicate_key_are_refused(tmp_path: Path):
    with TraceStoreWriter(tmp_path / "s.rrs") as writer:
        writer.append("a", _trace(0))
        with pytest.raises(ConfigError, match="open in another writer"):
            TraceStoreWriter(tmp_path / "s.rrs")
        with pytest.raises(ConfigError, match="has a trace 'a' already"):
            writer.append("a", _trace(1))
        assert "a" in writer
    with (
        TraceStoreWriter(tmp_path / "s.rrs") as writer,
        pytest.raises(ConfigError, match="already"),
    ):
        writer.append("a", _trace(1))
    with TraceStoreReader(tmp_path / "s.rrs") as reader:
        assert reader["a"].equals(_trace(0))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("k" * 4097, "has 4097 bytes; accepted are at most 4096"),
        ("☃" * 1366, "has 4098 bytes"),
        ("\ud800", "cannot be written as UTF-8: surrogates not allowed"),
        (b"k", "is a bytes; a key is a string"),
        (7, "key = 7 is a int"),
    ],
)
def test_keys_that_cannot_be_stored_are_refused(tmp_path: Path, key: str, message: str):
    with TraceStoreWriter(tmp_path / "s.rrs") as writer:
        with pytest.raises(ConfigError, match=message):
            writer.append(key, _trace(0))
        writer.append("k" * 4096, _trace(1))
    with TraceStoreReader(tmp_path / "s.rrs") as reader:
        assert reader.keys() == ("k" * 4096,)


def test_places_that_are_no_store_are_refused_and_left_alone(tmp_path: Path):
    for missing in (tmp_path, tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").write_text("precious")
        with pytest.raises(ConfigError, match="is not a trace store"):
            TraceStoreReader(missing)
    with pytest.raises(ConfigError, match="is a file"):
        TraceStoreWriter(tmp_path / "file")
    with pytest.raises(ConfigError, match="holds other files"):
        TraceStoreWriter(tmp_path)
    with pytest.raises(ConfigError, match="codec='lz4'; accepted are 'raw', 'packed'"):
        TraceStoreWriter(tmp_path / "s.rrs", codec="lz4")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_trace_that_is_not_valid_leaves_the_store_as_it_was(tmp_path: Path):
    bad = RoutingTrace.from_rows(
        np.ones((1, 1, 2), int), token_ids=[1], layer_ids=[0], num_layers=1, num_experts=8
    )
    with TraceStoreWriter(tmp_path / "s.rrs") as writer:
        writer.append("a", _trace(0))
        before = [(tmp_path / "s.rrs" / name).read_bytes() for name in ("index", "data")]
        with pytest.raises(TraceFormatError, match="repeats an expert"):
            writer.append("b", bad)
        assert [(tmp_path / "s.rrs" / name).read_bytes() for name in ("index", "data")] == before


@pytest.mark.parametrize("codec", ["raw", "packed", "raw+zstd", "packed+zstd"])
def test_store_keeps_traces_in_its_codec(tmp_path: Path, codec: str):
    with TraceStoreWriter(tmp_path / "s.rrs", codec=codec) as writer:
        writer.append("a", _trace(0))
    with TraceStoreReader(tmp_path / "s.rrs") as reader:
        assert reader.read_bytes("a") == encode_trace(_trace(0), codec=codec)
        assert reader["a"].equals(_trace(0).as_sets() if "packed" in codec else _trace(0))
    with (
        TraceStoreReader(tmp_path / "s.rrs", max_decoded_bytes=9) as reader,
        pytest.raises(TraceFormatError, match=r"data: trace 'a': .* max_decoded_bytes = 9"),
    ):
        reader["a"]


def test_golden_store_is_read_and_written_byte_for_byte(tmp_path: Path):
    with TraceStoreReader(GOLDEN / "v1_store.rrs") as reader:
        assert reader.keys() == ("small", "wide/☃", "")
        for key, trace in golden_store().items():
            assert reader[key].equals(trace.as_sets())
    write_golden_store(tmp_path / "s.rrs")
    for name in ("index", "data"):
        assert (tmp_path / "s.rrs" / name).read_bytes() == (
            GOLDEN / "v1_store.rrs" / name
        ).read_bytes()


def _failing_pwrite(call: int, size: int, error: BaseException) -> Callable[..., int]:
    """Return a pwrite whose n-th call writes some bytes and fails."""
    real, calls = os.pwrite, []

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) - 1 != call:
            return real(file, data, offset)
        real(file, data[:size], offset)
        raise error

    return pwrite


# Writes of an append: the trace, then the entry, whose prefix has 32 bytes and whose key here 8.
@pytest.mark.parametrize(
    ("call", "size"),
    [(0, 0), (0, 1), (0, 200), *((1, size) for size in (0, 1, 31, 32, 33, 39, 40))],
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_append_that_fails_at_any_byte_is_repaired_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, size: int, error: BaseException
):
    _fill(tmp_path / "whole", 3)
    _fill(tmp_path / "s", 1)
    trace = _trace(1, rows=1)
    with TraceStoreWriter(tmp_path / "s") as writer, TraceStoreReader(tmp_path / "s") as reader:
        with monkeypatch.context() as patch:
            patch.setattr("os.pwrite", _failing_pwrite(call, size, error))
            with pytest.raises(type(error)):
                writer.append("sample/1", trace)
        is_whole = (call, size) == (1, 40)
        assert reader.refresh() == int(is_whole)
        assert ("sample/1" in writer) is is_whole
        if not is_whole:
            writer.append("sample/1", trace)
        writer.append("sample/2", _trace(2, rows=2))
        reader.refresh()
        _check(reader, 3)
    for name in ("index", "data"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", lambda file, data, offset: real(file, data[:7], offset))
        _fill(tmp_path / "short", 3)
    _fill(tmp_path / "whole", 3)
    for name in ("index", "data"):
        assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", ["index", "data"])
def test_cut_at_every_byte_leaves_whole_traces_or_a_named_error(tmp_path: Path, name: str):
    _fill(tmp_path / "whole", 4)
    files = {part: (tmp_path / "whole" / part).read_bytes() for part in ("index", "data")}
    broken = tmp_path / "broken"
    broken.mkdir()
    sizes = []
    for size in range(len(files[name])):
        for part, data in files.items():
            (broken / part).write_bytes(data[:size] if part == name else data)
        try:
            with TraceStoreReader(broken) as reader:
                count = len(reader)
                found = [reader[key] for key in reader]
        except TraceFormatError as err:
            # An index that is cut off names fewer traces, and nothing else.
            if name == "index" or "truncated" not in str(err):
                raise
            continue
        for number, trace in enumerate(found):
            assert trace.equals(_trace(number, rows=number % 7))
        sizes.append(count)
    if name == "index":
        assert sorted(set(sizes)) == [0, 1, 2, 3]
        assert sizes == sorted(sizes)


def test_writer_killed_at_any_byte_leaves_a_store_that_goes_on(tmp_path: Path):
    _fill(tmp_path / "whole", 3)
    files = {part: (tmp_path / "whole" / part).read_bytes() for part in ("index", "data")}
    _fill(tmp_path / "two", 2)
    two = {part: (tmp_path / "two" / part).read_bytes() for part in ("index", "data")}
    # What a kill can leave: data of the third trace in part and no entry, or all data and the entry in part.
    states = [
        (two["index"], files["data"][:size])
        for size in range(len(two["data"]), len(files["data"]) + 1)
    ]
    states += [
        (files["index"][:size], files["data"])
        for size in range(len(two["index"]), len(files["index"]))
    ]
    for number, (index, data) in enumerate(states):
        broken = tmp_path / f"broken{number}"
        broken.mkdir()
        (broken / "index").write_bytes(index)
        (broken / "data").write_bytes(data)
        with TraceStoreReader(broken) as reader:
            _check(reader, 2)
        _fill(broken, 1, first=2)
        assert (broken / "index").read_bytes() == files["index"]
        assert (broken / "data").read_bytes() == files["data"]


def test_every_flipped_bit_of_the_index_is_refused(tmp_path: Path):
    _fill(tmp_path / "s", 3)
    original = (tmp_path / "s" / "index").read_bytes()
    for bit in range(8 * len(original)):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << (bit % 8)
        (tmp_path / "s" / "index").write_bytes(damaged)
        with pytest.raises(TraceFormatError, match="index"):
            TraceStoreReader(tmp_path / "s")
        with pytest.raises(TraceFormatError, match="index"):
            TraceStoreWriter(tmp_path / "s")
        # The writer repairs what a kill leaves, and never what damage leaves.
        assert (tmp_path / "s" / "index").read_bytes() == damaged
    (tmp_path / "s" / "index").write_bytes(original)
    with TraceStoreReader(tmp_path / "s") as reader:
        _check(reader, 3)


def _refusal(reader: TraceStoreReader, key: str) -> str:
    """Return the message with which a trace is refused; empty where it is read whole."""
    try:
        trace = reader[key]
    except TraceFormatError as err:
        return str(err)
    number = int(key.removeprefix("sample/"))
    assert trace.equals(_trace(number, rows=number % 7))
    return ""


def test_every_flipped_bit_of_the_data_is_refused_with_its_key_and_no_other(tmp_path: Path):
    _fill(tmp_path / "s", 3)
    original = (tmp_path / "s" / "data").read_bytes()
    for bit in range(0, 8 * len(original), 11):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << (bit % 8)
        (tmp_path / "s" / "data").write_bytes(damaged)
        with TraceStoreReader(tmp_path / "s") as reader:
            refused = {key: message for key in reader if (message := _refusal(reader, key))}
        ((key, message),) = refused.items()
        assert f"data: trace {key!r}" in message


def test_data_that_shrinks_under_a_reader_is_an_error_and_no_crash(tmp_path: Path):
    _fill(tmp_path / "s", 3)
    with TraceStoreReader(tmp_path / "s") as reader:
        _check(reader, 3)
        os.truncate(tmp_path / "s" / "data", 100)
        with pytest.raises(TraceFormatError, match=r"has 100 bytes, but trace 'sample/2' ends at"):
            reader["sample/2"]
        os.truncate(tmp_path / "s" / "index", 20)
        with pytest.raises(TraceFormatError, match=r"has 20 bytes but had .* a store only grows"):
            reader.refresh()
    (tmp_path / "s" / "data").unlink()
    _fill(tmp_path / "t", 1)
    (tmp_path / "t" / "data").unlink()
    with (
        TraceStoreReader(tmp_path / "t") as reader,
        pytest.raises(TraceFormatError, match="data does not exist"),
    ):
        reader["sample/0"]


ENTRY = st.builds(
    IndexEntry,
    key=st.sampled_from(["sample/0", "sample/1", "new", ""]) | st.text(max_size=9),
    offset=st.sampled_from([0, 8, 496, 2**64 - 8]) | st.integers(0, 2**64 - 1),
    nbytes=st.sampled_from([0, 1, 490, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    crc32=st.integers(0, 2**32 - 1),
)


@settings(max_examples=200)
@given(entry=ENTRY, after=st.booleans(), tail=st.binary(max_size=80))
def test_index_of_any_entries_gives_a_refusal_or_the_traces_before(
    tmp_path_factory: pytest.TempPathFactory, entry: IndexEntry, after: bool, tail: bytes
):
    path = tmp_path_factory.mktemp("fuzz") / "s"
    _fill(path, 2)
    index = (path / "index").read_bytes() if after else encode_head()
    (path / "index").write_bytes(index + encode_entry(entry) + tail)
    try:
        reader = TraceStoreReader(path)
    except TraceFormatError:
        return
    with reader:
        assert reader.keys() == (*(("sample/0", "sample/1") if after else ()), entry.key)
        for key in reader.keys()[:-1]:
            assert not _refusal(reader, key)
        with pytest.raises(TraceFormatError, match="data"):
            reader[entry.key]


def test_trace_whose_checksum_holds_is_still_validated_and_named(tmp_path: Path):
    _fill(tmp_path / "s", 1)
    noise = bytes(range(64))
    (tmp_path / "s" / "data").write_bytes(noise)
    entry = IndexEntry("sample/0", 0, 64, zlib.crc32(noise))
    (tmp_path / "s" / "index").write_bytes(encode_head() + encode_entry(entry))
    with (
        TraceStoreReader(tmp_path / "s") as reader,
        pytest.raises(TraceFormatError, match="data: trace 'sample/0': magic"),
    ):
        reader["sample/0"]


@pytest.mark.parametrize("version", [0, 2])
def test_store_of_another_version_is_refused(tmp_path: Path, version: int):
    _fill(tmp_path / "s", 1)
    start = b"\x89RRS\r\n\x1a\n" + struct.pack("<I", version)
    (tmp_path / "s" / "index").write_bytes(start + struct.pack("<I", zlib.crc32(start)))
    for opener in (TraceStoreReader, TraceStoreWriter):
        with pytest.raises(TraceFormatError, match=f"store version = {version} is not known"):
            opener(tmp_path / "s")


WRITE_FOREVER = """
import sys
sys.path[:0] = {paths!r}
from test_trace_store import _trace
from routing_replay.trace import TraceStoreWriter
writer = TraceStoreWriter({path!r})
number = len(writer)
print("ready", flush=True)
while True:
    writer.append(f"sample/{{number}}", _trace(number, rows=number % 7))
    number += 1
"""


def test_killed_processes_lose_nothing_that_a_reader_saw(tmp_path: Path):
    path = tmp_path / "s.rrs"
    script = WRITE_FOREVER.format(paths=[str(Path(__file__).parent), *sys.path], path=str(path))
    seen = 0
    for pause in (0.02, 0.05, 0.01):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 20
        with TraceStoreReader(path) as reader:
            while len(reader) <= seen and time.monotonic() < deadline:
                reader.refresh()
            time.sleep(pause)
            reader.refresh()
            assert len(reader) > seen
            seen = len(reader)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            reader.refresh()
            assert len(reader) >= seen
            _check(reader, len(reader))


def test_ten_thousand_traces_open_without_reading_them(tmp_path: Path):
    trace = _trace(1)
    with TraceStoreWriter(tmp_path / "s.rrs") as writer:
        for number in range(10_000):
            writer.append(str(number), trace)
    with TraceStoreReader(tmp_path / "s.rrs") as reader:
        assert len(reader) == 10_000
        assert reader["9876"].equals(trace)
    # The index is all that opening needs: without any data the keys are still there.
    (tmp_path / "s.rrs" / "data").write_bytes(b"")
    with TraceStoreReader(tmp_path / "s.rrs") as reader:
        assert len(reader.keys()) == 10_000
