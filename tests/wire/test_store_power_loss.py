"""What was flushed outlives a loss of power; what was not is whole or gone; damage is never taken for either."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from routing_replay.errors import TraceFormatError
from routing_replay.trace import TraceStoreReader, TraceStoreWriter
from unit.trace.trace_cases import random_trace

NAMES = ("data", "index", "flushed")
FLUSHED, LATER = ("flushed/0", "flushed/1"), ("later/0", "later/1")
TRACES = {
    key: random_trace(seed, rows=3 + seed, layers=2) for seed, key in enumerate(FLUSHED + LATER)
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a store with two flushed and two later traces, as a kill would leave them."""
    path = tmp_path_factory.mktemp("power") / "s.rrs"
    with TraceStoreWriter(path) as writer:
        for key in FLUSHED:
            writer.append(key, TRACES[key])
        writer.flush()
        sizes = {name: (path / name).stat().st_size for name in NAMES}
        for key in LATER:
            writer.append(key, TRACES[key])
        files = {name: (path / name).read_bytes() for name in NAMES}
    assert len(files["flushed"]) == sizes["flushed"] == 16
    return {**files, **{f"{name} flushed": files[name][: sizes[name]] for name in NAMES}}


def lay_out(folder: Path, store: dict[str, bytes], **changed: bytes) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(changed.get(name, store[name]))
    return folder


def readable(path: Path) -> tuple[str, ...]:
    """Return the keys that can be read, each with the right trace, after checking that the rest is refused by name."""
    found: list[str] = []
    with TraceStoreReader(path) as reader:
        for key in reader:
            message = ""
            try:
                assert reader[key].equals(TRACES[key])
            except TraceFormatError as err:
                message = str(err)
            if message:
                assert str(path / "data") in message
                assert repr(key) in message
            else:
                found.append(key)
    return tuple(found)


def goes_on(path: Path) -> tuple[str, ...]:
    """Let a writer repair the store and append what is missing; return what it had found."""
    with TraceStoreWriter(path) as writer:
        kept = tuple(key for key in TRACES if key in writer)
        assert len(writer) == len(kept)
        assert writer.num_cut_bytes > 0
        for key, trace in TRACES.items():
            if key not in kept:
                writer.append(key, trace)
    assert readable(path) == FLUSHED + LATER
    return kept


def lose(data: bytes, size: int, *, as_zeros: bool) -> bytes:
    """Return a file of which the disk has the first bytes only."""
    return data[:size] + bytes(len(data) - size if as_zeros else 0)


@pytest.mark.parametrize("as_zeros", [False, True], ids=["short", "zeros"])
@pytest.mark.parametrize("name", ["data", "index"])
def test_loss_of_what_was_not_flushed_leaves_a_prefix_that_goes_on(
    tmp_path: Path, store: dict[str, bytes], name: str, as_zeros: bool
):
    kept: list[int] = []
    for size in range(len(store[f"{name} flushed"]), len(store[name]) - 8, 5):
        lost = lose(store[name], size, as_zeros=as_zeros)
        path = lay_out(tmp_path / "s", store, **{name: lost})
        found = readable(path)
        assert found == (FLUSHED + LATER)[: len(found)]
        assert goes_on(path) == found
        kept.append(len(found))
    assert sorted(kept) == kept
    assert set(kept) == {2, 3}


def test_reader_tells_how_much_is_torn(tmp_path: Path, store: dict[str, bytes]):
    flushed, whole = len(store["index flushed"]), len(store["index"])
    for size in range(flushed, whole + 1):
        with TraceStoreReader(
            lay_out(tmp_path / "s", store, index=store["index"][:size])
        ) as reader:
            # Entries of keys of 7 bytes have 40.
            assert reader.num_torn_bytes == (size - flushed) % 40
            (tmp_path / "s" / "index").write_bytes(store["index"])
            assert reader.refresh() == 2 - (size - flushed) // 40
            assert reader.num_torn_bytes == 0
    assert whole - flushed == 80


def test_loss_in_both_files_leaves_a_prefix(tmp_path: Path, store: dict[str, bytes]):
    for index_size in range(len(store["index flushed"]), len(store["index"]) - 8, 7):
        lost = {
            "index": lose(store["index"], index_size, as_zeros=True),
            "data": lose(store["data"], len(store["data flushed"]) + 9, as_zeros=False),
        }
        path = lay_out(tmp_path / "s", store, **lost)
        assert readable(path) == FLUSHED
        assert goes_on(path) == FLUSHED


@pytest.mark.parametrize("name", ["data", "index"])
def test_loss_of_what_was_flushed_is_damage(tmp_path: Path, store: dict[str, bytes], name: str):
    for size in range(len(store[f"{name} flushed"])):
        path = lay_out(tmp_path / "s", store, **{name: store[name][:size]})
        with pytest.raises(TraceFormatError, match=r"s/(data|index)"):
            TraceStoreWriter(path)
        assert (path / name).read_bytes() == store[name][:size]
        if name == "index":
            with pytest.raises(TraceFormatError, match=r"s/index"):
                TraceStoreReader(path)
        else:
            assert set(readable(path)) < set(FLUSHED)
    # The same cut with no word of a flush is what a kill may leave: the marks make the difference.
    cut = store["index"][: len(store["index flushed"]) - 1]
    path = lay_out(tmp_path / "s", store, index=cut, flushed=b"")
    assert readable(path) == FLUSHED[:1]
    assert goes_on(path) == FLUSHED[:1]


