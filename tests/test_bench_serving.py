"""`pared bench serve`: what it counts and times, against our own server and against scripted ones."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest

from pared.bench.client import Answer, Endpoint
from pared.bench.serving import Load, lines, summary, sweep
from pared.errors import BadParameter, EndpointError
from pared.runtime.llm import LLM
from pared.runtime.server.limits import Limits
from pared.runtime.server.opening import service_of
from pared.tests.serving import free_port, serving
from pared.tests.test_cli import Run
from pared.tests.test_cli import pared as pared  # a fixture
from pared.tests.test_readme import COMMANDS

WORDS = "one two three four five six seven eight nine ten " * 40
EXACT = {"max_tokens": 6, "ignore_eos": True}


# --- counting ------------------------------------------------------------------------------------


def test_a_summary_is_what_vllm_would_say() -> None:
    answers = [
        Answer(0.0, ttft=0.1, itls=[0.2, 0.4], latency=0.7, prompt_tokens=5, output_tokens=4),
        Answer(1.0, ttft=0.3, itls=[], latency=0.3, prompt_tokens=7, output_tokens=1),
        Answer(2.0, ttft=0.2, latency=9.0, output_tokens=3, error="broke off"),
    ]
    row = summary(answers, duration=2.0, rate=4.0, goals={"ttft": 200, "e2el": 1000})
    assert (row["completed"], row["failed"], row["errors"]) == (2, 1, ["broke off"])
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (12, 5)
    assert (row["request_throughput"], row["request_goodput"]) == (1.0, 0.5)
    assert (row["output_throughput"], row["total_token_throughput"]) == (2.5, 8.5)
    assert row["mean_ttft_ms"] == pytest.approx(200) and row["std_ttft_ms"] == pytest.approx(100)
    assert row["median_tpot_ms"] == row["p99_tpot_ms"] == pytest.approx(200)  # (0.7 - 0.1) / 3, of one answer
    assert row["p50_itl_ms"] == pytest.approx(300) and row["p90_itl_ms"] == pytest.approx(380)
    assert row["p50_e2el_ms"] == pytest.approx(500)
    assert summary(answers, 2.0, 4.0, {"tpot": 250})["request_goodput"] == 1.0
    assert summary(answers, 2.0, 4.0, {"tpot": 150})["request_goodput"] == 0.5  # one token: no tpot to miss


def test_nothing_that_came_is_nothing_timed() -> None:
    row = summary([Answer(0.0, error="no")], 1.0, float("inf"))
    assert row["request_rate"] == "inf" and row["completed"] == 0 and row["request_goodput"] is None
    assert row["p99_ttft_ms"] is row["mean_tpot_ms"] is row["p50_itl_ms"] is None
    ((rate, came, failed, *_, ttft, tpot, itl, e2el),) = lines({"rates": [row], "goodput": {}})
    assert (rate, came, failed) == ("inf", "1", "1") and {ttft, tpot, itl, e2el} == {"- / - / -"}


def test_arrivals_are_poissons_and_repeat() -> None:
    load = Load(WORDS, (2.0, 8.0, float("inf")), requests=4000, words=3, seed=5)
    slow, fast = load.arrivals(2.0), load.arrivals(8.0)
    assert slow == load.arrivals(2.0) and np.allclose(slow, np.asarray(fast) * 4)
    assert slow[-1] == pytest.approx(4000 / 2.0)  # stretched to the rate exactly, as vLLM does
    gaps = np.diff(slow)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential
    assert load.arrivals(float("inf")) == [0.0] * 4000
    assert load.prompts(0) == load.prompts(0) != load.prompts(1)
    assert all(len(prompt.split()) == 3 and prompt in WORDS for prompt in load.prompts(1))
    assert load.prompts(0) != Load(WORDS, (1.0,), 4000, 3, seed=6).prompts(0)
    assert Load("only these words", (1.0,), 2, 100).prompts(0) == ["only these words"] * 2


@pytest.mark.parametrize(
    "wrong", [{"rates": ()}, {"rates": (0.0,)}, {"requests": 0}, {"words": 0}, {"text": " "}, {"goals": {"itl": 1.0}}]
)
def test_a_load_that_makes_no_sense(wrong: dict) -> None:
    with pytest.raises(BadParameter):
        Load(**{"text": WORDS, "rates": (1.0,), **wrong})


# --- our own server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tiny_folder: Path) -> Iterator[str]:
    llm = LLM(tiny_folder, device="cpu", max_batch=4, chunk=64, num_blocks=200, page=8, prefix_caching=True)
    with serving(service_of(llm, "tiny", Limits()), keys=("secret",)) as address:
        yield address


def counters(address: str) -> dict[str, float]:
    text = httpx.get(f"{address}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^pared:(\w+) (\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_it_counts_what_the_server_counts(address: str, chat: bool) -> None:
    before = counters(address)
    load = Load(WORDS, (50.0, float("inf")), requests=8, words=9, goals={"e2el": 1e9})
    result = sweep(Endpoint(f"{address}/v1/", chat=chat, key="secret", options=EXACT), load)
    after = counters(address)
    assert (result["model_id"], result["base_url"]) == ("tiny", f"{address}/v1")
    assert [row["request_rate"] for row in result["rates"]] == [50.0, "inf"]
    for row in result["rates"]:
        assert (row["completed"], row["failed"], row["total_output_tokens"]) == (8, 0, 48)
        assert 0 < row["p50_ttft_ms"] <= row["p50_e2el_ms"] <= row["p99_e2el_ms"] <= 1000 * row["duration"]
        assert row["request_goodput"] == row["request_throughput"] == pytest.approx(8 / row["duration"])
    counted = {
        name: after[f"{name}_tokens_total"] - before[f"{name}_tokens_total"] for name in ("prompt", "generation")
    }
    assert counted["generation"] == 2 * 48 + 6  # and the first request, which is not counted
    assert counted["prompt"] > sum(row["total_input_tokens"] for row in result["rates"]) > 0


def test_the_command(pared: Run, address: str, tmp_path: Path) -> None:
    text, out, plot = (tmp_path / name for name in ("text.txt", "result.json", "sweep.png"))
    text.write_text(WORDS, encoding="utf-8")
    few = ("--requests", 4, "--rates", "20,inf", "--max-tokens", 5, "--ignore-eos", "--prompt-words", 8)
    asked = ("bench", "serve", address, "--text", text, "--api-key", "secret", *few)
    status, table, err = pared(*asked, "--goodput", "ttft:60000", "--goodput", "tpot:0", "--out", out, "--plot", plot)
    assert status == 0, err
    assert "TTFT p50/p90/p99, ms" in table and "good: TTFT <= 60000 ms, TPOT <= 0 ms" in table
    told = json.loads(out.read_text())
    assert told["goodput"] == {"ttft": 60000, "tpot": 0}
    assert [(row["completed"], row["request_goodput"]) for row in told["rates"]] == [(4, 0.0)] * 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert json.loads(pared(*asked, "--json", "--chat")[1])["endpoint_type"] == "openai-chat"


def test_the_readmes_example(pared: Run, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = [command for command in COMMANDS if command[1:3] == ["bench", "serve"]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    Path("book.txt").write_text(WORDS, encoding="utf-8")
    few = ("--requests", 2, "--prompt-words", 8, "--max-tokens", 3)
    status, table, err = pared(*shown[1:3], address, *shown[4:], *few)
    assert status == 0, err
    assert "good/s" in table


@pytest.mark.parametrize(
    "options, told",
    [
        (("--api-key", "wrong"), "401"),
        (("--api-key", "secret", "--model", "nothing"), "nothing is not served here"),
        (("--api-key", "secret", "--max-tokens", 0, "--chat"), "400"),
        (("--rates", "fast"), "0.5,1,2,inf"),
        (("--goodput", "ttft"), "ttft:500"),
        (("--goodput", "speed:3"), "ttft, tpot, e2el"),
    ],
)
def test_what_is_refused_is_one_message(pared: Run, address: str, tmp_path: Path, options: tuple, told: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(WORDS, encoding="utf-8")
    status, _, err = pared("bench", "serve", address, "--text", text, *options)
    assert status == 1
    assert told in re.sub(r"[\s│]+", " ", err)


# --- servers that fail ---------------------------------------------------------------------------


def head(kind: str = "text/event-stream", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode()


def event(text: str, finish: str | None = None) -> bytes:
    return f"data: {json.dumps({'choices': [{'text': text, 'finish_reason': finish}]})}\n\n".encode()


END = b"data: [DONE]\n\n"
WHOLE = [head(), event("a"), event("b"), event("", "length"), END]


@contextmanager
def scripted(*answers: list[bytes | float]) -> Iterator[Endpoint]:
    """A server that answers each request by the next script, the last one for ever: bytes to send, seconds to wait."""
    served = iter(answers)
    lock, port = threading.Lock(), free_port()
    listening = socket.create_server(("127.0.0.1", port), backlog=64)

    def one(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(30)
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(65536)
            head, _, body = head.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            while length is not None and len(body) < int(length[1]):
                body += connection.recv(65536)
            with lock:
                script = next(served, answers[-1])
            for part in script:
                time.sleep(part) if isinstance(part, float) else connection.sendall(part)

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield Endpoint(f"http://127.0.0.1:{port}", model="m")
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


ONE = Load(WORDS, (float("inf"),), requests=3, words=2)


def test_times_are_the_clients_own() -> None:
    slow = [head(), 0.2, event("a"), 0.1, event(""), 0.1, event("b"), event("", "stop"), END]
    with scripted(slow) as endpoint:
        (row,) = sweep(endpoint, ONE)["rates"]
    assert row["p50_ttft_ms"] >= 200
    assert row["p50_itl_ms"] >= 200  # what holds no text is no piece
    assert row["p50_e2el_ms"] >= 400
    assert row["total_output_tokens"] == 6  # pieces, as this server tells no usage


def test_an_answer_without_text_came_when_it_ended() -> None:
    with scripted([head(), event(""), 0.1, event("", "stop"), END]) as endpoint:
        (row,) = sweep(endpoint, ONE)["rates"]
    assert row["completed"] == 3 and row["p50_ttft_ms"] == row["p50_e2el_ms"] >= 100


@pytest.mark.parametrize(
    "script, told",
    [
        ([], "RemoteProtocolError"),
        ([head(), event("a")], "ended without"),
        ([head()[:-2] + b"Transfer-Encoding: chunked\r\n\r\n5\r\ndata:"], "RemoteProtocolError"),
        ([head(), event("a"), b'data: {"error": {"message": "the engine failed"}}\n\n', END], "the engine failed"),
        ([head(), b"data: nonsense\n\n"], "not as OpenAI"),
        ([head(), b"data: [1]\n\n"], "not as OpenAI"),
        ([head(), END], "no answer"),
        ([head("text/html"), b"<html>"], "text/event-stream"),
        ([head("text/plain", "502 Bad Gateway"), b"upstream is gone"], "answered 502: upstream is gone"),
    ],
)
def test_what_breaks_off_or_is_no_endpoint_is_told(script: list[bytes | float], told: str) -> None:
    with scripted(script) as endpoint, pytest.raises(EndpointError, match=told):
        sweep(endpoint, ONE)


def test_what_fails_on_the_way_is_counted() -> None:
    refused = [head("text/plain", "429 Too Many Requests"), b"full"]
    with scripted(WHOLE, WHOLE, refused) as endpoint:
        result = sweep(endpoint, ONE)
    (row,) = result["rates"]
    assert (row["completed"], row["failed"], row["errors"]) == (1, 2, ["answered 429: full"] * 2)
    with scripted(WHOLE, refused) as endpoint, pytest.raises(EndpointError, match=r"answered no request.*429"):
        sweep(endpoint, ONE)


def test_where_nobody_listens() -> None:
    with pytest.raises(EndpointError, match="is the server running"):
        sweep(Endpoint(f"http://127.0.0.1:{free_port()}"), ONE)
    with pytest.raises(EndpointError, match=r"cannot be asked|nowhere"):
        sweep(Endpoint("nowhere"), ONE)
    with scripted([head("application/json"), b"{}"]) as endpoint, pytest.raises(EndpointError, match="give --model"):
        sweep(Endpoint(endpoint.url), ONE)
