"""Requests that no client of good will sends: bodies, heads and connections, each as the bytes that go over the wire."""

import base64
import contextlib
import gzip
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Hostile:
    """One request.

    Attributes:
        kind: What sort of harm it means.
        name: What it is.
        wire: The bytes, made when they are sent, piece by piece; a number in between waits so many seconds.
    """

    kind: str
    name: str
    wire: Callable[[], Iterator[bytes | float]]


def send(address: Address, hostile: Hostile, *, timeout_s: float = 60.0) -> int | str:
    """Send a request; return the answer's status, `closed` where the server ended the connection, or `hung`."""
    with socket.create_connection(address, timeout=timeout_s) as connection:
        until = time.monotonic() + timeout_s
        with contextlib.suppress(ConnectionError):
            for piece in hostile.wire():
                if isinstance(piece, float):
                    time.sleep(piece)
                else:
                    connection.sendall(piece)
                if time.monotonic() > until:
                    return "hung"
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR) if hostile.kind == "ends early" else None
        return _status(connection, until)


def _status(connection: socket.socket, until: float) -> int | str:
    data = b""
    try:
        while b"\r\n" not in data:
            connection.settimeout(max(0.1, until - time.monotonic()))
            piece = connection.recv(65536)
            if not piece:
                return "closed"
            data += piece
    except TimeoutError:
        return "hung"
    except ConnectionError:
        return "closed"
    words = data.split(b" ", 2)
    return int(words[1]) if words[0].startswith(b"HTTP/") and words[1].isdigit() else "closed"


def post(
    path: str, body: bytes, *, kind: str = "application/json", head: str = ""
) -> Callable[[], Iterator[bytes | float]]:
    """Return a well-formed POST of any bytes."""

    def wire() -> Iterator[bytes | float]:
        yield (
            f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{head}"
            "Connection: close\r\n\r\n"
        ).encode()
        yield body

    return wire


GOOD: dict[str, dict[str, object]] = {
    "/v1/completions": {"prompt": [3, 4, 5], "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "1+1="}], "max_tokens": 1},
    "/generate": {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 1}},
    "/inference/v1/generate": {"token_ids": [3, 4, 5], "sampling_params": {"max_tokens": 1}},
    "/tokenize": {"prompt": "1+1="},
    "/detokenize": {"tokens": [3, 4]},
}
"""Small requests that are accepted, to be spoilt."""

_JUNK: dict[str, object] = {
    "null": None, "true": True, "0": 0, "-1": -1, "2**31": 2**31, "2**63": 2**63, "10**400": 10**400, "1e308": 1e308,
    "-0.5": -0.5, "empty text": "", "text": "x", "long text": "x" * 100_000, "NUL": "a\0b", "bidi": "\u202e\u2066",
    "list": [], "list of null": [None], "nested list": [[[[1]]]], "object": {}, "object of object": {"a": {"b": [1]}},
    "many": [1] * 50_000,
}  # fmt: skip


def wrong_types() -> Iterator[Hostile]:
    """Yield every field of the small requests, and every field about routing, with values of other types."""
    routing = (
        "routed_experts_prompt_start", "routed_experts_start_len", "routed_experts_format", "routed_experts_codec",
        "routed_experts_delivery", "conversation_id", "routing_replay", "routing_replay_on_missing", "return_routed_experts",
        "n", "stop", "seed", "logprobs", "temperature", "stream", "stop_token_ids",
    )  # fmt: skip
    for path, good in GOOD.items():
        names = (*good, *(routing if path.startswith("/v1/") else ()))
        for name in names:
            for label, value in _JUNK.items():
                body = json.dumps({**good, name: value}).encode()
                yield Hostile("wrong types", f"{path} {name}={label}", post(path, body))


