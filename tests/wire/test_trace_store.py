"""A store survives a kill at any byte, refuses damage by name, and can be read while it grows."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from routing_replay.errors import ConfigError, RoutingReplayError, TraceFormatError
from routing_replay.trace import RoutingTrace, TraceStoreReader, TraceStoreWriter


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
    reader = TraceStoreReader(tmp_path / "s.rrs")
    for number in range(5):
        writer.append(f"sample/{number}", _trace(number, rows=number % 7))
        assert reader.refresh() == 1
        _check(reader, number + 1)
    writer.close()
    writer.close()
    with pytest.raises(ConfigError, match="is closed"):
        writer.append("x", _trace(0))


def test_second_writer_duplicate_key_and_other_folders_are_refused(tmp_path: Path):
    with TraceStoreWriter(tmp_path / "s.rrs") as writer:
        writer.append("a", _trace(0))
        with pytest.raises(ConfigError, match="open in another writer"):
            TraceStoreWriter(tmp_path / "s.rrs")
        with pytest.raises(ConfigError, match="has a trace 'a' already"):
            writer.append("a", _trace(1))
        with pytest.raises(ConfigError, match=r"has 5000 bytes; accepted are at most 4096"):
            writer.append("k" * 5000, _trace(1))
    with (
        TraceStoreWriter(tmp_path / "s.rrs") as writer,
        pytest.raises(ConfigError, match="already"),
    ):
        writer.append("a", _trace(1))
    with pytest.raises(ConfigError, match="not a trace store"):
        TraceStoreReader(tmp_path)


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


def _read_damaged(path: Path) -> tuple[int, int]:
    """Read everything; return how many traces the index names, and how many of them were refused."""
    num_refused = 0
    with TraceStoreReader(path) as reader:
        for number, key in enumerate(reader):
            try:
                trace = reader[key]
            except RoutingReplayError as err:
                if "/data" not in str(err):
                    raise
                num_refused += 1
            else:
                assert trace.equals(_trace(number, rows=number % 7))
        return len(reader), num_refused


@pytest.mark.parametrize("name", ["index", "data"])
def test_every_flipped_bit_is_refused_or_harmless(tmp_path: Path, name: str):
    _fill(tmp_path / "s", 3)
    original = (tmp_path / "s" / name).read_bytes()
    bits = np.arange(8 * len(original))
    if name == "data":
        bits = np.random.default_rng(0).choice(bits, 400, replace=False)
    outcomes = set()
    for bit in bits:
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << (bit % 8)
        (tmp_path / "s" / name).write_bytes(damaged)
        try:
            outcomes.add(_read_damaged(tmp_path / "s"))
        except TraceFormatError as err:
            if f"/{name}" not in str(err):
                raise
    if name == "index":
        # Only a length that now points past the end looks like an entry that is cut off.
        assert all(count < 3 and refused == 0 for count, refused in outcomes)
    else:
        # The one trace with the bit is refused; padding between traces carries nothing.
        assert outcomes <= {(3, 1), (3, 0)}
        assert (3, 1) in outcomes


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
    reader = TraceStoreReader(tmp_path / "s.rrs")
    assert len(reader) == 10_000
    assert reader["9876"].equals(trace)
    # The index is all that opening needs: without any data the keys are still there.
    (tmp_path / "s.rrs" / "data").write_bytes(b"")
    assert len(TraceStoreReader(tmp_path / "s.rrs").keys()) == 10_000
