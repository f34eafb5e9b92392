"""Every codec gives back what it promises, is as small as it says, and refuses everything else."""

import builtins
import json
import struct
import zlib
from math import comb
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from routing_replay.errors import (
    ConfigError,
    IntegrationError,
    TraceFormatError,
    TraceMismatchError,
)
from routing_replay.trace import RoutingTrace, decode_trace, encode_trace, load_trace, save_trace
from unit.trace.trace_cases import random_trace, traces
from wire.trace_files import join_file, small_trace, split_file, wide_trace

CODECS = ("raw", "packed", "raw+zstd", "packed+zstd")
GOLDEN = Path(__file__).parent / "golden"
REFUSALS = (TraceFormatError, TraceMismatchError)


def _expected(trace: RoutingTrace, codec: str) -> RoutingTrace:
    return trace.as_sets() if "packed" in codec else trace


@pytest.mark.parametrize("codec", CODECS)
@given(trace=traces())
def test_every_codec_gives_back_the_trace(codec: str, trace: RoutingTrace):
    data = encode_trace(trace, codec=codec)
    decoded = decode_trace(data)
    assert decoded.equals(_expected(trace, codec))
    assert encode_trace(decoded, codec=codec) == data
    assert split_file(data)[0]["codec"] == codec


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("experts", "top_k"), [(8, 2), (128, 8), (256, 8), (257, 3), (512, 10), (896, 16), (6, 6)]
)
def test_every_codec_gives_back_every_id(codec: str, experts: int, top_k: int):
    trace = random_trace(rows=40, num_experts=experts, top_k=top_k)
    decoded = decode_trace(encode_trace(trace, codec=codec))
    wanted = np.sort(trace.ids, axis=-1) if "packed" in codec else trace.ids
    assert decoded.ids.tolist() == wanted.tolist()
    assert decoded.ordered is ("packed" not in codec and trace.ordered)
    assert decoded.ids.dtype == trace.ids.dtype


def test_sets_keep_each_weight_beside_its_expert():
    trace = wide_trace()
    sets = decode_trace(encode_trace(trace, codec="packed"))
    assert sets.weights is not None
    assert trace.weights is not None
    for before, weights, after, moved in zip(
        trace.ids[:, 0], trace.weights[:, 0], sets.ids[:, 0], sets.weights[:, 0], strict=True
    ):
        assert dict(zip(after, moved, strict=True)) == dict(zip(before, weights, strict=True))
        assert after.tolist() == sorted(before)


def _model_trace(experts: int, top_k: int, layers: int, rows: int = 64) -> RoutingTrace:
    rng = np.random.default_rng(0)
    ids = rng.random((rows, layers, experts)).argsort(-1)[..., :top_k]
    return RoutingTrace.from_rows(
        ids, token_ids=range(rows), layer_ids=range(layers), num_layers=layers, num_experts=experts
    )


@pytest.mark.parametrize(
    ("experts", "top_k", "layers"), [(128, 8, 48), (256, 8, 58), (512, 10, 48), (896, 16, 92)]
)
def test_packed_ids_are_within_three_percent_of_their_entropy(
    experts: int, top_k: int, layers: int
):
    trace = _model_trace(experts, top_k, layers)
    header, _ = split_file(encode_trace(trace, codec="packed"))
    section = next(entry for entry in header["sections"] if entry["name"] == "ids")
    entropy_bits = layers * np.log2(float(comb(experts, top_k)))
    assert section["nbytes"] / 64 * 8 <= 1.03 * entropy_bits
    if (experts, top_k, layers) == (128, 8, 48):
        assert section["nbytes"] / 64 <= 250


def test_zstd_makes_repeating_routing_small():
    trace = RoutingTrace.from_rows(
        np.broadcast_to(np.arange(8), (2000, 12, 8)),
        token_ids=np.zeros(2000, np.int64),
        layer_ids=range(12),
        num_layers=12,
        num_experts=64,
    )
    assert len(encode_trace(trace, codec="raw+zstd")) < len(encode_trace(trace)) / 10


