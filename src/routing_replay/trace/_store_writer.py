"""The one process that appends to a trace store."""

import fcntl
import os
import zlib
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from routing_replay.errors import ConfigError, TraceFormatError
from routing_replay.trace._codecs import codec_by_name
from routing_replay.trace._file import flush_folder
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


class TraceStoreWriter:
    """Appends traces to a store; one writer at a time.

    A trace is in the store once its index entry is written, after its bytes. A writer that is killed at any byte
    leaves a store of whole traces; the next writer removes what was cut off.

    Args:
        path: The store's folder, customarily `*.rrs`; made if it does not exist.
        codec: How traces are encoded, as for `encode_trace`.

    Raises:
        ConfigError: Another writer has the store open, or the path holds something else than a store.
        TraceFormatError: The codec is not known, or the index is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, codec: str = "raw") -> None:
        self.path = Path(path)
        self._codec = codec_by_name(codec).name
        _make_folder(self.path)
        self._index = _open_for_update(self.path / INDEX_NAME)
        try:
            _lock(self._index, self.path)
            self._data = _open_for_update(self.path / DATA_NAME)
            try:
                self._keys, self._index_end, self._data_end = self._repair()
            except BaseException:
                self._data.close()
                raise
        except BaseException:
            self._index.close()
            raise
        self._is_torn = False
        self._is_folder_flushed = False

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
            OSError: The file system refuses.
        """
        self._check_open()
        os.fsync(self._data.fileno())
        os.fsync(self._index.fileno())
        if not self._is_folder_flushed:
            flush_folder(self.path)
            flush_folder(self.path.absolute().parent)
            self._is_folder_flushed = True

    def close(self) -> None:
        """Flush, and let the next writer in; closing twice does nothing."""
        if self._index.closed:
            return
        try:
            self.flush()
        finally:
            self._data.close()
            self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._index.closed:
            raise ConfigError(f"{self.path} is closed; open a new writer to append to it")

    def _repair_if_torn(self) -> None:
        """Learn from the files what a call that did not come to its end has left."""
        if self._is_torn and not self._index.closed:
            self._keys, self._index_end, self._data_end = self._repair()
            self._is_torn = False

    def _repair(self) -> tuple[set[str], int, int]:
        """Cut off what a killed writer left behind its last whole entry.

        Returns:
            The keys, the end of the index, and the end of the data.
        """
        index = (self.path / INDEX_NAME).read_bytes()
        where = str(self.path / INDEX_NAME)
        data_bytes = os.fstat(self._data.fileno()).st_size
        if len(index) < HEAD_BYTES:
            if data_bytes or not encode_head().startswith(index):
                raise TraceFormatError(
                    f"{where} has {len(index)} bytes, fewer than its head of {HEAD_BYTES}, beside {data_bytes} bytes of"
                    " traces; the file is damaged"
                )
            _write_at(self._index, encode_head(), 0)
            return set(), HEAD_BYTES, 0
        check_head(index, where)
        entries: dict[str, IndexEntry] = {}
        index_end, data_end = decode_entries(
            index, HEAD_BYTES, known=entries, next_offset=0, where=where
        )
        if data_bytes < data_end:
            raise TraceFormatError(
                f"{self.path / DATA_NAME} has {data_bytes} bytes, but the index names traces up to byte {data_end}; "
                "the file is truncated: copy what can be read to another store"
            )
        os.ftruncate(self._index.fileno(), index_end)
        os.ftruncate(self._data.fileno(), data_end)
        return set(entries), index_end, data_end


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
