"""The one process that appends to a trace store."""

import fcntl
import os
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

from routing_replay.errors import ConfigError, TraceFormatError
from routing_replay.trace._closing import Closing
from routing_replay.trace._codecs import chosen_codec
from routing_replay.trace._file import flush_folder
from routing_replay.trace._store_flushed import (
    FLUSHED_NAME,
    encode_mark,
    next_mark_at,
    read_flushed,
)
from routing_replay.trace._store_index import (
    DATA_NAME,
    HEAD_BYTES,
    INDEX_NAME,
    MAX_KEY_BYTES,
    IndexEntry,
    check_head,
    decode_entries,
    encode_entry,
    encode_head,
    padding,
)
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace._wire import encode_trace

__all__ = ["TraceStoreWriter"]

_PIECE_BYTES = 1 << 20


class TraceStoreWriter(Closing):
    """Appends traces to a store; one writer at a time.

    A trace is in the store once its index entry is written, after its bytes. What was appended outlives the process,
    killed at any byte; what was flushed outlives a loss of power. The next writer removes what was cut off.

    Args:
        path: The store's folder, customarily `*.rrs`; made if it does not exist.
        codec: How traces are encoded, as for `encode_trace`.

    Raises:
        ConfigError: There is no such codec, another writer has the store open, or the path holds something else than
            a store.
        TraceFormatError: The store is damaged; nothing is changed.
        OSError: The file system refuses.
    """

    def __init__(self, path: str | os.PathLike[str], *, codec: str = "raw") -> None:
        self.path = Path(path)
        self._codec = chosen_codec(codec).name
        self._process_id = os.getpid()
        self._num_cut_bytes = 0
        _make_folder(self.path)
        with ExitStack() as opened:
            self._index = opened.enter_context(_open_for_update(self.path / INDEX_NAME))
            _lock(self._index, self.path)
            self._data = opened.enter_context(_open_for_update(self.path / DATA_NAME))
            self._flushed = opened.enter_context(_open_for_update(self.path / FLUSHED_NAME))
            self._flushed_end = read_flushed(self.path / FLUSHED_NAME)
            self._keys, self._index_end, self._data_end = self._repair()
            # Closed last to first, so that the lock outlives the other files.
            self._files = opened.pop_all()
        self._is_torn = False
        self._is_folder_flushed = False

    @property
    def num_cut_bytes(self) -> int:
        """Bytes that were removed: of traces left unfinished, or never flushed and lost with the power."""
        return self._num_cut_bytes

    def __len__(self) -> int:
        self._repair_if_torn()
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        self._repair_if_torn()
        return key in self._keys

    def append(self, key: str, trace: RoutingTrace) -> None:
        """Add a trace. Readers of other processes see it on return; see `flush` for a loss of power.

        After an exception that left the files in between (a full disk, an interrupt), the store is whole without the
        trace, or with it where only the return was cut off: `key in writer` tells, and the next call repairs the rest.

        Args:
            key: A name that the store does not have, at most 4096 bytes in UTF-8.
            trace: A trace with valid content.

        Raises:
            ConfigError: The store has the key already, the key is not accepted, or the writer is closed.
            TraceFormatError: The content is not valid; nothing is written.
            IntegrationError: The codec needs the package zstandard, which is missing.
            OSError: The file system refuses.
        """
        self._check_open()
        _check_key(key)
        if key in self:
            raise ConfigError(
                f"{self.path} has a trace {key!r} already; a store only grows: choose another key"
            )
        data = encode_trace(trace, codec=self._codec)
        entry = IndexEntry(key, self._data_end, len(data), zlib.crc32(data))
        commit = encode_entry(entry)
        # Whatever happens from here on, an interrupt between two lines too: the files know better.
        self._is_torn = True
        _write_at(self._data, data + bytes(padding(len(data))), self._data_end)
        # Only now: the entry is what makes the trace part of the store.
        _write_at(self._index, commit, self._index_end)
        self._keys.add(key)
        self._data_end = entry.end
        self._index_end += len(commit)
        self._is_torn = False

    def flush(self) -> None:
        """Bring everything to the disk, so that it outlives a loss of power: first the traces, then the index.

        Raises:
            ConfigError: The writer is closed.
            OSError: The file system refuses. The writer is closed then: a second attempt could succeed without what
                the first one lost.
        """
        self._check_open()
        if self._flushed_end == self._index_end:
            return
        try:
            os.fsync(self._data.fileno())
            os.fsync(self._index.fileno())
            if not self._is_folder_flushed:
                flush_folder(self.path)
                flush_folder(self.path.absolute().parent)
                self._is_folder_flushed = True
        except OSError:
            self._files.close()
            raise
        # Only now: a mark must be true whenever it is found. It need not be on the disk itself.
        _write_at(self._flushed, encode_mark(self._index_end), next_mark_at(self._flushed))
        self._flushed_end = self._index_end

    def close(self) -> None:
        """Flush, and let the next writer in; closing twice does nothing."""
        if self._index.closed:
            return
        try:
            # A copy in a forked process has nothing to flush.
            if self._process_id == os.getpid():
                self.flush()
        finally:
            self._files.close()

    def _check_open(self) -> None:
        if self._index.closed:
            raise ConfigError(f"{self.path} is closed; open a new writer to append to it")
        if self._process_id != os.getpid():
            raise ConfigError(
                f"the writer of {self.path} belongs to process {self._process_id}, not to its fork {os.getpid()}; append"
                " in one process"
            )

    def _repair_if_torn(self) -> None:
        """Learn from the files what a call that did not come to its end has left."""
        is_mine = self._process_id == os.getpid()
        if self._is_torn and is_mine and not self._index.closed:
            self._keys, self._index_end, self._data_end = self._repair()
            self._is_torn = False

    def _repair(self) -> tuple[set[str], int, int]:
        """Cut off what a killed writer left behind its last whole entry, and what a loss of power took.

        Returns:
            The keys, the end of the index, and the end of the data.
        """
        index = (self.path / INDEX_NAME).read_bytes()
        where = str(self.path / INDEX_NAME)
        data_bytes = os.fstat(self._data.fileno()).st_size
        if len(index) < HEAD_BYTES:
            if data_bytes or self._flushed_end or not encode_head().startswith(index):
                raise TraceFormatError(
                    f"{where} has {len(index)} bytes, fewer than its head of {HEAD_BYTES}, beside {data_bytes} bytes of"
                    " traces; the file is damaged"
                )
            _write_at(self._index, encode_head(), 0)
            # Before any trace, so that traces without a head are a sign of damage.
            os.fsync(self._index.fileno())
            return set(), HEAD_BYTES, 0
        check_head(index, where)
        entries: dict[str, IndexEntry] = {}
        index_end, data_end = decode_entries(
            index[HEAD_BYTES:],
            HEAD_BYTES,
            known=entries,
            next_offset=0,
            flushed_end=self._flushed_end,
            where=where,
        )
        lost = self._lost_entries(entries, data_bytes)
        for entry in lost:
            del entries[entry.key]
        if lost:
            data_end = lost[0].offset
            index_end -= sum(entry.entry_nbytes for entry in lost)
        for file, end in ((self._index, index_end), (self._data, data_end)):
            self._num_cut_bytes += max(0, os.fstat(file.fileno()).st_size - end)
            os.ftruncate(file.fileno(), end)
        return set(entries), index_end, data_end

    def _lost_entries(self, entries: Mapping[str, IndexEntry], data_bytes: int) -> list[IndexEntry]:
        """Return the last entries whose traces were never flushed and are not there."""
        lost: list[IndexEntry] = []
        at = HEAD_BYTES
        for entry in entries.values():
            where = f"{self.path / DATA_NAME}: trace {entry.key!r} at byte {entry.offset}"
            if at < self._flushed_end:
                if entry.end > data_bytes:
                    raise TraceFormatError(
                        f"{where} was on the disk up to byte {entry.end}, but the file has {data_bytes}; it was truncated:"
                        " copy what can be read to another store"
                    )
            elif entry.end > data_bytes or not self._is_whole(entry):
                lost.append(entry)
            elif lost:
                raise TraceFormatError(
                    f"{where} is whole, but trace {lost[0].key!r} before it, at byte {lost[0].offset}, is not; the file is"
                    " damaged: copy what can be read to another store"
                )
            at += entry.entry_nbytes
        return lost

    def _is_whole(self, entry: IndexEntry) -> bool:
        """Tell whether the bytes of a trace have their checksum."""
        crc32 = 0
        end = entry.offset + entry.nbytes
        for at in range(entry.offset, end, _PIECE_BYTES):
            piece = os.pread(self._data.fileno(), min(_PIECE_BYTES, end - at), at)
            crc32 = zlib.crc32(piece, crc32)
        return crc32 == entry.crc32