@pytest.mark.parametrize(
    ("name", "trace", "codec"),
    [("v1_packed.rrt", small_trace(), "packed"), ("v1_packed_weights.rrt", wide_trace(), "packed"),
     ("v1_raw_zstd.rrt", small_trace(), "raw+zstd"), ("v1_packed_zstd.rrt", wide_trace(), "packed+zstd")],
)  # fmt: skip
def test_golden_files_are_read_and_those_without_zstd_written_byte_for_byte(
    name: str, trace: RoutingTrace, codec: str, tmp_path: Path
):
    data = (GOLDEN / name).read_bytes()
    assert decode_trace(data).equals(_expected(trace, codec))
    # A zstd frame depends on the version of zstd that wrote it; what is in it does not.
    if "zstd" not in codec:
        assert encode_trace(trace, codec=codec) == data
    save_trace(trace, tmp_path / name, codec=codec)
    assert load_trace(tmp_path / name).equals(_expected(trace, codec))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("trace", [small_trace(), wide_trace()], ids=["small", "wide"])
def test_every_flipped_bit_is_refused(codec: str, trace: RoutingTrace):
    data = encode_trace(trace, codec=codec)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(REFUSALS):
            decode_trace(damaged)


@pytest.mark.parametrize("codec", CODECS)
def test_every_truncation_and_every_tail_is_refused(codec: str):
    data = encode_trace(wide_trace(), codec=codec)
    for size in range(len(data)):
        with pytest.raises(REFUSALS):
            decode_trace(data[:size])
    for tail in (b"\0", b"x" * 8, data):
        with pytest.raises(REFUSALS):
            decode_trace(data + tail)


def _with_section(data: bytes, name: str, stored: bytes) -> bytes:
    """The file with other bytes in a section, all checksums and offsets made to hold."""
    header, payload = split_file(data)
    out = b""
    for entry in header["sections"]:
        old = payload[entry["offset"] : entry["offset"] + entry["nbytes"]]
        new = stored if entry["name"] == name else old
        out += bytes(-len(out) % 8)
        entry.update(offset=len(out), nbytes=len(new), crc32=zlib.crc32(new))
        out += new
    return join_file(header, out)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=300)
@given(data=st.data())
def test_sections_of_any_bytes_give_valid_rows_or_a_refusal(codec: str, data: st.DataObject):
    trace = data.draw(st.sampled_from([small_trace(), wide_trace()]))
    file = encode_trace(trace, codec=codec)
    names = [entry["name"] for entry in split_file(file)[0]["sections"]]
    name = data.draw(st.sampled_from(names))
    header, payload = split_file(file)
    entry = next(entry for entry in header["sections"] if entry["name"] == name)
    stored = payload[entry["offset"] : entry["offset"] + entry["nbytes"]]
    if "zstd" in codec and data.draw(st.booleans()):
        plain = zstandard.ZstdDecompressor().decompress(stored)
        stored = zstandard.ZstdCompressor().compress(
            data.draw(st.binary(min_size=len(plain), max_size=len(plain)))
        )
    else:
        stored = data.draw(st.binary(min_size=len(stored), max_size=len(stored)))
    try:
        decoded = decode_trace(_with_section(file, name, stored))
    except REFUSALS:
        return
    decoded.validate()
    assert (decoded.num_rows, decoded.top_k) == (trace.num_rows, trace.top_k)


@settings(max_examples=300)
@given(st.binary(max_size=600))
def test_random_bytes_behind_a_right_prefix_are_refused(text: bytes):
    head = struct.pack("<8sIII", b"\x89RRT\r\n\x1a\n", 1, len(text), zlib.crc32(text))
    with pytest.raises(REFUSALS):
        decode_trace(head + text)


