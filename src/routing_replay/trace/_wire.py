"""A trace as bytes: the format that `docs/trace_format.md` specifies."""

import zlib
from typing import cast

import numpy as np
import numpy.typing as npt

from routing_replay.errors import TraceFormatError
from routing_replay.trace._codecs import PayloadCodec, SectionSpec, chosen_codec, stored_codec
from routing_replay.trace._dtype import (
    DigestArray,
    IdArray,
    ValidArray,
    WeightArray,
    trace_id_dtype,
)
from routing_replay.trace._header import Header, Section, decode_header, encode_header, padding
from routing_replay.trace._json import describe
from routing_replay.trace._trace import RoutingTrace

MAX_DECODED_BYTES = 1 << 30
"""1 GiB: a million tokens of 94 layers, top 8 of 128 experts, take 0.75."""

_WEIGHT_DTYPES = ("float16", "float32")


def encode_trace(trace: RoutingTrace, *, codec: str = "raw") -> bytes:
    """Encode a trace, the same trace always to the same bytes (with zstd: by the same version of it).

    Args:
        trace: A trace with valid content.
        codec: `"raw"`; `"packed"`, which stores a row's experts as a set in about log2 C(E, K) bits: ids then come
            back ascending, and the trace says `ordered=False`; or either with `"+zstd"`, as in `"raw+zstd"`.

    Returns:
        The bytes of the file.

    Raises:
        TraceFormatError: The content is not valid (see `RoutingTrace.validate`), so that no reader
            would accept the bytes; or the codec cannot store so many experts.
        ConfigError: There is no such codec.
        IntegrationError: The codec needs the package zstandard, which is missing.
    """
    trace.validate()
    return _encode(trace, chosen_codec(codec))


def _encode(trace: RoutingTrace, codec: PayloadCodec) -> bytes:
    """Encode a trace that is valid."""
    if not codec.keeps_order:
        trace = trace.as_sets()
    arrays: list[npt.NDArray[np.generic]] = [trace.ids, trace.valid, trace.token_digest]
    if trace.weights is not None:
        arrays.append(trace.weights)
    specs = _section_specs(
        num_rows=trace.num_rows,
        row_shape=(trace.num_moe_layers, trace.top_k),
        num_experts=trace.num_experts,
        weights_dtype=None if trace.weights is None else trace.weights.dtype.name,
    )
    stored = [codec.encode(spec, array) for spec, array in zip(specs, arrays, strict=True)]
    sections = _place_sections(specs, stored)
    header = Header(
        codec=codec.name,
        layer_ids=trace.layer_ids,
        num_experts=trace.num_experts,
        num_layers=trace.num_layers,
        num_rows=trace.num_rows,
        ordered=trace.ordered,
        sections=sections,
        start=trace.start,
        top_k=trace.top_k,
        weights_version=trace.weights_version,
    )
    chunks = [encode_header(header)]
    for data in stored[:-1]:
        chunks += (data, bytes(padding(len(data))))
    chunks.append(stored[-1])
    return b"".join(chunks)


def decode_trace(
    data: bytes | bytearray | memoryview, *, max_decoded_bytes: int = MAX_DECODED_BYTES
) -> RoutingTrace:
    """Decode a trace and check everything about it that can be checked without its tokens.

    Runs no code from the input. Sizes are checked before anything is allocated for them.

    Args:
        data: The bytes of the file, all of them.
        max_decoded_bytes: Most bytes that the arrays of the trace may take; a compressed file can be much smaller than
            what it holds.

    Returns:
        The trace, which shares no memory with `data`.

    Raises:
        TraceFormatError: The bytes are truncated, altered, of an unknown version or codec, too large once decoded, or
            describe something that is not a valid trace.
        IntegrationError: The codec needs the package zstandard, which is missing.
    """
    view = memoryview(data).cast("B")
    header, payload_at = decode_header(view)
    payload = view[payload_at:]
    codec = stored_codec(header.codec)
    if header.ordered and not codec.keeps_order:
        raise TraceFormatError(
            f"header.ordered is true, but codec {codec.name} keeps no order; it must be false"
        )
    specs = _expected_specs(header)
    _check_sections(header.sections, specs, codec=codec, payload_nbytes=len(payload))
    _check_decoded_bytes(specs, max_decoded_bytes)
    arrays: list[npt.NDArray[np.generic]] = []
    end = 0
    for section, spec in zip(header.sections, specs, strict=True):
        if any(payload[end : section.offset]):
            raise TraceFormatError(
                f"padding before section {section.name} is not zero; the file is damaged"
            )
        end = section.offset + section.nbytes
        stored = payload[section.offset : end]
        _check_crc32(section, zlib.crc32(stored))
        arrays.append(codec.decode(spec, stored))
    trace = _assemble(header, arrays)
    trace.validate()
    return trace


