"""How much of a trace store is known to be on the disk: a file of marks, one for each flush.

A loss of power takes what was not flushed, in any part and order. What was flushed it cannot take:
if that is not whole, the store is damaged. The marks tell the one from the other.
"""

import os
import struct
import zlib
from io import FileIO
from pathlib import Path

FLUSHED_NAME = "flushed"

# Bytes of the index that are on the disk with the traces they name; CRC-32 of these 8 bytes; zeros.
_MARK = struct.Struct("<QII")
# Far more than a loss of power leaves unwritten at the end.
_MAX_READ_MARKS = 4096


def read_flushed(path: Path) -> int:
    """Return the bytes of the index that are on the disk, by the last whole mark; 0 without one."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size // _MARK.size * _MARK.size
            first = max(0, size - _MAX_READ_MARKS * _MARK.size)
            marks = os.pread(file.fileno(), size - first, first)
    except FileNotFoundError:
        return 0
    for at in range(len(marks) - _MARK.size, -1, -_MARK.size):
        num_bytes, crc32, _ = _MARK.unpack_from(marks, at)
        if zlib.crc32(marks[at : at + 8]) == crc32:
            return num_bytes
    return 0


def encode_mark(num_bytes: int) -> bytes:
    """Return the bytes that say how much of the index is on the disk."""
    return _MARK.pack(num_bytes, zlib.crc32(struct.pack("<Q", num_bytes)), 0)


def next_mark_at(file: FileIO) -> int:
    """Return where the next mark goes: over what a kill left of one."""
    return os.fstat(file.fileno()).st_size // _MARK.size * _MARK.size
