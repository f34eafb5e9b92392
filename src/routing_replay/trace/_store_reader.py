"""Random access to a trace store, also while it grows."""

import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from routing_replay.errors import ConfigError, TraceFormatError
from routing_replay.trace._closing import Closing
from routing_replay.trace._store_flushed import FLUSHED_NAME, read_flushed
from routing_replay.trace._store_index import (
    DATA_NAME,
    HEAD_BYTES,
    INDEX_NAME,
    IndexEntry,
    check_head,
    decode_entries,
    encode_head,
)
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace._wire import MAX_DECODED_BYTES, decode_trace

__all__ = ["TraceStoreReader"]


class TraceStoreReader(Closing):
    """Reads a store, also while another process appends to it.

    Opening reads the index alone; a trace is decoded, from mapped memory, when it is asked for. A reader knows the
    traces that were there when it was opened; `refresh` takes in later ones.

    Args:
        path: The store's folder.
        max_decoded_bytes: As for `decode_trace`.

    Raises:
        ConfigError: There is no store at the path.
        TraceFormatError: The index is damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_decoded_bytes: int = MAX_DECODED_BYTES
    ) -> None:
        self.path = Path(path)
        self._max_decoded_bytes = max_decoded_bytes
        self._entries: dict[str, IndexEntry] = {}
        self._index_end = 0
        self._data_end = 0
        self._num_torn_bytes = 0
        self._data: BinaryIO | None = None
        self._map: mmap.mmap | None = None
        try:
            self._index: BinaryIO = (self.path / INDEX_NAME).open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as err:
            raise ConfigError(
                f"{self.path} is not a trace store; pass a folder with {INDEX_NAME} and {DATA_NAME}"
            ) from err
        try:
            self.refresh()
        except BaseException:
            self._index.close()
            raise

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> RoutingTrace:
        data = self.read_bytes(key)
        try:
            return decode_trace(data, max_decoded_bytes=self._max_decoded_bytes)
        except TraceFormatError as err:
            raise TraceFormatError(f"{self.path / DATA_NAME}: trace {key!r}: {err}") from err

    @property
    def num_torn_bytes(self) -> int:
        """Bytes behind the last whole entry of the index, at the last refresh: of one that is being written, or was cut off."""
        return self._num_torn_bytes

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
            KeyError: The reader knows no such key.
            ConfigError: The reader is closed.
            TraceFormatError: The data file is truncated or damaged.
        """
        entry = self._entries[key]
        self._check_open()
        mapped = self._mapped(entry)
        data = mapped[entry.offset : entry.offset + entry.nbytes]
        where = f"{self.path / DATA_NAME}: trace {key!r} at byte {entry.offset}"
        if zlib.crc32(data) != entry.crc32:
            raise TraceFormatError(
                f"{where} has CRC-32 {zlib.crc32(data):#010x} but the index says {entry.crc32:#010x}; the file is damaged"
            )
        if any(mapped[entry.offset + entry.nbytes : entry.end]):
            raise TraceFormatError(
                f"{where}: the padding behind it is not zero; the file is damaged"
            )
        return data

    def refresh(self) -> int:
        """Take in what was appended since.

        Returns:
            How many traces are new.

        Raises:
            ConfigError: The reader is closed.
            TraceFormatError: The index is damaged, or shorter than it was.
        """
        self._check_open()
        where = str(self.path / INDEX_NAME)
        # Before the index, which is at least as long as any mark says.
        flushed_end = read_flushed(self.path / FLUSHED_NAME)
        num_bytes = os.fstat(self._index.fileno()).st_size
        if num_bytes < self._index_end:
            raise TraceFormatError(
                f"{where} has {num_bytes} bytes but had {self._index_end}; a store only grows: open it again"
            )
        if self._index_end == 0 and not self._has_head(where):
            if flushed_end:
                raise TraceFormatError(
                    f"{where} has {num_bytes} bytes, but {flushed_end} were on the disk; the file was truncated, restore"
                    " a copy"
                )
            return 0
        # One read: between two, a writer may replace an entry that was cut off by another one.
        added = os.pread(self._index.fileno(), max(0, num_bytes - self._index_end), self._index_end)
        num_known = len(self._entries)
        end = self._index_end + len(added)
        self._index_end, self._data_end = decode_entries(
            added,
            self._index_end,
            known=self._entries,
            next_offset=self._data_end,
            flushed_end=flushed_end,
            where=where,
        )
        self._num_torn_bytes = end - self._index_end
        return len(self._entries) - num_known

    def close(self) -> None:
        """Close the files; traces that were read stay valid, and closing twice does nothing."""
        self._index.close()
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._data is not None:
            self._data.close()
            self._data = None

    def _check_open(self) -> None:
        if self._index.closed:
            raise ConfigError(f"{self.path} is closed; open a new reader")

    def _has_head(self, where: str) -> bool:
        """Check the head; a part of it is that of a writer who has only just begun."""
        head = os.pread(self._index.fileno(), HEAD_BYTES, 0)
        if len(head) < HEAD_BYTES and encode_head().startswith(head):
            return False
        check_head(head.ljust(HEAD_BYTES, b"\0"), where)
        self._index_end = HEAD_BYTES
        return True

    def _mapped(self, entry: IndexEntry) -> mmap.mmap:
        """Return the data, mapped at least up to the end of a trace."""
        name = self.path / DATA_NAME
        if self._data is None:
            try:
                self._data = name.open("rb", buffering=0)
            except FileNotFoundError as err:
                raise TraceFormatError(
                    f"{name} does not exist, but the index names trace {entry.key!r}; the store is damaged"
                ) from err
        # Asked each time: a mapped page behind the end of a file that was cut ends the process.
        num_bytes = os.fstat(self._data.fileno()).st_size
        if num_bytes < entry.end:
            raise TraceFormatError(
                f"{name} has {num_bytes} bytes, but trace {entry.key!r} ends at byte {entry.end}; the file is truncated"
            )
        if self._map is None or len(self._map) < entry.end:
            if self._map is not None:
                self._map.close()
            self._map = mmap.mmap(self._data.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map
