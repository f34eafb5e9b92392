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
# Offset and bytes of the trace; CRC-32 of the trace, bytes of the key, CRC-32 of the rest of the
# entry, CRC-32 of the 28 bytes before. The last one is why a damaged length cannot pass for an entry
# that a kill cut off: entries behind it would be lost without a word.
_PREFIX = struct.Struct("<QQIIII")
_CHECKED = _PREFIX.size - 4
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
    rest = key + bytes(padding(len(key)))
    prefix = _PREFIX.pack(entry.offset, entry.nbytes, entry.crc32, len(key), zlib.crc32(rest), 0)[
        :_CHECKED
    ]
    return prefix + struct.pack("<I", zlib.crc32(prefix)) + rest


def decode_entries(
    data: bytes, start: int, *, known: dict[str, IndexEntry], next_offset: int, where: str
) -> tuple[int, int]:
    """Read the whole entries of an index; a last one that is cut off is not there yet.

    Args:
        data: The index, or its part from a known place on.
        start: Where in `data` the first entry to read begins.
        known: The entries before; those that are read are added, all or none.
        next_offset: Where the first one's trace must begin.
        where: The file, for messages.

    Returns:
        Where in `data` the next entry will begin, and where its trace will.

    Raises:
        TraceFormatError: What is there of an entry is not what a writer writes.
    """
    entries: dict[str, IndexEntry] = {}
    at = start
    while at + _PREFIX.size <= len(data):
        entry, length = _decode_entry(data, at, where)
        if entry is None:
            break
        if entry.offset != next_offset:
            raise TraceFormatError(
                f"{where}: trace {entry.key!r} is said to begin at byte {entry.offset}; it must be {next_offset}, the "
                "end of the one before; the file is damaged"
            )
        if entry.key in known or entry.key in entries:
            raise TraceFormatError(
                f"{where}: key {entry.key!r} is there twice; keys are unique: the file is damaged"
            )
        entries[entry.key] = entry
        next_offset = entry.end
        at += length
    known.update(entries)
    return at, next_offset


def _decode_entry(data: bytes, at: int, where: str) -> tuple[IndexEntry | None, int]:
    """Return the entry at a place, None where its end is missing, and its length."""
    offset, nbytes, crc32, key_bytes, rest_crc32, own_crc32 = _PREFIX.unpack_from(data, at)
    _check_crc32(data[at : at + _CHECKED], own_crc32, part="entry", at=at, where=where)
    if key_bytes > MAX_KEY_BYTES:
        raise TraceFormatError(
            f"{where}: entry at byte {at} has a key of {key_bytes} bytes; a key has at most {MAX_KEY_BYTES}"
        )
    first = at + _PREFIX.size
    end = first + key_bytes + padding(key_bytes)
    if end > len(data):
        return None, 0
    _check_crc32(data[first:end], rest_crc32, part="key of the entry", at=at, where=where)
    if any(data[first + key_bytes : end]):
        raise TraceFormatError(
            f"{where}: padding of the entry at byte {at} is not zero; the file is damaged"
        )
    try:
        key = data[first : first + key_bytes].decode("utf-8")
    except UnicodeDecodeError as err:
        raise TraceFormatError(
            f"{where}: the key of the entry at byte {at} is not UTF-8 ({err})"
        ) from err
    return IndexEntry(key, offset, nbytes, crc32), end - at


def _check_crc32(part_bytes: bytes, crc32: int, *, part: str, at: int, where: str) -> None:
    """Compare a checksum of the index with what it covers."""
    if zlib.crc32(part_bytes) != crc32:
        raise TraceFormatError(
            f"{where}: {part} at byte {at} has CRC-32 {zlib.crc32(part_bytes):#010x} but says {crc32:#010x}; the file is "
            "damaged"
        )
