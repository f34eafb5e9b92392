"""A store shared by processes: one writer at a time, killed at random, watched by a reader; copies in forks."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from routing_replay.errors import ConfigError
from routing_replay.trace import RoutingTrace, TraceStoreReader, TraceStoreWriter
from unit.trace.trace_cases import random_trace

WRITER = """
import sys
sys.path[:0] = {paths!r}
from routing_replay.trace import TraceStoreWriter
from unit.trace.trace_cases import random_trace
writer = TraceStoreWriter({path!r})
number = len(writer)
while True:
    writer.append(str(number), random_trace(number % 11, rows=number % 11, layers=2))
    number += 1
    if number % 3 == 0:
        writer.flush()
    print(number, flush=True)
"""


def expected(number: int) -> RoutingTrace:
    return random_trace(number % 11, rows=number % 11, layers=2)


def start_writer(path: Path) -> subprocess.Popen[str]:
    script = WRITER.format(paths=sys.path, path=str(path))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen[str]) -> list[int]:
    """End a writer at once; return the numbers of traces that it said it had appended."""
    os.kill(process.pid, signal.SIGKILL)
    assert process.stdout is not None
    lines = process.stdout.read().split("\n")[:-1]
    process.wait()
    process.stdout.close()
    return [int(line) for line in lines]


def test_writer_killed_at_random_moments_loses_no_trace_that_it_appended(tmp_path: Path):
    rng, path, num_before = random.Random(0), tmp_path / "s.rrs", 0
    for _ in range(4):
        process = start_writer(path)
        assert process.stdout is not None
        said = [int(process.stdout.readline())]
        # Only while it lives: the lock ends with the process.
        with pytest.raises(ConfigError, match="open in another writer"):
            TraceStoreWriter(path)
        time.sleep(0.05 * rng.random())
        said += kill(process)
        with TraceStoreReader(path) as reader:
            # One more, if it was killed before it could say so.
            assert len(reader) in (said[-1], said[-1] + 1)
            assert list(reader) == [str(number) for number in range(len(reader))]
            assert len(reader) > num_before
            num_before = len(reader)
            for number in range(num_before):
                assert reader[str(number)].equals(expected(number))
    with TraceStoreWriter(path) as writer:
        assert len(writer) == num_before


def test_reader_sees_a_growing_prefix_while_another_process_appends(tmp_path: Path):
    process = start_writer(tmp_path / "s.rrs")
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with TraceStoreReader(tmp_path / "s.rrs") as reader:
            num_seen, deadline = len(reader), time.monotonic() + 20
            while num_seen < 100 and time.monotonic() < deadline:
                num_new = reader.refresh()
                for number in range(num_seen, num_seen + num_new):
                    assert reader[str(number)].equals(expected(number))
                num_seen += num_new
                assert len(reader) == num_seen
            assert num_seen >= 100
            assert reader["0"].equals(expected(0))
    finally:
        kill(process)


def test_copy_of_a_writer_in_a_fork_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "s.rrs"
    with TraceStoreWriter(path) as writer:
        writer.append("0", expected(0))
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        with monkeypatch.context() as patch:
            # What a fork sees: the same object under another process id.
            patch.setattr("os.getpid", lambda: 7)
            for use in (lambda: writer.append("1", expected(1)), writer.flush):
                with pytest.raises(ConfigError, match="not to its fork 7"):
                    use()
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        writer.append("1", expected(1))
    with TraceStoreReader(path) as reader:
        assert reader["1"].equals(expected(1))