def bad_json(
    paths: tuple[str, ...] = ("/v1/completions", "/v1/chat/completions", "/generate"),
) -> Iterator[Hostile]:
    """Yield bodies that are not JSON, or JSON that parsers stumble over."""
    bodies = {
        "empty": b"", "blank": b"   ", "not JSON": b"{prompt: 1}", "cut off": b'{"prompt": [1, 2', "scalar": b"17",
        "text": b'"a"', "list": b"[]", "two documents": b"{}{}", "NaN": b'{"prompt": [1], "temperature": NaN}',
        "Infinity": b'{"prompt": [1], "temperature": Infinity}', "1e999": b'{"prompt": [1], "temperature": 1e999}',
        "1e-999": b'{"prompt": [1], "temperature": 1e-999}', "invalid UTF-8": b'{"prompt": "\xff\xfe\x80"}',
        "lone surrogate": b'{"prompt": "\\ud800"}', "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
        "byte order mark": b'\xef\xbb\xbf{"prompt": [1], "max_tokens": 1}', "UTF-16": '{"prompt": [1]}'.encode("utf-16"),
        "control characters": b'{"prompt": "\x01\x02"}', "duplicate keys": b'{"prompt": [1], "prompt": "a", "max_tokens": 1}',
        "deep lists": b"[" * 200_000, "deep objects": b'{"a":' * 100_000,
        "deep and closed": b'{"prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        "deep metadata": b'{"prompt": [1], "max_tokens": 1, "metadata": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_001,
        "10,000 digits": b'{"prompt": [1], "max_tokens": ' + b"9" * 10_000 + b"}",
        "digits in a token": b'{"prompt": [' + b"9" * 5_000 + b"]}", "a million values": b'{"prompt": [' + b"1," * 1_000_000 + b"1]}",
        "three million values": b'{"prompt": [' + b"1," * 3_000_000 + b"1]}",
        "a million keys": b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b"}",
    }  # fmt: skip
    for name, item in {"nulls": b"null", "objects": b"{}", "lists": b"[]"}.items():
        for field in (b"prompt", b"messages", b"input_ids", b"stop"):
            many = b'{"' + field + b'": [' + b",".join([item] * 400_000) + b"]}"
            bodies[f"400,000 {name} in {field.decode()}"] = many
    for name, body in bodies.items():
        for path in paths:
            yield Hostile("bad JSON", f"{path} {name}", post(path, body))


def large_values() -> Iterator[Hostile]:
    """Yield well-formed requests for too much."""
    bodies: dict[str, dict[str, object]] = {
        "n": {"n": 10**6}, "max_tokens": {"max_tokens": 2**31 - 1}, "logprobs": {"logprobs": 10**6}, "seed": {"seed": 2**63 - 1},
        "token id": {"prompt": [2**31 - 1]}, "negative token": {"prompt": [-1]}, "long prompt": {"prompt": [1] * 100_000},
        "long text": {"prompt": "a" * 1_000_000}, "many prompts": {"prompt": [[1]] * 5_000}, "stop strings": {"stop": ["a"] * 5_000},
        "a stop string": {"stop": ["a" * 100_000]}, "stop tokens": {"stop_token_ids": list(range(5_000))},
        "empty prompt": {"prompt": []}, "empty prompts": {"prompt": [[]]}, "unknown field": {"propmt": 1},
        "start beyond": {"routed_experts_prompt_start": 10_000, "return_routed_experts": True},
        "replay of nothing": {"routing_replay": ""}, "replay of noise": {"routing_replay": "QUJD" * 10_000},
        "replay no base64": {"routing_replay": "\u00e9\u00e9"}, "replay of a bomb": {"routing_replay": _bomb()},
        "replay of a file": {"routing_replay": {"handle": {"url": "/etc", "key": "passwd", "checksum": "sha256:" + "0" * 64, "num_rows": 1, "start": 0, "format": "trace_store"}}},
        "replay of a URL": {"routing_replay": {"handle": {"url": "http://127.0.0.1:1/x", "key": "x.rrt", "checksum": "sha256:" + "0" * 64, "num_rows": 1, "start": 0, "format": "trace"}}},
        "store without one": {"routed_experts_delivery": "store", "return_routed_experts": True},
    }  # fmt: skip
    for name, fields in bodies.items():
        body = json.dumps({"prompt": [3, 4, 5], "max_tokens": 1, **fields}).encode()
        yield Hostile("too much", name, post("/v1/completions", body))
    template = {
        "role": "user",
        "content": "{{ ''.__class__.__mro__ }} {% for i in range(10**9) %}x{% endfor %}",
    }
    body = json.dumps({"messages": [template], "max_tokens": 1}).encode()
    yield Hostile("too much", "a template in a message", post("/v1/chat/completions", body))
    turns = json.dumps(
        {"messages": [{"role": "user", "content": "a"}] * 20_000, "max_tokens": 1}
    ).encode()
    yield Hostile("too much", "20,000 messages", post("/v1/chat/completions", turns))
    weights = json.dumps({"folder": "/" + "../" * 1000}).encode()
    yield Hostile("too much", "weights from a strange folder", post("/update_weights", weights))


def _bomb() -> str:
    """A trace whose header promises 2**60 rows."""
    header = json.dumps({"num_rows": 2**60}).encode()
    return base64.b64encode(b"RRTRACE\0" + struct.pack("<Q", len(header)) + header).decode()


def odd_http(*, large_bytes: int = 100 << 20) -> Iterator[Hostile]:
    """Yield requests that bend HTTP, and bodies of a size that nobody means."""
    good = json.dumps(GOOD["/v1/completions"]).encode()
    path = "/v1/completions"

    def raw(*pieces: bytes | float) -> Callable[[], Iterator[bytes | float]]:
        return lambda: iter(pieces)

    def large() -> Iterator[bytes | float]:
        yield f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {large_bytes}\r\n\r\n".encode()
        for _ in range(large_bytes >> 20):
            yield b" " * (1 << 20)

    def large_chunked() -> Iterator[bytes | float]:
        yield f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        for _ in range(large_bytes >> 20):
            yield b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        yield b"0\r\n\r\n"

    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode()
    yield Hostile("size", f"{large_bytes >> 20} MiB with a length", large)
    yield Hostile("size", f"{large_bytes >> 20} MiB in chunks", large_chunked)
    yield Hostile("size", "a head of 2 MiB", raw(b"GET / HTTP/1.1\r\nA: " + b"a" * (2 << 20)))
    yield Hostile(
        "size",
        "100,000 header lines",
        raw(b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 100_000 + b"\r\n"),
    )
    yield Hostile(
        "size",
        "a path of 1 MiB",
        raw(b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    )
    bomb = gzip.compress(b" " * (64 << 20))
    yield Hostile("size", "a compressed bomb", post(path, bomb, head="Content-Encoding: gzip\r\n"))
    yield Hostile("HTTP", "a negative length", raw(head + b"Content-Length: -1\r\n\r\n" + good))
    yield Hostile("HTTP", "a length of text", raw(head + b"Content-Length: x\r\n\r\n" + good))
    yield Hostile(
        "HTTP", "two lengths", raw(head + b"Content-Length: 1\r\nContent-Length: 9\r\n\r\n" + good)
    )
    yield Hostile(
        "HTTP",
        "length and chunks",
        raw(head + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /"),
    )
    yield Hostile(
        "HTTP",
        "a chunk of 2**64 bytes",
        raw(head + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n"),
    )
    yield Hostile(
        "HTTP", "a chunk size of text", raw(head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    )
    yield Hostile("HTTP", "HTTP/0.9", raw(b"GET /\r\n\r\n"))
    yield Hostile("HTTP", "HTTP/2", raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
    yield Hostile("HTTP", "TLS", raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)))
    yield Hostile("HTTP", "noise", raw(bytes(range(256)) * 8 + b"\r\n\r\n"))
    yield Hostile(
        "HTTP",
        "an unknown method",
        raw(b"BREW /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
    )
    yield Hostile(
        "HTTP",
        "a path outside",
        raw(b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
    )
    yield Hostile(
        "HTTP",
        "NUL in a path",
        raw(b"GET /health%00 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
    )
    yield Hostile("HTTP", "another content type", post(path, good, kind="text/plain"))
    yield Hostile(
        "HTTP", "a form", post(path, b"prompt=a", kind="application/x-www-form-urlencoded")
    )
    yield Hostile("HTTP", "a charset", post(path, good, kind="application/json; charset=utf-16"))
    yield Hostile(
        "HTTP", "an upgrade", post(path, good, head="Connection: Upgrade\r\nUpgrade: websocket\r\n")
    )
    yield Hostile(
        "ends early", "the body ends early", raw(head + b"Content-Length: 1000\r\n\r\n" + good)
    )
    yield Hostile("ends early", "the head ends early", raw(head))
    yield Hostile("ends early", "nothing comes", raw())


def slow(*, seconds: float = 20.0) -> Iterator[Hostile]:
    """Yield requests that come a byte at a time."""

    def slow_head() -> Iterator[bytes | float]:
        yield b"POST /v1/completions HTTP/1.1\r\n"
        for number in range(int(seconds)):
            yield f"X-{number}: a\r\n".encode()
            yield 1.0

    def slow_body() -> Iterator[bytes | float]:
        yield b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
        for _ in range(int(seconds)):
            yield b" "
            yield 1.0

    yield Hostile("slow loris", "a head line a second", slow_head)
    yield Hostile("slow loris", "a byte of the body a second", slow_body)
