import json
import pickle
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing_replay.errors import TraceFormatError
from routing_replay.trace import RoutingTrace, decode_trace, encode_trace
from wire.trace_files import (
    MAGIC,
    PREFIX,
    Header,
    edited_file,
    edited_payload,
    join_file,
    small_trace,
    split_file,
    wide_trace,
)

BOTH = pytest.mark.parametrize("trace", [small_trace(), wide_trace()], ids=["uint8", "weights"])


@BOTH
def test_decode_trace_refuses_every_truncation(trace: RoutingTrace):
    data = encode_trace(trace)
    for length in range(len(data)):
        with pytest.raises(TraceFormatError):
            decode_trace(data[:length])


@BOTH
def test_decode_trace_refuses_every_flipped_bit(trace: RoutingTrace):
    data = bytearray(encode_trace(trace))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TraceFormatError):
            decode_trace(data)
        data[bit // 8] ^= 1 << bit % 8
    assert decode_trace(data).equals(trace)


@BOTH
@pytest.mark.parametrize("extra", [b"\0", b"\0" * 8, b"x"])
def test_decode_trace_refuses_trailing_bytes(trace: RoutingTrace, extra: bytes):
    with pytest.raises(TraceFormatError, match="trailing"):
        decode_trace(encode_trace(trace) + extra)


@given(st.binary(max_size=200))
def test_decode_trace_refuses_noise(data: bytes):
    for candidate in (data, MAGIC + data, PREFIX.pack(MAGIC, 1, 0, 0) + data):
        with pytest.raises(TraceFormatError):
            decode_trace(candidate)
    with pytest.raises(TraceFormatError):
        decode_trace(join_file(data, b""))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.integers() | st.text(max_size=4),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=50)
@given(st.data())
def test_decode_trace_never_accepts_another_value_in_the_header(data: st.DataObject):
    header, payload = split_file(encode_trace(small_trace()))
    target = header
    if data.draw(st.booleans()):
        target = header["sections"][data.draw(st.integers(0, 2))]
    key = data.draw(st.sampled_from(sorted(target)))
    value = data.draw(JSON)
    before = target[key]
    target[key] = value
    try:
        decoded = decode_trace(join_file(header, payload))
    except TraceFormatError:
        return
    # What may be said otherwise of the same payload: other numbers that no checksum can know.
    assert json.dumps(value) == json.dumps(before) or key in {
        "layer_ids",
        "num_experts",
        "num_layers",
        "ordered",
        "weights_version",
    }
    assert decoded.ids.tolist() == small_trace().ids.tolist()


def set_value(key: str, value: object) -> Callable[[Header], object]:
    return lambda header: header.update({key: value})


def set_section(idx: int, **values: object) -> Callable[[Header], object]:
    return lambda header: header["sections"][idx].update(values)


def drop_key(key: str) -> Callable[[Header], object]:
    return lambda header: header.pop(key)


