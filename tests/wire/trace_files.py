"""Small trace files for tests, and files whose header lies but whose checksums hold."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from routing_replay.trace import RoutingTrace, TraceStoreWriter, encode_trace

PREFIX = struct.Struct("<8sIII")
MAGIC = b"\x89RRT\r\n\x1a\n"

Header = dict[str, object]


def small_trace() -> RoutingTrace:
    """Return the trace of the worked example in `docs/trace_format.md`."""
    return RoutingTrace.from_rows(
        np.array([[[5, 2], [0, 7]], [[-1, -1], [-1, -1]], [[3, 4], [6, 1]]], dtype=np.int16),
        token_ids=[11, 12, 13, 14, 15],
        layer_ids=[1, 2],
        num_layers=10,
        num_experts=8,
        start=1,
        valid=[True, False, True],
        weights_version=[(1, 0), (3, 1)],
    )


def wide_trace() -> RoutingTrace:
    """Return a trace with two-byte ids and weights."""
    return RoutingTrace.from_rows(
        np.array([[[511, 0, 256]], [[1, 300, 2]]]),
        token_ids=[4294967295, 0],
        layer_ids=[0],
        num_layers=1,
        num_experts=512,
        ordered=False,
        weights_version=7,
        weights=np.array([[[0.5, 0.25, 0.25]], [[1.0, 0.0, -0.0]]], dtype=np.float16),
    )


def split_file(data: bytes) -> tuple[Header, bytes]:
    """Return header and payload of a file."""
    length = PREFIX.unpack(data[: PREFIX.size])[2]
    end = PREFIX.size + length
    return json.loads(data[PREFIX.size : end]), data[end + -end % 8 :]


def join_file(header: Header | bytes, payload: bytes) -> bytes:
    """Return a file with any header, all of whose own checksums hold."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = PREFIX.pack(MAGIC, 1, len(text), zlib.crc32(text)) + text
    return head + bytes(-len(head) % 8) + payload


def edited_file(edit: Callable[[Header], object], trace: RoutingTrace | None = None) -> bytes:
    """Return the file of a trace after its header was changed in place."""
    header, payload = split_file(encode_trace(small_trace() if trace is None else trace))
    edit(header)
    return join_file(header, payload)


def edited_payload(section: str, at: int, value: int, trace: RoutingTrace | None = None) -> bytes:
    """Return the file of a trace in which one payload byte and its checksum were changed."""
    header, payload = split_file(encode_trace(small_trace() if trace is None else trace))
    changed = bytearray(payload)
    for entry in header["sections"]:
        if entry["name"] == section:
            changed[entry["offset"] + at] = value
            stored = changed[entry["offset"] : entry["offset"] + entry["nbytes"]]
            entry["crc32"] = zlib.crc32(stored)
    return join_file(header, bytes(changed))


def golden_store() -> dict[str, RoutingTrace]:
    """Return the traces of `golden/v1_store.rrs`, in order."""
    return {"small": small_trace(), "wide/☃": wide_trace(), "": small_trace().slice(2, 2)}


def write_golden_store(path: Path) -> None:
    """Write the store of `golden/v1_store.rrs`."""
    with TraceStoreWriter(path, codec="packed") as writer:
        for key, trace in golden_store().items():
            writer.append(key, trace)
