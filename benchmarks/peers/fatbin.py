"""Leave out of a CUDA library the code that one generation of GPUs never runs, so that it travels in less.

The layout of `.nv_fatbin` is read as the CUDA tools show it (`cuobjdump --list-elf`, `--list-ptx`): containers, one per
translation unit, each a row of entries with a kind (PTX or machine code) and an architecture. Offsets stay as they are;
what goes is overwritten with zeros, which the archive's compression then removes.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["FatbinError", "keep_architecture"]

_CONTAINER_MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, header bytes, bytes of all entries
_ENTRY = struct.Struct("<HHIQ")  # kind, version, header bytes, payload bytes
_ARCHITECTURE_OFFSET = 28
_SECTION = struct.Struct("<IIQQQQIIQQ")
_PTX, _MACHINE_CODE = 1, 2


class FatbinError(ValueError):
    """A library is not laid out as expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    kind: int
    architecture: int
    begin: int
    end: int


def keep_architecture(library: bytearray, architecture: int) -> int:
    """Blank the GPU code of a library that a GPU of one architecture does not run, in place.

    A container with machine code for the architecture keeps that alone. One without keeps its PTX, from which the
    driver would build; what runs on such a GPU is therefore the same as before.

    Args:
        library: A 64-bit little-endian ELF file.
        architecture: Compute capability times ten, such as 90.

    Returns:
        How many bytes were blanked; 0 where there is no GPU code.

    Raises:
        FatbinError: The file is no such ELF file, or its GPU code is laid out in another way.
    """
    blanked = 0
    section = _fatbin_section(library)
    if section is None:
        return 0
    for entries in _containers(library, *section):
        code = [e for e in entries if (e.kind, e.architecture) == (_MACHINE_CODE, architecture)]
        kept = code or [e for e in entries if e.kind == _PTX and e.architecture <= architecture]
        for entry in entries:
            if entry not in kept:
                library[entry.begin : entry.end] = bytes(entry.end - entry.begin)
                blanked += entry.end - entry.begin
    return blanked


def _fatbin_section(library: bytearray) -> tuple[int, int] | None:
    """Return where `.nv_fatbin` begins and ends in the file."""
    if library[:6] != b"\x7fELF\x02\x01":
        raise FatbinError(
            f"file starts with {bytes(library[:6])!r}; accepted is a 64-bit little-endian ELF file"
        )
    table = struct.unpack_from("<Q", library, 0x28)[0]
    size, count, names_index = struct.unpack_from("<HHH", library, 0x3A)
    sections = [_SECTION.unpack_from(library, table + i * size) for i in range(count)]
    names = sections[names_index][4]
    for section in sections:
        begin = names + section[0]
        if library[begin : library.index(0, begin)] == b".nv_fatbin":
            return section[4], section[4] + section[5]
    return None


def _containers(library: bytearray, begin: int, end: int) -> Iterator[list[_Entry]]:
    """Go through the containers of a section; they start at multiples of 8 bytes, with zeros between them."""
    while begin + _CONTAINER.size <= end:
        magic, _, header, size = _CONTAINER.unpack_from(library, begin)
        if magic == 0:
            begin += 8
            continue
        if magic != _CONTAINER_MAGIC or begin + header + size > end:
            raise FatbinError(
                f"no container of GPU code at byte {begin} (found {magic:#x}, {size} bytes)"
            )
        yield list(_entries(library, begin + header, begin + header + size))
        begin += header + size
        begin += -begin % 8


def _entries(library: bytearray, begin: int, end: int) -> Iterator[_Entry]:
    while begin < end:
        kind, _, header, size = _ENTRY.unpack_from(library, begin)
        if kind not in (_PTX, _MACHINE_CODE) or begin + header + size > end:
            raise FatbinError(f"no entry of GPU code at byte {begin} (kind {kind}, {size} bytes)")
        architecture = struct.unpack_from("<I", library, begin + _ARCHITECTURE_OFFSET)[0]
        yield _Entry(
            kind=kind,
            architecture=architecture,
            begin=begin + header,
            end=begin + header + size,
        )
        begin += header + size