LIES = {
    "unknown key": (set_value("extra", 1), r"unknown keys \[\"extra\"\]"),
    "missing key": (drop_key("ordered"), r"lacks the keys \['ordered'\]"),
    "unknown codec": (set_value("codec", "zip"), 'codec = "zip" is not known'),
    "other codec": (
        lambda header: header.update(codec="packed", ordered=False),
        "takes 4 bytes in codec packed",
    ),
    "ordered sets": (set_value("codec", "packed"), r"header\.ordered is true, but codec packed"),
    "codec type": (set_value("codec", 1), r"header\.codec is 1; it must be a string"),
    "bool as int": (set_value("start", True), r"header\.start is true"),
    "float as int": (set_value("top_k", 2.0), r"number 2\.0 is not an integer"),
    "string as int": (set_value("num_rows", "3"), r"header\.num_rows is \"3\""),
    "int as bool": (set_value("ordered", 1), r"header\.ordered is 1"),
    "null": (set_value("num_layers", None), r"header\.num_layers is null"),
    "negative": (set_value("start", -1), r"header\.start is -1"),
    "huge": (set_value("num_rows", 2**63), r"header\.num_rows is 9223372036854775808"),
    "overflow": (set_value("start", 2**63 - 1), "weights_version|exceeds"),
    "experts": (set_value("num_experts", 65537), "num_experts = 65537"),
    "wider ids": (set_value("num_experts", 257), "demands uint16"),
    "too few experts": (set_value("num_experts", 7), "is outside"),
    "top_k above experts": (set_value("top_k", 9), "top_k = 9 exceeds num_experts = 8"),
    "layer order": (set_value("layer_ids", [2, 1]), r"layer_ids\[1\] = 1"),
    "layer range": (set_value("layer_ids", [1, 10]), r"layer_ids\[1\] = 10"),
    "layer type": (set_value("layer_ids", [1, True]), r"header\.layer_ids\[1\] is true"),
    "no layers": (set_value("layer_ids", []), "layer_ids"),
    "layers no array": (set_value("layer_ids", {"0": 1}), r"header\.layer_ids is .*an array"),
    "more layers": (set_value("layer_ids", [0, 1, 2]), r"demands uint8 \[3, 3, 2\]"),
    "runs form": (set_value("weights_version", [1, 0]), r"weights_version\[0\] is 1"),
    "runs triple": (set_value("weights_version", [[1, 0, 2]]), r"weights_version\[0\] is \[1, 0,"),
    "runs start": (set_value("weights_version", [[0, 0]]), "start = 1"),
    "runs past end": (set_value("weights_version", [[1, 0], [4, 1]]), "token_idx 4"),
    "no runs": (set_value("weights_version", []), "start = 1"),
    "fewer rows": (set_value("num_rows", 2), "token_idx 3|demands"),
    "more rows": (set_value("num_rows", 4), r"demands uint8 \[4, 2, 2\]"),
    "moved": (set_value("start", 0), "start = 0"),
    "sections type": (set_value("sections", {}), r"header\.sections is \{\}"),
    "section type": (set_value("sections", [1]), r"header\.sections\[0\] is 1"),
    "no sections": (set_value("sections", []), "they must be ids"),
    "section dropped": (lambda header: header["sections"].pop(), "they must be ids"),
    "section twice": (lambda header: header["sections"].append(header["sections"][0]), "weights"),
    "section order": (lambda header: header["sections"].reverse(), "in this order"),
    "section name": (set_section(1, name="mask"), "in this order"),
    "section key": (set_section(1, extra=0), r"sections\[1\] lacks .* unknown keys"),
    "section dtype": (set_section(0, dtype="int8"), 'has dtype "int8"'),
    "object dtype": (set_section(0, dtype="object"), 'has dtype "object"'),
    "section shape": (set_section(0, shape=[3, 4]), r"shape \[3, 4\]"),
    "transposed": (set_section(0, shape=[2, 3, 2]), r"demands uint8 \[3, 2, 2\]"),
    "offset": (set_section(1, offset=0), "section valid has offset 0; it must be 16"),
    "gap": (set_section(2, offset=32), "section token_digest has offset 32; it must be 24"),
    "unaligned": (set_section(1, offset=12), "offset 12; it must be 16"),
    "nbytes": (set_section(0, nbytes=13), "nbytes = 13 but uint8"),
    "crc": (set_section(2, crc32=0), "section token_digest has CRC-32"),
    "crc range": (set_section(2, crc32=2**32), "crc32 is 4294967296"),
}


@pytest.mark.parametrize(("edit", "message"), LIES.values(), ids=LIES.keys())
def test_decode_trace_refuses_a_lying_header(edit: Callable[[Header], object], message: str):
    with pytest.raises(TraceFormatError, match=message):
        decode_trace(edited_file(edit))


def claim_rows(num_rows: int) -> Callable[[Header], object]:
    """Return an edit that claims many rows, alike in every place of the header."""

    def edit(header: Header) -> None:
        header["num_rows"] = num_rows
        offset = 0
        for entry, row_bytes in zip(header["sections"], (4, 1, 4), strict=True):
            nbytes = row_bytes * num_rows
            entry.update(shape=[num_rows, *entry["shape"][1:]], nbytes=nbytes, offset=offset)
            offset += nbytes + -nbytes % 8

    return edit


@pytest.mark.parametrize("num_rows", [4, 1 << 31, 1 << 40, (1 << 60) - 1])
def test_decode_trace_refuses_rows_that_the_file_cannot_hold(num_rows: int):
    with pytest.raises(TraceFormatError, match="payload has 36 bytes but its sections end at"):
        decode_trace(edited_file(claim_rows(num_rows)))