def test_every_flipped_bit_before_the_mark_is_refused(tmp_path: Path, store: dict[str, bytes]):
    for bit in range(8 * len(store["index flushed"])):
        damaged = bytearray(store["index flushed"])
        damaged[bit // 8] ^= 1 << bit % 8
        # Without the later entries, so that only the mark tells damage from a loss of power.
        path = lay_out(tmp_path / "s", store, index=bytes(damaged))
        for opener in (TraceStoreReader, TraceStoreWriter):
            with pytest.raises(TraceFormatError, match="s/index"):
                opener(path)
        assert (path / "index").read_bytes() == damaged


def test_damage_before_a_whole_entry_is_not_taken_for_a_loss(
    tmp_path: Path, store: dict[str, bytes]
):
    first = len(store["index flushed"])
    for bit in range(8 * first, 8 * (first + 32)):
        damaged = bytearray(store["index"])
        damaged[bit // 8] ^= 1 << bit % 8
        path = lay_out(tmp_path / "s", store, index=bytes(damaged))
        for opener in (TraceStoreReader, TraceStoreWriter):
            with pytest.raises(TraceFormatError, match=rf"s/index: entry at byte {first} \(key"):
                opener(path)
    damaged = bytearray(store["data"])
    damaged[len(store["data flushed"]) + 3] ^= 1
    path = lay_out(tmp_path / "s", store, data=bytes(damaged))
    with pytest.raises(
        TraceFormatError, match=r"'later/1' .* is whole, but trace 'later/0' before"
    ):
        TraceStoreWriter(path)
    assert readable(path) == (*FLUSHED, "later/1")
    assert (path / "data").read_bytes() == damaged


def test_marks_can_be_cut_and_damaged_without_harm(tmp_path: Path, store: dict[str, bytes]):
    for size in range(len(store["flushed"])):
        assert readable(lay_out(tmp_path / "s", store, flushed=store["flushed"][:size])) == tuple(
            TRACES
        )
    for bit in range(8 * len(store["flushed"])):
        damaged = bytearray(store["flushed"])
        damaged[bit // 8] ^= 1 << bit % 8
        path = lay_out(tmp_path / "s", store, flushed=bytes(damaged))
        assert readable(path) == tuple(TRACES)
    (path / "flushed").unlink()
    assert readable(path) == tuple(TRACES)


@pytest.mark.parametrize("tail", [b"", b"\x01", bytes(15), bytes(16), b"\xff" * 40])
def test_mark_goes_behind_the_last_one_and_the_last_whole_one_counts(
    tmp_path: Path, store: dict[str, bytes], tail: bytes
):
    path = lay_out(tmp_path / "s", store, flushed=store["flushed"] + tail)
    # The first mark still counts: a cut before it is refused.
    (path / "index").write_bytes(store["index flushed"][:-1])
    with pytest.raises(TraceFormatError, match="s/index"):
        TraceStoreReader(path)
    (path / "index").write_bytes(store["index"])
    TraceStoreWriter(path).close()
    assert len((path / "flushed").read_bytes()) == 32 + len(tail) // 16 * 16
    # The new mark covers the later traces: without their last byte the index is refused.
    (path / "index").write_bytes(store["index"][:-1])
    with pytest.raises(TraceFormatError, match="were on the disk"):
        TraceStoreReader(path)


def test_flush_writes_the_mark_after_traces_index_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    fsync, pwrite = os.fsync, os.pwrite

    def name_of(file: int) -> str:
        return Path(f"/proc/self/fd/{file}").readlink().name

    def noted(what: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(file: int, *rest: object) -> object:
            events.append(f"{what} {name_of(file)}")
            return call(file, *rest)

        return run

    with TraceStoreWriter(tmp_path / "s.rrs") as writer:
        monkeypatch.setattr("os.fsync", noted("sync", fsync))
        monkeypatch.setattr("os.pwrite", noted("write", pwrite))
        writer.append("a", TRACES["later/0"])
        writer.flush()
        expected = ["write data", "write index", "sync data", "sync index", "sync s.rrs"]
        assert events == [*expected, f"sync {tmp_path.name}", "write flushed"]
        events.clear()
        writer.flush()
        assert events == []
        writer.append("b", TRACES["later/1"])
        writer.flush()
        assert events == [*expected[:4], "write flushed"]


@pytest.mark.parametrize("failing_call", [0, 1])
def test_flush_that_fails_closes_the_writer_and_leaves_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
):
    calls: list[int] = []

    def failing(file: int) -> None:
        calls.append(file)
        if len(calls) > failing_call:
            raise OSError(5, "Input/output error")

    writer = TraceStoreWriter(tmp_path / "s.rrs")
    writer.append("flushed/0", TRACES["flushed/0"])
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            writer.flush()
        with pytest.raises(ValueError, match="is closed"):
            writer.flush()
        writer.close()
    assert (tmp_path / "s.rrs" / "flushed").read_bytes() == b""
    assert readable(tmp_path / "s.rrs") == ("flushed/0",)
    TraceStoreWriter(tmp_path / "s.rrs").close()
    assert len((tmp_path / "s.rrs" / "flushed").read_bytes()) == 16
