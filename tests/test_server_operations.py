"""The server in operation: keys, limits, clients that leave, an engine that dies, and the end."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

from pared.errors import BadParameter
from pared.runtime.llm import LLM
from pared.runtime.server import sse
from pared.runtime.server.app import create_app, drain
from pared.runtime.server.limits import Keys, Limits, read_keys
from pared.runtime.server.logs import JsonLines
from pared.runtime.server.opening import service_of
from pared.runtime.server.service import Service
from pared.tests.serving import eventually, serving

ENDLESS = {"prompt": "x", "max_tokens": 200, "ignore_eos": True}


class Gate:
    """Lets a model's steps pass one by one, or all."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.spec, self.ffn_use = model.spec, model.ffn_use
        self.open = threading.Event()
        self.open.set()
        self.broken = False

    def __call__(self, *args: Any) -> torch.Tensor:
        assert self.open.wait(60)
        if self.broken:
            raise RuntimeError("the device is gone")
        return self.model(*args)


@pytest.fixture
def llm(tiny_folder: Path) -> LLM:
    llm = LLM(tiny_folder, device="cpu", max_batch=2, chunk=64, num_blocks=100, page=8, prefix_caching=True)
    llm.core.model = Gate(llm.core.model)
    return llm


@contextmanager
def clients(llm: LLM, keys: tuple[str, ...] = (), **limits: Any) -> Iterator[tuple[httpx.Client, Service]]:
    service = service_of(llm, "tiny", Limits(**limits))
    with serving(service, keys) as address, httpx.Client(base_url=address, timeout=60) as http:
        try:
            yield http, service
        finally:
            llm.core.model.open.set()


def ask(http: httpx.Client, body: dict, answers: list[httpx.Response]) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(http.post("/v1/completions", json=body)))
    thread.start()
    return thread


def idle(llm: LLM) -> bool:
    stats = llm.core.stats()
    return (stats.running, stats.waiting, stats.kv_blocks_used, len(llm._choices)) == (0, 0, 0, 0)