def _make_folder(path: Path) -> None:
    """Make the folder of a store, or accept one that is a store or empty."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; a trace store is a folder: choose another path")
    path.mkdir(parents=True, exist_ok=True)
    if not (path / INDEX_NAME).exists() and any(path.iterdir()):
        raise ConfigError(
            f"{path} holds other files and is not a trace store; choose a folder that does not exist, or is empty"
        )


def _check_key(key: object) -> None:
    """Check that a key can be written."""
    if not isinstance(key, str):
        raise ConfigError(f"key = {key!r} is a {type(key).__name__}; a key is a string")
    try:
        num_bytes = len(key.encode("utf-8"))
    except UnicodeEncodeError as err:
        raise ConfigError(f"key {key[:40]!r} cannot be written as UTF-8: {err.reason}") from err
    if num_bytes > MAX_KEY_BYTES:
        raise ConfigError(
            f"key {key[:40]!r}... has {num_bytes} bytes; accepted are at most {MAX_KEY_BYTES}"
        )


def _open_for_update(path: Path) -> FileIO:
    """Open a file for reading and writing, making it if it is not there, without truncating it."""
    # Without a buffer: after a failed write nothing may be waiting to be written later.
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")


def _lock(index: FileIO, path: Path) -> None:
    """Become the writer of a store."""
    try:
        fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise ConfigError(
            f"{path} is open in another writer; a store has one at a time: wait for it, or write elsewhere"
        ) from err


def _write_at(file: FileIO, data: bytes, offset: int) -> None:
    """Write all of `data` at a place, in one call where the system takes it all."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file.fileno(), rest, offset)
        rest, offset = rest[written:], offset + written