def test_rank_that_is_no_set_is_refused_with_its_place():
    data = encode_trace(small_trace(), codec="packed")  # C(8, 2) = 28 of 32 ranks
    with pytest.raises(
        TraceFormatError, match=r"row 0, layer slot 1 has the rank 31, not below C\(8, 2\) = 28"
    ):
        decode_trace(_with_section(data, "ids", bytes([0b11101111, 0b11, 0, 0])))
    with pytest.raises(TraceFormatError, match="only its lowest 6 bits are used"):
        decode_trace(_with_section(data, "ids", bytes([0, 0, 0, 0b01000000])))
    with pytest.raises(TraceFormatError, match="section valid: the last byte is 0x0d"):
        decode_trace(_with_section(data, "valid", bytes([0b1101])))


def test_decompression_bombs_are_refused_before_they_grow():
    data = encode_trace(small_trace(), codec="raw+zstd")
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 100_000
    with pytest.raises(TraceFormatError, match="holds 268435456 bytes; the header demands 12"):
        decode_trace(_with_section(data, "ids", bomb))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    with pytest.raises(TraceFormatError, match=r"does not say how many bytes .* demands 12"):
        decode_trace(_with_section(data, "ids", unsized))
    lying = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 20)))
    assert lying[5:9] == struct.pack("<I", 1 << 20)  # the content size in the frame's header
    lying[5:9] = struct.pack("<I", 12)
    assert zstandard.frame_content_size(bytes(lying)) == 12
    with pytest.raises(TraceFormatError, match="section ids is not one zstd frame"):
        decode_trace(_with_section(data, "ids", bytes(lying)))
    two = zstandard.ZstdCompressor().compress(bytes(12)) * 2
    with pytest.raises(TraceFormatError):
        decode_trace(_with_section(data, "ids", two))


@pytest.mark.parametrize("codec", ["raw+zstd", "packed+zstd"])
@pytest.mark.parametrize(
    "stored", [b"x", zstandard.compress(b""), zstandard.compress(b"") + b"smuggled"]
)
def test_sections_of_nothing_have_no_frame_and_no_bytes(codec: str, stored: bytes):
    nothing = small_trace().slice(2, 2)
    data = encode_trace(nothing, codec=codec)
    assert [entry["nbytes"] for entry in split_file(data)[0]["sections"]] == [0, 0, 0]
    assert decode_trace(data).num_rows == 0
    for name in ("ids", "valid", "token_digest"):
        with pytest.raises(TraceFormatError, match=rf"section {name} has nbytes = {len(stored)}"):
            decode_trace(_with_section(data, name, stored))


def test_sets_of_all_experts_take_no_bytes():
    trace = random_trace(num_experts=4, top_k=4)
    for codec in ("packed", "packed+zstd"):
        data = encode_trace(trace, codec=codec)
        assert split_file(data)[0]["sections"][0]["nbytes"] == 0
        assert decode_trace(data).equals(trace.as_sets())


def test_sets_are_of_as_many_experts_as_the_header_says():
    """And who changes that without the header's CRC-32 is refused."""
    trace = wide_trace()
    data = encode_trace(trace, codec="packed")
    header, payload = split_file(data)
    header["num_experts"] = 588
    forged = decode_trace(join_file(header, payload))
    forged.validate()
    assert forged.ids.tolist() != trace.as_sets().ids.tolist()
    altered = data.replace(b'"num_experts":512', b'"num_experts":588')
    assert altered != data
    with pytest.raises(TraceFormatError, match="header CRC-32"):
        decode_trace(altered)


