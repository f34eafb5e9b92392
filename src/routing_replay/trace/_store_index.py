"""The index of a trace store: which trace lies where in the data file, one checksummed entry after the other."""

import struct
import zlib
from dataclasses import dataclass

from routing_replay.errors import TraceFormatError

INDEX_NAME, DATA_NAME = "index", "data"
ALIGNMENT = 8
MAX_KEY_BYTES = 4096

_MAGIC = b"\x89RRS\r\n\x1a\n"
_VERSION = 1
_HEAD = struct.Struct("<8sII")  # magic, version, CRC-32 of the twelve bytes before
_PREFIX = struct.Struct("<II")  # length of the whole entry, CRC-32 of its body
_BODY = struct.Struct("<QQII")  # offset, bytes and CRC-32 of the trace, bytes of the key
HEAD_BYTES = _HEAD.size


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """Where a trace lies in the data file.

    Attributes:
        key: Its name.
        offset: Its first byte, a multiple of 8.
        nbytes: Its bytes.
        crc32: Their CRC-32.
    """

    key: str
    offset: int
    nbytes: int
    crc32: int

    @property
    def end(self) -> int:
        """Where the next trace begins."""
        return self.offset + self.nbytes + padding(self.nbytes)


def padding(num_bytes: int) -> int:
    """Return the bytes from `num_bytes` to the next multiple of the alignment."""
    return -num_bytes % ALIGNMENT


def encode_head() -> bytes:
    """Return the first bytes of an index."""
    start = _MAGIC + struct.pack("<I", _VERSION)
    return start + struct.pack("<I", zlib.crc32(start))


def check_head(data: bytes, where: str) -> None:
    """Check the first bytes of an index.

    Raises:
        TraceFormatError: They are those of something else, of another version, or damaged.
    """
    magic, version, crc32 = _HEAD.unpack(data[: _HEAD.size])
    if magic != _MAGIC:
        raise TraceFormatError(
            f"{where}: magic = {magic!r} is not that of a trace store; it must be {_MAGIC!r}"
        )
    if crc32 != zlib.crc32(data[:12]):
        raise TraceFormatError(
            f"{where}: head has CRC-32 {zlib.crc32(data[:12]):#010x} but says {crc32:#010x}; the file is damaged"
        )
    if version != _VERSION:
        raise TraceFormatError(
            f"{where}: store version = {version} is not known; this library reads {_VERSION}; a newer routing-replay "
            "may read it"
        )


def encode_entry(entry: IndexEntry) -> bytes:
    """Return the bytes that commit a trace."""
    key = entry.key.encode("utf-8")
    body = _BODY.pack(entry.offset, entry.nbytes, entry.crc32, len(key)) + key
    body += bytes(padding(len(body)))
    return _PREFIX.pack(_PREFIX.size + len(body), zlib.crc32(body)) + body


def decode_entries(
    data: bytes, start: int, *, next_offset: int, where: str
) -> tuple[list[IndexEntry], int]:
    """Read the whole entries of an index; a last one that is cut off is not there yet.

    Args:
        data: The index.
        start: Where the first entry to read begins.
        next_offset: Where its trace must begin.
        where: The file, for messages.

    Returns:
        The entries, and where the next one will begin.

    Raises:
        TraceFormatError: An entry that is there whole is damaged.
    """
    entries: list[IndexEntry] = []
    at = start
    while at + _PREFIX.size <= len(data):
        length, crc32 = _PREFIX.unpack_from(data, at)
        if length % ALIGNMENT or not _smallest() <= length <= _largest():
            raise TraceFormatError(
                f"{where}: entry at byte {at} has length {length}; it must be a multiple of 8 in [{_smallest()}, "
                f"{_largest()}]; the file is damaged"
            )
        if at + length > len(data):
            break
        body = data[at + _PREFIX.size : at + length]
        if zlib.crc32(body) != crc32:
            raise TraceFormatError(
                f"{where}: entry at byte {at} has CRC-32 {zlib.crc32(body):#010x} but says {crc32:#010x}; the file is "
                "damaged"
            )
        entry = _decode_body(body, at, where)
        if entry.offset != next_offset:
            raise TraceFormatError(
                f"{where}: trace {entry.key!r} is said to begin at byte {entry.offset}; it must be {next_offset}, the "
                "end of the one before"
            )
        entries.append(entry)
        next_offset = entry.end
        at += length
    return entries, at


def _smallest() -> int:
    return _PREFIX.size + _BODY.size


def _largest() -> int:
    return _smallest() + MAX_KEY_BYTES


def _decode_body(body: bytes, at: int, where: str) -> IndexEntry:
    offset, nbytes, crc32, key_bytes = _BODY.unpack_from(body)
    end = _BODY.size + key_bytes
    if end + padding(end) != len(body) or any(body[end:]):
        raise TraceFormatError(
            f"{where}: entry at byte {at} says that its key has {key_bytes} bytes, but has {len(body)} in all; the "
            "file is damaged"
        )
    try:
        key = body[_BODY.size : end].decode("utf-8")
    except UnicodeDecodeError as err:
        raise TraceFormatError(
            f"{where}: the key of the entry at byte {at} is not UTF-8 ({err})"
        ) from err
    return IndexEntry(key, offset, nbytes, crc32)
