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

    @property
    def entry_nbytes(self) -> int:
        """Bytes of the entry in the index."""
        num_key_bytes = len(self.key.encode("utf-8"))
        return _PREFIX.size + num_key_bytes + padding(num_key_bytes)


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
    data: bytes,
    begin: int,
    *,
    known: dict[str, IndexEntry],
    next_offset: int,
    flushed_end: int,
    where: str,
) -> tuple[int, int]:
    """Read the whole entries of an index, up to what a kill or a loss of power left at its end.

    Args:
        data: The index from an entry on.
        begin: Where in the index this is.
        known: The entries before; those that are read are added, all or none.
        next_offset: Where the first one's trace must begin.
        flushed_end: How much of the index was on the disk as it was written, so that nothing may be
            missing there.
        where: The file, for messages.

    Returns:
        Where in the index the next entry will begin, and where its trace will.

    Raises:
        TraceFormatError: What is there of an entry is not what a writer writes.
    """
    entries: dict[str, IndexEntry] = {}
    at = 0
    while at + _PREFIX.size <= len(data):
        if begin + at >= flushed_end and _is_lost(data, at):
            break
        name = f"{where}: entry at byte {begin + at} (key {_key_hint(data, at)})"
        entry, length = _decode_entry(data, at, name)
        if entry is None:
            break
        if entry.offset != next_offset:
            raise TraceFormatError(
                f"{name} says that its trace begins at byte {entry.offset}; it must be {next_offset}, the end of the one"
                " before; the file is damaged"
            )
        if entry.key in known or entry.key in entries:
            raise TraceFormatError(
                f"{name} has the key of one before; keys are unique: the file is damaged"
            )
        entries[entry.key] = entry
        next_offset = entry.end
        at += length
    if begin + at < flushed_end:
        raise TraceFormatError(
            f"{where} has {begin + len(data)} bytes, with whole entries up to byte {begin + at}, but {flushed_end} were on"
            " the disk; the file was truncated, restore a copy"
        )
    known.update(entries)
    return begin + at, next_offset


def _is_lost(data: bytes, at: int) -> bool:
    """Tell whether a loss of power can have left what is at a place: from there on, no entry is whole."""
    return not any(_is_whole(data, start) for start in range(at, len(data), ALIGNMENT))


def _is_whole(data: bytes, at: int) -> bool:
    """Tell whether an entry is at a place, by its checksums."""
    if at + _PREFIX.size > len(data):
        return False
    _, _, _, key_bytes, rest_crc32, own_crc32 = _PREFIX.unpack_from(data, at)
    if zlib.crc32(data[at : at + _CHECKED]) != own_crc32:
        return False
    first = at + _PREFIX.size
    end = first + key_bytes + padding(key_bytes)
    return end <= len(data) and zlib.crc32(data[first:end]) == rest_crc32


def _key_hint(data: bytes, at: int) -> str:
    """Return what is there of an entry's key, damaged or not, for messages."""
    num_bytes = _PREFIX.unpack_from(data, at)[3]
    first = at + _PREFIX.size
    return repr(data[first : first + min(num_bytes, 80)].decode("utf-8", errors="replace"))


def _decode_entry(data: bytes, at: int, name: str) -> tuple[IndexEntry | None, int]:
    """Return the entry at a place, None where its end is missing, and its length."""
    offset, nbytes, crc32, key_bytes, rest_crc32, own_crc32 = _PREFIX.unpack_from(data, at)
    _check_crc32(data[at : at + _CHECKED], own_crc32, name=name)
    if key_bytes > MAX_KEY_BYTES:
        raise TraceFormatError(
            f"{name} has a key of {key_bytes} bytes; a key has at most {MAX_KEY_BYTES}"
        )
    first = at + _PREFIX.size
    end = first + key_bytes + padding(key_bytes)
    if end > len(data):
        return None, 0
    _check_crc32(data[first:end], rest_crc32, name=f"{name}: the key")
    if any(data[first + key_bytes : end]):
        raise TraceFormatError(f"{name} has padding that is not zero; the file is damaged")
    try:
        key = data[first : first + key_bytes].decode("utf-8")
    except UnicodeDecodeError as err:
        raise TraceFormatError(f"{name} has a key that is not UTF-8 ({err})") from err
    return IndexEntry(key, offset, nbytes, crc32), end - at


def _check_crc32(checked: bytes, crc32: int, *, name: str) -> None:
    """Compare a checksum of the index with what it covers."""
    if zlib.crc32(checked) != crc32:
        raise TraceFormatError(
            f"{name} has CRC-32 {zlib.crc32(checked):#010x} but says {crc32:#010x}; the file is damaged, restore a copy"
        )