JSON = st.none() | st.booleans() | st.integers(-2, 70) | st.integers() | st.text(max_size=4)
JSON |= st.lists(JSON, max_size=3) | st.lists(st.lists(JSON, max_size=2), max_size=2)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=300)
@given(data=st.data())
def test_header_of_any_values_gives_the_same_rows_or_a_refusal(codec: str, data: st.DataObject):
    trace = data.draw(st.sampled_from([small_trace(), wide_trace()]))
    header, payload = split_file(encode_trace(trace, codec=codec))
    for _ in range(data.draw(st.integers(1, 3))):
        target = header
        if data.draw(st.booleans()) and isinstance(header["sections"], list) and header["sections"]:
            target = data.draw(st.sampled_from(header["sections"]))
        if isinstance(target, dict):
            target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    try:
        decoded = decode_trace(join_file(header, payload))
    except REFUSALS as err:
        assert str(err)  # noqa: PT017
        return
    # Numbers that no checksum of the payload knows may differ; the rows may not. Only E is a number of the packed code itself:
    # forged, with a header whose CRC-32 was made to fit, it names other sets, as forged bytes of the payload would.
    if codec.startswith("packed") and decoded.num_experts != trace.num_experts:
        assert decoded.ids.shape == trace.ids.shape
        decoded.validate()
    else:
        assert decoded.ids.tolist() == _expected(trace, codec).ids.tolist()
    assert decoded.valid.tolist() == trace.valid.tolist()
    assert decoded.token_digest.tolist() == trace.token_digest.tolist()


def test_trace_larger_than_the_limit_is_refused_before_anything_is_allocated():
    header, _ = split_file(encode_trace(small_trace(), codec="raw+zstd"))
    rows = 1 << 40
    header.update(num_rows=rows, weights_version=[[1, 0]])
    frame = zstandard.ZstdCompressor().compress(b"")
    payload = b""
    for entry in header["sections"]:
        payload += bytes(-len(payload) % 8)
        shape = [rows, *entry["shape"][1:]]
        entry.update(shape=shape, offset=len(payload), nbytes=len(frame), crc32=zlib.crc32(frame))
        payload += frame
    with pytest.raises(
        TraceFormatError,
        match=r"takes 9895604649984 bytes once decoded.*max_decoded_bytes = 1073741824",
    ):
        decode_trace(join_file(header, payload))
    data = encode_trace(small_trace())
    with pytest.raises(TraceFormatError, match="more than max_decoded_bytes = 26"):
        decode_trace(data, max_decoded_bytes=26)
    assert decode_trace(data, max_decoded_bytes=27).equals(small_trace())


def test_load_trace_names_the_file_that_is_too_large(tmp_path: Path):
    save_trace(small_trace(), tmp_path / "one.rrt", codec="packed+zstd")
    with pytest.raises(TraceFormatError, match=r"one\.rrt: .*max_decoded_bytes = 26"):
        load_trace(tmp_path / "one.rrt", max_decoded_bytes=26)
    assert load_trace(tmp_path / "one.rrt", max_decoded_bytes=27).num_rows == 3


def test_unknown_codec_and_unpackable_model_are_refused():
    with pytest.raises(ConfigError, match="codec='lz4'; accepted are 'raw', 'packed'"):
        encode_trace(small_trace(), codec="lz4")
    wide = random_trace(rows=2, num_experts=1000, top_k=200)
    with pytest.raises(TraceFormatError, match="use codec raw"):
        encode_trace(wide, codec="packed")
    assert decode_trace(encode_trace(wide, codec="raw+zstd")).equals(wide)


def test_missing_zstandard_is_named(monkeypatch: pytest.MonkeyPatch):
    data = encode_trace(small_trace(), codec="raw+zstd")
    real = builtins.__import__

    def refuse(name: str, *arguments: object, **named: object) -> object:
        if name == "zstandard":
            raise ModuleNotFoundError("No module named 'zstandard'", name="zstandard")
        return real(name, *arguments, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(IntegrationError, match="pip install zstandard"):
        encode_trace(small_trace(), codec="raw+zstd")
    with pytest.raises(IntegrationError, match="pip install zstandard"):
        decode_trace(data)
    assert decode_trace(encode_trace(small_trace(), codec="packed")).num_rows == 3


def test_header_of_a_packed_trace_says_that_order_is_gone():
    assert small_trace().ordered
    header = split_file(encode_trace(small_trace(), codec="packed"))[0]
    assert (header["ordered"], header["codec"]) == (False, "packed")
    assert json.dumps(header)
