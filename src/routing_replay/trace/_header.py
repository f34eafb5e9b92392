"""The prefix and the JSON header of a trace file."""

import json
import struct
import zlib
from dataclasses import dataclass

from routing_replay.errors import TraceFormatError
from routing_replay.trace._checks import check_layout
from routing_replay.trace._json import (
    JsonObject,
    bool_field,
    check_keys,
    int_field,
    ints_field,
    objects_field,
    pairs_field,
    parse_object,
    str_field,
)
from routing_replay.trace._runs import MAX_INT, WeightsVersion, check_runs

# The first byte is not ASCII and both line ends follow: a text-mode transfer breaks the magic.
MAGIC = b"\x89RRT\r\n\x1a\n"
FORMAT_VERSION = 1
MAX_HEADER_BYTES = 1 << 20
ALIGNMENT = 8

# Magic, then format version, header length and header CRC-32, little-endian.
_PREFIX = struct.Struct("<8sIII")
_MAX_UINT32 = (1 << 32) - 1
_SECTION_KEYS = frozenset({"crc32", "dtype", "name", "nbytes", "offset", "shape"})
_HEADER_KEYS = frozenset(
    {
        "codec",
        "layer_ids",
        "num_experts",
        "num_layers",
        "num_rows",
        "ordered",
        "sections",
        "start",
        "top_k",
        "weights_version",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Where one stored array lies in the payload.

    Attributes:
        name: `ids`, `valid`, `token_digest` or `weights`.
        dtype: Name of the dtype of the decoded array.
        shape: Shape of the decoded array.
        offset: First byte, counted from the start of the payload.
        nbytes: Stored bytes.
        crc32: CRC-32 of the stored bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Everything in a trace file that is not an array; fields as in `RoutingTrace`."""

    codec: str
    layer_ids: tuple[int, ...]
    num_experts: int
    num_layers: int
    num_rows: int
    ordered: bool
    sections: tuple[Section, ...]
    start: int
    top_k: int
    weights_version: WeightsVersion


def padding(num_bytes: int) -> int:
    """Return the bytes from `num_bytes` to the next multiple of the alignment."""
    return -num_bytes % ALIGNMENT


def encode_header(header: Header) -> bytes:
    """Return prefix, header and the padding up to the payload.

    Raises:
        TraceFormatError: The header is longer than the format allows.
    """
    fields = {key: getattr(header, key) for key in _HEADER_KEYS}
    fields["sections"] = [
        {key: getattr(section, key) for key in _SECTION_KEYS} for section in header.sections
    ]
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")
    if len(text) > MAX_HEADER_BYTES:
        raise TraceFormatError(
            f"header of {len(text)} bytes exceeds {MAX_HEADER_BYTES}; the trace has"
            f" {len(header.weights_version)} weights_version runs, slice it into shorter traces"
        )
    prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(text), zlib.crc32(text))
    return prefix + text + bytes(padding(len(prefix) + len(text)))


def decode_header(data: memoryview) -> tuple[Header, int]:
    """Read prefix and header.

    Args:
        data: The whole file, as bytes.

    Returns:
        The header, sound in itself, and the offset of the payload in `data`.

    Raises:
        TraceFormatError: Anything that the format does not allow.
    """
    if len(data) < _PREFIX.size:
        raise TraceFormatError(
            f"trace has {len(data)} bytes, fewer than the {_PREFIX.size} of its prefix; the file is"
            f" truncated or not a trace"
        )
    magic, version, length, crc32 = _PREFIX.unpack(data[: _PREFIX.size])
    if magic != MAGIC:
        raise TraceFormatError(f"magic = {magic!r} is not that of a trace; it must be {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise TraceFormatError(
            f"format version = {version} is not known; this library reads {FORMAT_VERSION}; a newer"
            f" routing-replay may read it"
        )
    payload_at = _PREFIX.size + length + padding(_PREFIX.size + length)
    if length > MAX_HEADER_BYTES or payload_at > len(data):
        raise TraceFormatError(
            f"header length = {length} is not accepted; a header has at most {MAX_HEADER_BYTES}"
            f" bytes and lies inside the file, which has {len(data)} bytes"
        )
    text = bytes(data[_PREFIX.size : _PREFIX.size + length])
    if zlib.crc32(text) != crc32:
        raise TraceFormatError(
            f"header CRC-32 = {crc32:#010x} but the header has {zlib.crc32(text):#010x}; the file is"
            f" damaged, fetch or capture it again"
        )
    if any(data[_PREFIX.size + length : payload_at]):
        raise TraceFormatError("padding after the header is not zero; the file is damaged")
    return _header_from_json(parse_object(text, where="header")), payload_at


def _header_from_json(fields: JsonObject) -> Header:
    """Build a header from parsed JSON and check what it says about itself."""
    where = "header"
    check_keys(fields, _HEADER_KEYS, where=where)
    header = Header(
        codec=str_field(fields, "codec", where=where),
        layer_ids=ints_field(fields, "layer_ids", where=where, high=MAX_INT),
        num_experts=int_field(fields, "num_experts", where=where, low=1, high=MAX_INT),
        num_layers=int_field(fields, "num_layers", where=where, low=1, high=MAX_INT),
        num_rows=int_field(fields, "num_rows", where=where, low=0, high=MAX_INT),
        ordered=bool_field(fields, "ordered", where=where),
        sections=tuple(
            _section_from_json(section, where=f"header.sections[{idx}]")
            for idx, section in enumerate(objects_field(fields, "sections", where=where))
        ),
        start=int_field(fields, "start", where=where, low=0, high=MAX_INT),
        top_k=int_field(fields, "top_k", where=where, low=1, high=MAX_INT),
        weights_version=pairs_field(fields, "weights_version", where=where, high=MAX_INT),
    )
    check_layout(
        layer_ids=header.layer_ids,
        num_layers=header.num_layers,
        num_experts=header.num_experts,
        top_k=header.top_k,
        start=header.start,
    )
    check_runs(header.weights_version, start=header.start, num_rows=header.num_rows)
    return header


def _section_from_json(fields: JsonObject, *, where: str) -> Section:
    """Build a section from parsed JSON."""
    check_keys(fields, _SECTION_KEYS, where=where)
    return Section(
        name=str_field(fields, "name", where=where),
        dtype=str_field(fields, "dtype", where=where),
        shape=ints_field(fields, "shape", where=where, high=MAX_INT),
        offset=int_field(fields, "offset", where=where, low=0, high=MAX_INT),
        nbytes=int_field(fields, "nbytes", where=where, low=0, high=MAX_INT),
        crc32=int_field(fields, "crc32", where=where, low=0, high=_MAX_UINT32),
    )
