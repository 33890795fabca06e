"""Requests that mean harm: each is answered by a 4xx or a clean close, and the next client never notices."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from pared.runtime.server.limits import Limits
from pared.runtime.server.opening import Wanted, open_service
from pared.runtime.server.service import Service
from pared.tests.serving import eventually, serving

WANTED = Wanted(device="cpu", max_batch=4, chunk=64, kv_cache_bytes=2**20, pooling="mean")
GOOD = {"prompt": "x", "max_tokens": 2}
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
FOREVER = 60.0


@pytest.fixture(scope="module")
def service(tiny_folder: Path) -> Service:
    return open_service(tiny_folder, "tiny", Limits(body_s=1), WANTED)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with serving(service) as address:
        yield address


@pytest.fixture(autouse=True)
def _others_notice_nothing(address: str, service: Service) -> Iterator[None]:
    yield
    with httpx.Client(base_url=address, timeout=FOREVER) as http:
        assert http.get("/health").status_code == 200
        assert http.post("/v1/completions", json=GOOD).json()["usage"]["completion_tokens"] == 2
    eventually(lambda: service.generator._live == 0 and service.generator.stats.kv_blocks_used == 0)


def connect(address: str) -> socket.socket:
    where = urlsplit(address)
    return socket.create_connection((where.hostname, where.port), timeout=FOREVER)


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**16):
            found += piece
    return found


def told(connection: socket.socket) -> int:
    """The status of the answer; 0 where there is none but a close."""
    found = answer(connection)
    return int(found.split(b" ", 2)[1]) if found else 0


def drip(connection: socket.socket, piece: bytes) -> bytes:
    """What the server says while it gets a piece now and then, up to its close."""
    found, until = b"", time.monotonic() + FOREVER
    while time.monotonic() < until:
        with contextlib.suppress(ConnectionError):
            connection.sendall(piece)
        if select.select([connection], [], [], 0.05)[0]:
            try:
                got = connection.recv(2**16)
            except ConnectionError:
                return found
            if not got:
                return found
            found += got
    raise AssertionError("the server goes on listening")


# --- too much -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {**GOOD, "n": 10**9},
        {**GOOD, "n": -1},
        {**GOOD, "max_tokens": 2**31},
        {**GOOD, "logprobs": 10**6},
        {**GOOD, "stop": ["x" * 10**5]},
        {**GOOD, "logit_bias": {str(token): 1 for token in range(2000)}},
        {**GOOD, "prompt": [["x"] * 100]},
        {**GOOD, "prompt": ["x"] * 10**4},
        {**GOOD, "prompt": "x" * 10**6},
        {**GOOD, "prompt": [1] * 10**5},
    ],
    ids=lambda body: str(body)[-60:].replace("\x00", ""),
)
def test_a_field_that_asks_for_too_much(address: str, body: dict) -> None:
    status = httpx.post(f"{address}/v1/completions", json=body, timeout=FOREVER).status_code
    assert status == 400


@pytest.mark.parametrize(
    "guide",
    [
        {"regex": "((((a{1,999}){1,999}){1,999}){1,999}){1,999}"},
        {"regex": "(" * 10**4 + ")" * 10**4},
        {"regex": "(a|a)*(a|aa)*b" * 50},
        {"grammar": "start: start"},
        {"grammar": 'start: ""'},
        {"json": {"$ref": "#"}},
        {"json": {"$ref": "http://127.0.0.1:1/schema"}},
        {"json": {"type": "array", "minItems": 10**9}},
        {"json": {"enum": ["x" * 50] * 10**4}},
    ],
    ids=lambda guide: str(guide)[:40],
)
def test_a_guide_that_explodes_is_refused_or_bounded(address: str, guide: dict) -> None:
    body = {**GOOD, "structured_outputs": guide}
    assert httpx.post(f"{address}/v1/completions", json=body, timeout=FOREVER).status_code in (200, 400)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", '"NaN"'])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty", "max_tokens"])
def test_what_is_no_number(address: str, field: str, number: str) -> None:
    content = f'{{"prompt": "x", "{field}": {number}}}'
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{address}/v1/completions", content=content, headers=headers, timeout=FOREVER)
    assert response.status_code == 400


@pytest.mark.parametrize("framing", ["content-length", "chunked", "announced"])
def test_ten_megabytes(address: str, framing: str) -> None:
    body = json.dumps({**GOOD, "prompt": "x" * 10_000_000}).encode()
    with connect(address) as connection, contextlib.suppress(ConnectionError):
        if framing == "chunked":
            connection.sendall(POST + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n")
            connection.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        else:
            length = 10**18 if framing == "announced" else len(body)
            connection.sendall(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % length)
            connection.sendall(body)
        assert told(connection) in (413, 408, 0)


def test_a_body_that_goes_on_after_its_answer(address: str) -> None:
    with connect(address) as connection:
        connection.sendall(POST + b"transfer-encoding: chunked\r\n\r\n")
        first = b"%x\r\n%s\r\n" % (5_000_000, b"x" * 5_000_000)
        connection.sendall(first)
        assert b" 413 " in drip(connection, b"1\r\nx\r\n")


@pytest.mark.parametrize("count", [300, 5_000, 100_000])
def test_thousands_of_headers(address: str, count: int) -> None:
    with connect(address) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n")
        connection.sendall(b"".join(b"x-%d: y\r\n" % number for number in range(count)) + b"\r\n")
        assert told(connection) in (431, 400, 0)


@pytest.mark.parametrize("size", [60_000, 10_000_000])
def test_one_header_or_address_that_is_long(address: str, size: int) -> None:
    long = b"y" * size
    for start in (b"GET /health HTTP/1.1\r\nhost: x\r\nx: %s\r\n" % long, b"GET /%s HTTP/1.1\r\nhost: x\r\n" % long):
        with connect(address) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(start + b"connection: close\r\n\r\n")
            status = told(connection)
            assert status in ((200, 404) if size < 2**16 else (400, 0))


# --- too slow -------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n", b"GET /"])
def test_headers_that_do_not_end(address: str, begin: bytes) -> None:
    with connect(address) as connection:
        connection.sendall(begin)
        assert drip(connection, b"x") == b""


def test_a_client_that_says_nothing(address: str) -> None:
    with connect(address) as connection:
        assert answer(connection) == b""


def test_a_second_request_that_does_not_end(address: str) -> None:
    with connect(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answered = b""
        while not answered.endswith(b'{"status":"ok"}'):
            answered += (received := connection.recv(2**16))
            assert received, answered
        assert answered.startswith(b"HTTP/1.1 200")
        assert drip(connection, b"y") == b""


@pytest.mark.parametrize("length", [b"content-length: 100000", b"transfer-encoding: chunked"])
def test_a_body_that_drips(address: str, length: bytes) -> None:
    with connect(address) as connection:
        connection.sendall(POST + length + b"\r\n\r\n")
        piece = b"1\r\nx\r\n" if b"chunked" in length else b"x"
        assert drip(connection, piece).startswith(b"HTTP/1.1 408")


def test_a_client_that_announces_a_body_and_waits(address: str) -> None:
    with connect(address) as connection:
        connection.sendall(POST + b"content-length: 9\r\nexpect: 100-continue\r\n\r\n")
        assert b"408" in drip(connection, b"")


def test_an_answer_that_nobody_reads(address: str, service: Service) -> None:
    body = json.dumps({"prompt": ["x"] * 8, "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 8}).encode()
    with connect(address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: service.generator.stats.output_tokens > 100)
        with httpx.Client(base_url=address, timeout=FOREVER) as http:
            assert http.post("/v1/completions", json=GOOD).status_code == 200


# --- too wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"\x00" * 100,
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: a\x00b\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        POST + b"content-length: -5\r\n\r\n",
        POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nxxxxxx",
        POST + b"transfer-encoding: chunked\r\n\r\nZZ\r\n",
        POST + b"transfer-encoding: gzip\r\n\r\nxx",
    ],
    ids=[
        "TLS",
        "zeros",
        "HTTP/0.9",
        "no-host",
        "header",
        "zero-byte",
        "address",
        "length",
        "lengths",
        "chunk",
        "coding",
    ],
)
def test_what_is_no_http(address: str, raw: bytes) -> None:
    with connect(address) as connection:
        connection.sendall(raw)
        assert told(connection) in (400, 408, 501, 0)


@pytest.mark.parametrize(
    "content",
    [b'{"prompt": "\xff\xfe"}', b"\xff\xfe{", b'{"prompt": "\\ud800"}', b"\x1f\x8b\x08\x00", b"[" * 10**5, b"null"],
    ids=["text", "mark", "half a pair", "gzip", "deep", "null"],
)
@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions", "v1/embeddings", "tokenize", "detokenize"])
def test_what_is_no_text(address: str, path: str, content: bytes) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = httpx.post(f"{address}/{path}", content=content, headers=headers, timeout=FOREVER)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_addresses_that_are_no_text(address: str) -> None:
    for name in ("%ff%fe", "..%2f..%2fetc", "%00", "%2e%2e/", "x" * 9000):
        assert httpx.get(f"{address}/v1/models/{name}", timeout=FOREVER).status_code == 404
