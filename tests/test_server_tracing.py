"""Traces: what a collector gets for a request."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from pared.errors import BadParameter
from pared.runtime.server.limits import Limits
from pared.runtime.server.opening import Wanted, open_service
from pared.runtime.server.tracing import Spans
from pared.tests.serving import serving

WANTED = Wanted(device="cpu", max_batch=4, chunk=64, kv_cache_bytes=2**20, pooling="mean")


@contextmanager
def collector(got: list[bytes]) -> Iterator[str]:
    class Takes(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Takes)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_request_is_a_span_of_its_clients_trace(tiny_folder: Path) -> None:
    service_pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    got: list[bytes] = []
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "x-request-id": "mine"}
    with collector(got) as endpoint:
        service = open_service(tiny_folder, "tiny", Limits(), WANTED)
        service.spans = Spans(endpoint, "tiny")
        with serving(service) as address, httpx.Client(base_url=address, timeout=60) as http:
            body = {"prompt": "private words", "max_tokens": 3}
            http.post("/v1/completions", json=body, headers=headers)
            http.post("/v1/completions", json={**body, "stream": True})
            http.post("/v1/embeddings", json={"input": "private words"})
            http.post("/v1/completions", json={"nonsense": 1})
            http.get("/health")
    assert got and not any(b"private" in each for each in got)
    spans = [
        span
        for each in got
        for resource in service_pb2.ExportTraceServiceRequest.FromString(each).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert [span.name for span in spans] == [
        "text_completion tiny",
        "text_completion tiny",
        "embeddings tiny",
        "text_completion tiny",
    ]
    first = spans[0]
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (trace, "00f067aa0ba902b7")
    assert first.end_time_unix_nano > first.start_time_unix_nano

    def told(span: Any) -> dict[str, Any]:
        return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}

    assert told(first)["gen_ai.usage.input_tokens"] == 13 and told(first)["gen_ai.usage.output_tokens"] == 3
    assert told(first)["pared.request_id"] == "mine" and told(first)["gen_ai.server.time_to_first_token"] > 0
    assert told(spans[2])["gen_ai.usage.input_tokens"] == 13
    assert [told(span)["http.response.status_code"] for span in spans] == [200, 200, 200, 400]


def test_without_the_extra_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(BadParameter, match=r"pip install 'pared\[otel\]'"):
        Spans("http://127.0.0.1:1", "tiny")