def _section_specs(
    *, num_rows: int, row_shape: tuple[int, int], num_experts: int, weights_dtype: str | None
) -> tuple[SectionSpec, ...]:
    """Return the sections that a layout demands, in payload order."""
    of_rows, of_ids = (num_rows,), (num_rows, *row_shape)
    wanted: list[tuple[str, str, tuple[int, ...]]] = [
        ("ids", trace_id_dtype(num_experts).name, of_ids),
        ("valid", "bool", of_rows),
        ("token_digest", "uint32", of_rows),
    ]
    if weights_dtype is not None:
        wanted.append(("weights", weights_dtype, of_ids))
    return tuple(
        SectionSpec(
            name=name,
            dtype=np.dtype(dtype).newbyteorder("<"),
            shape=shape,
            num_experts=num_experts,
        )
        for name, dtype, shape in wanted
    )


def _place_sections(specs: tuple[SectionSpec, ...], stored: list[bytes]) -> tuple[Section, ...]:
    """Lay stored arrays out one after the other, each aligned."""
    sections: list[Section] = []
    offset = 0
    for spec, data in zip(specs, stored, strict=True):
        sections.append(
            Section(
                name=spec.name,
                dtype=spec.dtype.name,
                shape=spec.shape,
                offset=offset,
                nbytes=len(data),
                crc32=zlib.crc32(data),
            )
        )
        offset += len(data) + padding(len(data))
    return tuple(sections)


def _expected_specs(header: Header) -> tuple[SectionSpec, ...]:
    """Return the sections that the header's layout demands."""
    weights_dtype = None
    if len(header.sections) == 4:
        weights_dtype = header.sections[3].dtype
        if weights_dtype not in _WEIGHT_DTYPES:
            raise TraceFormatError(
                f"section weights has dtype {describe(weights_dtype)}; it must be one of {_WEIGHT_DTYPES}"
            )
    return _section_specs(
        num_rows=header.num_rows,
        row_shape=(len(header.layer_ids), header.top_k),
        num_experts=header.num_experts,
        weights_dtype=weights_dtype,
    )


def _check_sections(
    sections: tuple[Section, ...],
    specs: tuple[SectionSpec, ...],
    *,
    codec: PayloadCodec,
    payload_nbytes: int,
) -> None:
    """Check that sections are those demanded and tile the payload, all in Python integers."""
    names = [section.name for section in sections]
    if names != [spec.name for spec in specs]:
        raise TraceFormatError(
            f"sections are {describe(names)}; they must be ids, valid, token_digest and optionally"
            f" weights, in this order"
        )
    offset = end = 0
    for section, spec in zip(sections, specs, strict=True):
        if section.dtype != spec.dtype.name or section.shape != spec.shape:
            raise TraceFormatError(
                f"section {section.name} has dtype {describe(section.dtype)} and shape"
                f" {describe(section.shape)}; the header's layout demands {spec.dtype.name}"
                f" {list(spec.shape)}"
            )
        stored = codec.stored_nbytes(spec)
        if stored not in (None, section.nbytes):
            raise TraceFormatError(
                f"section {spec.name} has nbytes = {section.nbytes} but {spec.dtype.name}"
                f" {list(spec.shape)} takes {stored} bytes in codec {codec.name}"
            )
        if section.offset != offset:
            raise TraceFormatError(
                f"section {section.name} has offset {section.offset}; it must be {offset}, the next"
                f" multiple of 8 after the section before"
            )
        end = section.offset + section.nbytes
        offset = end + padding(end)
    if end != payload_nbytes:
        raise TraceFormatError(
            f"payload has {payload_nbytes} bytes but its sections end at {end}; the file is"
            f" truncated or has trailing bytes"
        )


def _check_decoded_bytes(specs: tuple[SectionSpec, ...], limit: int) -> None:
    """Refuse a trace that is larger than the caller expects, before anything is allocated."""
    total = sum(spec.nbytes for spec in specs)
    if total > limit:
        raise TraceFormatError(
            f"the trace takes {total} bytes once decoded, more than max_decoded_bytes = {limit}; if it is meant to be so"
            " large, pass a larger limit"
        )


def _check_crc32(section: Section, crc32: int) -> None:
    """Compare the checksum of stored bytes with the header's."""
    if section.crc32 != crc32:
        raise TraceFormatError(
            f"section {section.name} has CRC-32 {crc32:#010x} but the header says"
            f" {section.crc32:#010x}; the file is damaged, fetch or capture it again"
        )


def _assemble(header: Header, arrays: list[npt.NDArray[np.generic]]) -> RoutingTrace:
    """Build the trace from checked sections, in native byte order."""
    native = [array.astype(array.dtype.newbyteorder("="), copy=False) for array in arrays]
    ids, valid, token_digest, *rest = native
    weights = rest[0] if rest else None
    return RoutingTrace(
        ids=cast("IdArray", ids),
        valid=cast("ValidArray", valid),
        start=header.start,
        layer_ids=header.layer_ids,
        num_layers=header.num_layers,
        num_experts=header.num_experts,
        top_k=header.top_k,
        ordered=header.ordered,
        token_digest=cast("DigestArray", token_digest),
        weights_version=header.weights_version,
        weights=cast("WeightArray | None", weights),
    )