def test_keys(llm: LLM) -> None:
    with clients(llm, keys=("first", "second")) as (http, _):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}, {"authorization": "é"}):
            response = http.get("/v1/models", headers={k: v.encode() for k, v in headers.items()})
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for key in ("first", "second"):
            assert http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert [http.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3
        assert http.get("/openapi.json").status_code == 401


def test_where_keys_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    monkeypatch.setenv("PARED_API_KEYS", "three, four")
    assert read_keys(file) == ["three", "four", "one", "two"]
    monkeypatch.delenv("PARED_API_KEYS")
    assert read_keys(None) == []
    assert Keys([]).admit("")
    file.write_text("\n")
    with pytest.raises(BadParameter, match="holds no API key"):
        read_keys(file)
    with pytest.raises(BadParameter, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_a_full_queue_is_told_and_counted(llm: LLM) -> None:
    with clients(llm, waiting=1) as (http, service):
        llm.core.model.open.clear()
        answers: list[httpx.Response] = []
        threads = [ask(http, {"prompt": "x", "max_tokens": 2}, answers) for _ in range(3)]
        eventually(lambda: service.generator._live == 3)
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        streamed = http.post("/v1/completions", json={"prompt": "x", "stream": True})
        assert streamed.status_code == 429
        llm.core.model.open.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 3
        assert 'admission_rejections_total{reason="queue_full"} 2.0' in http.get("/metrics").text
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_prompts_may_be_bounded_below_the_context(llm: LLM) -> None:
    with clients(llm, prompt_tokens=5) as (http, _):
        refused = http.post("/v1/completions", json={"prompt": "123456"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert http.post("/v1/completions", json={"prompt": "12345"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "streaming"])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_client_that_leaves_stops_its_answer(llm: LLM, path: str, stream: bool) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "ignore_eos": True}
    body = json.dumps({**(chat if "chat" in path else ENDLESS), "n": 2, "stream": stream}).encode()
    with clients(llm) as (http, service):
        address = (http.base_url.host, http.base_url.port)
        with socket.create_connection(address) as connection:
            head = f"POST /v1/{path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            eventually(lambda: llm.core.stats().output_tokens > 3)
            llm.core.model.open.clear()
        eventually(lambda: service.generator._live == 0)
        llm.core.model.open.set()
        eventually(lambda: idle(llm))
        assert llm.core.stats().output_tokens < 2 * 200


def test_a_silent_stream_is_kept_alive(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.05)
    body = {"prompt": "x", "max_tokens": 3, "ignore_eos": True, "stream": True}
    with clients(llm) as (http, _):
        llm.core.model.open.clear()
        with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
            llm.core.model.open.set()
            told = [line for line in lines if line.startswith("data: ")]
        assert '"finish_reason": "length"' in told[-2] and told[-1] == "data: [DONE]"


def test_times_begin_when_the_request_has_come(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = llm.tokenizer.encode

    def slowly(*given: Any) -> list[int]:
        time.sleep(0.2)
        return encode(*given)

    monkeypatch.setattr(llm.tokenizer, "encode", slowly)
    with clients(llm) as (http, _):
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        told = http.get("/metrics").text
    for name in ("time_to_first_token", "request_queue_time", "e2e_request_latency"):
        assert float(re.search(rf"pared:{name}_seconds_sum (\S+)", told)[1]) >= 0.2


def test_pages_of_other_origins_may_ask_where_they_are_named(llm: LLM) -> None:
    app = create_app(service_of(llm, "tiny", Limits()), Keys(["secret"]), ["https://a.example"])

    async def preflight(origin: str) -> httpx.Response:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        headers["access-control-request-headers"] = "authorization"
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            return await http.options("/v1/completions", headers=headers)

    taken = asyncio.run(preflight("https://a.example"))  # browsers send no key with it
    assert taken.status_code == 200 and taken.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in asyncio.run(preflight("https://b.example")).headers


def test_a_failed_step_and_a_dead_engine(llm: LLM) -> None:
    with clients(llm) as (http, service):
        llm.core.model.broken = True
        for _ in range(2):
            failed = http.post("/v1/completions", json={"prompt": "x"})
            assert (failed.status_code, failed.json()["error"]["code"]) == (503, "engine_failed")
            assert "the device is gone" in failed.json()["error"]["message"]
            assert http.get("/health").status_code == 200
        stream = http.post("/v1/completions", json={"prompt": "x", "stream": True})
        assert "the device is gone" in stream.text and stream.text.endswith("data: [DONE]\n\n")
        eventually(lambda: not service.generator.alive)
        dead = http.post("/v1/completions", json={"prompt": "x"})
        assert (dead.status_code, dead.json()["error"]["code"]) == (503, "engine_stopped")
        for path in ("/health", "/ready"):
            response = http.get(path)
            assert response.status_code == 503
            assert "has died" in response.json()["error"]["message"]


def test_draining(llm: LLM) -> None:
    with clients(llm) as (http, service):
        llm.core.model.open.clear()
        answers: list[httpx.Response] = []
        thread = ask(http, ENDLESS, answers)
        eventually(lambda: service.generator._live == 1)
        draining = asyncio.run_coroutine_threadsafe(drain(service), service.generator._loop)
        eventually(lambda: not service.ready)
        assert http.get("/health").status_code == 200
        for response in (http.get("/ready"), http.post("/v1/completions", json={"prompt": "x"})):
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
        assert not draining.done()
        llm.core.model.open.set()
        draining.result(60)
        thread.join()
        assert answers[0].json()["usage"]["completion_tokens"] == 200


def test_a_body_that_does_not_come(llm: LLM) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"
    with (
        clients(llm, body_s=0.2) as (http, _),
        socket.create_connection((http.base_url.host, http.base_url.port)) as connection,
    ):
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_the_log_tells_what_happened_and_not_what_was_said(llm: LLM) -> None:
    lines: list[dict] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonLines().format(record)))

    logger, handler = logging.getLogger("pared.server"), Kept()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with clients(llm, keys=("secret-key",)) as (http, _):
            http.headers["authorization"] = "Bearer secret-key"
            body = {"prompt": "private words", "max_tokens": 3}
            http.post("/v1/completions", json=body, headers={"x-request-id": "abc"})
            http.post("/v1/completions", json={**body, "stream": True})
            http.post("/v1/completions", json={**body, "nonsense": "private words"})
            http.get("/health")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 200, 400]
    whole, streamed, _ = requests
    assert (whole["request_id"], whole["path"], whole["prompt_tokens"]) == ("abc", "/v1/completions", 13)
    assert (
        (whole["output_tokens"], whole["finish"]) == (streamed["output_tokens"], streamed["finish"]) == (3, ["length"])
    )
    assert "private" not in json.dumps(lines) and "secret" not in json.dumps(lines)