def test_decode_trace_refuses_a_product_that_would_wrap_to_the_true_size():
    # 2**62 rows of 4 ids are 0 bytes modulo 2**64.
    def edit(header: Header) -> None:
        header["num_rows"] = 1 << 62
        header["sections"][0].update(shape=[1 << 62, 2, 2], nbytes=0)

    with pytest.raises(
        TraceFormatError, match=r"nbytes = 0 but uint8 .* takes 18446744073709551616"
    ):
        decode_trace(edited_file(edit))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"[]", r"header is \[\]"),
        (b"null", "header is null"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON in UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ("{}".encode("utf-16"), "not JSON"),
        (b'{"codec":NaN}', "number NaN"),
        (b'{"codec":1e3}', "number 1e3"),
        (b'{"a":1,"a":1}', 'key "a" occurs twice'),
        (b'{"x":{"a":1,"a":2}}', 'key "a" occurs twice'),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"' + b"k" * 100_000 + b'":1}', "unknown keys"),
    ],
)
def test_decode_trace_refuses_a_header_that_is_not_one_object(text: bytes, message: str):
    with pytest.raises(TraceFormatError, match=message) as caught:
        decode_trace(join_file(text, b""))
    assert len(str(caught.value)) < 600


def test_decode_trace_refuses_duplicated_keys_with_the_same_value():
    header, payload = split_file(encode_trace(small_trace()))
    text = json.dumps(header)[:-1] + ', "start": 1}'
    with pytest.raises(TraceFormatError, match='"start" occurs twice'):
        decode_trace(join_file(text.encode(), payload))


def test_decode_trace_accepts_another_spelling_of_the_header():
    header, payload = split_file(encode_trace(small_trace()))
    text = json.dumps(dict(reversed(header.items())), indent=2).encode()
    assert decode_trace(join_file(text, payload)).equals(small_trace())


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_decode_trace_refuses_another_version(version: int):
    data = bytearray(encode_trace(small_trace()))
    data[8:12] = struct.pack("<I", version)
    with pytest.raises(TraceFormatError, match=f"format version = {version} is not known"):
        decode_trace(data)


@pytest.mark.parametrize("length", [(1 << 20) + 1, 2**32 - 1])
def test_decode_trace_refuses_a_header_length_over_the_limit(length: int):
    data = bytearray(encode_trace(small_trace()))
    data[12:16] = struct.pack("<I", length)
    with pytest.raises(TraceFormatError, match=f"header length = {length} is not accepted"):
        decode_trace(data)


def test_decode_trace_refuses_a_long_header_even_where_the_file_holds_it():
    data = join_file(b" " * ((1 << 20) + 1), b"")
    with pytest.raises(TraceFormatError, match="header length = 1048577"):
        decode_trace(data)


@pytest.mark.parametrize(
    "data", [pickle.dumps({"ids": 1}), b"PK\x03\x04" + bytes(40), b"\x93NUMPY"]
)
def test_decode_trace_refuses_other_file_types(data: bytes):
    with pytest.raises(TraceFormatError, match=r"magic|fewer than"):
        decode_trace(data)


def test_decode_trace_tells_a_text_mode_transfer():
    data = encode_trace(small_trace()).replace(b"\r\n", b"\n")
    with pytest.raises(TraceFormatError, match="magic"):
        decode_trace(data)


@pytest.mark.parametrize(
    ("section", "at", "value", "message"),
    [
        ("ids", 0, 8, r"ids\[0, 0, 0\] = 8 \(token index 1, decoder layer 1\) is outside"),
        ("ids", 0, 2, r"ids\[0, 0\] = \[2, 2\] .* repeats an expert"),
        ("ids", 4, 3, r"row 1 \(token index 2\) is marked invalid"),
        ("valid", 0, 0, r"row 0 \(token index 1\) is marked invalid"),
        ("valid", 0, 2, "section valid holds the byte 2 at row 0"),
        ("valid", 2, 255, "section valid holds the byte 255 at row 2"),
    ],
)
def test_decode_trace_validates_content(section: str, at: int, value: int, message: str):
    with pytest.raises(TraceFormatError, match=message):
        decode_trace(edited_payload(section, at, value))


def test_decode_trace_refuses_weights_that_are_not_finite():
    with pytest.raises(TraceFormatError, match=r"weights\[0, 0, 0\] = inf"):
        decode_trace(edited_payload("weights", 1, 0x7C, wide_trace()))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "object", "f" * 10_000])
def test_decode_trace_refuses_other_weight_dtypes(dtype: str):
    with pytest.raises(TraceFormatError, match="section weights has dtype") as caught:
        decode_trace(edited_file(set_section(3, dtype=dtype), wide_trace()))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("at", [-7, -1, 12, 15, 19, 23])
def test_decode_trace_refuses_padding_that_is_not_zero(at: int):
    data = bytearray(encode_trace(small_trace()))
    payload_at = len(data) - len(split_file(data)[1])
    assert data[payload_at + at] == 0
    data[payload_at + at] = 1
    with pytest.raises(TraceFormatError, match=r"padding .* is not zero"):
        decode_trace(data)
