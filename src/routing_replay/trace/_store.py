"""The trace store: thousands of traces in one folder, appended safely, read at random, also while it grows."""

import fcntl
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from routing_replay.errors import ConfigError, TraceFormatError
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
from routing_replay.trace._wire import decode_trace, encode_trace

__all__ = ["TraceStoreReader", "TraceStoreWriter"]


class TraceStoreWriter:
    """Appends traces to a store; one writer at a time.

    A trace is in the store once its index entry is written, after its bytes. A writer that is killed at any byte
    leaves a store of whole traces; the next writer removes what was cut off.

    Args:
        path: The store's folder, customarily `*.rrs`; made if it does not exist.
        codec: How traces are encoded, as for `encode_trace`.

    Raises:
        ConfigError: Another writer has the store open, or the path is not a store's.
        TraceFormatError: The index is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, codec: str = "raw") -> None:
        self.path = Path(path)
        self._codec = codec
        self.path.mkdir(parents=True, exist_ok=True)
        self._index: BinaryIO = _open_for_update(self.path / INDEX_NAME)
        try:
            self._lock()
            self._data: BinaryIO = _open_for_update(self.path / DATA_NAME)
            self._keys, self._end = self._repair()
        except BaseException:
            self._index.close()
            raise

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def append(self, key: str, trace: RoutingTrace) -> None:
        """Add a trace.

        Args:
            key: A name that the store does not have, at most 4096 bytes in UTF-8.
            trace: A trace with valid content.

        Raises:
            ConfigError: The store has the key already, the key is too long, or the writer is closed.
            TraceFormatError: The content is not valid; nothing is written.
        """
        if self._index.closed:
            raise ConfigError(f"{self.path} is closed; open a new writer to append to it")
        if key in self._keys:
            raise ConfigError(
                f"{self.path} has a trace {key!r} already; a store only grows: choose another key"
            )
        num_key_bytes = len(key.encode("utf-8"))
        if num_key_bytes > MAX_KEY_BYTES:
            raise ConfigError(
                f"key {key[:40]!r}... has {num_key_bytes} bytes; accepted are at most {MAX_KEY_BYTES}"
            )
        data = encode_trace(trace, codec=self._codec)
        entry = IndexEntry(key, self._end, len(data), zlib.crc32(data))
        self._data.seek(self._end)
        self._data.write(data + bytes(padding(len(data))))
        self._data.flush()
        # Only now, and in one write: the entry is what makes the trace part of the store.
        self._index.write(encode_entry(entry))
        self._index.flush()
        self._keys.add(key)
        self._end = entry.end

    def flush(self) -> None:
        """Bring everything to the disk, so that it outlives a loss of power: first the traces, then the index."""
        for file in (self._data, self._index):
            file.flush()
            os.fsync(file.fileno())

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

    def _lock(self) -> None:
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise ConfigError(
                f"{self.path} is open in another writer; a store has one at a time: wait for it, or write elsewhere"
            ) from err

    def _repair(self) -> tuple[set[str], int]:
        """Cut off what a killed writer left behind its last whole entry; return keys and end of the data."""
        index = self._index.read()
        if len(index) < HEAD_BYTES:
            if self._data.seek(0, os.SEEK_END) or not encode_head().startswith(index):
                raise TraceFormatError(
                    f"{self.path / INDEX_NAME} has {len(index)} bytes, fewer than its head, beside traces; it is damaged"
                )
            self._index.seek(0)
            self._index.write(encode_head())
            self._index.flush()
            return set(), 0
        where = str(self.path / INDEX_NAME)
        check_head(index, where)
        entries, end = decode_entries(index, HEAD_BYTES, next_offset=0, where=where)
        data_end = entries[-1].end if entries else 0
        data_bytes = self._data.seek(0, os.SEEK_END)
        if data_bytes < data_end:
            raise TraceFormatError(
                f"{self.path / DATA_NAME} has {data_bytes} bytes, but the index names traces up to byte {data_end}; "
                "the file is truncated"
            )
        self._index.truncate(end)
        self._index.seek(end)
        self._data.truncate(data_end)
        return {entry.key for entry in entries}, data_end


class TraceStoreReader:
    """Reads a store, also while another process appends to it.

    Opening reads the index alone; a trace is decoded, from mapped memory, when it is asked for.

    Args:
        path: The store's folder.

    Raises:
        ConfigError: There is no store at the path.
        TraceFormatError: The index is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / INDEX_NAME).is_file():
            raise ConfigError(
                f"{self.path} is not a trace store; pass a folder with {INDEX_NAME} and {DATA_NAME}"
            )
        self._entries: dict[str, IndexEntry] = {}
        self._index_end = HEAD_BYTES
        self._data_end = 0
        self._map: mmap.mmap | None = None
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> RoutingTrace:
        return decode_trace(self.read_bytes(key))

    def keys(self) -> tuple[str, ...]:
        """Return the keys, in the order of appending."""
        return tuple(self._entries)

    def read_bytes(self, key: str) -> bytes:
        """Return a trace as it is stored, for sending it on.

        Args:
            key: A key of the store.

        Returns:
            The bytes of a trace file.

        Raises:
            KeyError: The store has no such key.
            TraceFormatError: The data file is truncated or damaged.
        """
        entry = self._entries[key]
        if self._map is None or len(self._map) < entry.offset + entry.nbytes:
            self._map = self._remap()
        end = entry.offset + entry.nbytes
        num_mapped = 0 if self._map is None else len(self._map)
        if self._map is None or num_mapped < end:
            raise TraceFormatError(
                f"{self.path / DATA_NAME} has {num_mapped} bytes, but trace {key!r} ends at byte {end}; the file is "
                "truncated"
            )
        data = self._map[entry.offset : end]
        if zlib.crc32(data) != entry.crc32:
            raise TraceFormatError(
                f"{self.path / DATA_NAME}: trace {key!r} at byte {entry.offset} has CRC-32 {zlib.crc32(data):#010x} but "
                f"the index says {entry.crc32:#010x}; the file is damaged"
            )
        return data

    def refresh(self) -> int:
        """Take in what was appended since.

        Returns:
            How many traces are new.

        Raises:
            TraceFormatError: The index is damaged, or shorter than it was.
        """
        where = str(self.path / INDEX_NAME)
        with (self.path / INDEX_NAME).open("rb") as file:
            if self._index_end == HEAD_BYTES:
                head = file.read(HEAD_BYTES)
                if len(head) < HEAD_BYTES and encode_head().startswith(head):
                    return 0  # a writer has only just begun
                check_head(head.ljust(HEAD_BYTES, b"\0"), where)
            elif file.seek(0, os.SEEK_END) < self._index_end:
                raise TraceFormatError(
                    f"{where} is shorter than it was; a store only grows: open it again"
                )
            file.seek(self._index_end)
            added = file.read()
        entries, num_read = decode_entries(added, 0, next_offset=self._data_end, where=where)
        for entry in entries:
            if entry.key in self._entries:
                raise TraceFormatError(
                    f"{where}: key {entry.key!r} is there twice; the file is damaged"
                )
            self._entries[entry.key] = entry
        self._index_end += num_read
        self._data_end = entries[-1].end if entries else self._data_end
        return len(entries)

    def close(self) -> None:
        """Unmap the data; traces that were read stay valid."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _remap(self) -> mmap.mmap | None:
        """Map the data file as long as it is now; an empty file cannot be mapped."""
        self.close()
        try:
            with (self.path / DATA_NAME).open("rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    return None
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None


def _open_for_update(path: Path) -> BinaryIO:
    """Open a file for reading and writing, making it if it is not there, without truncating it."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
