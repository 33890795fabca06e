"""`pared serve` as a process: its options, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from pared.cli import app, main
from pared.tests.serving import free_port

TESTS = Path(__file__).resolve().parent


@contextmanager
def process(folder: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server that is ready, and its address; killed at the end if it still runs."""
    port = free_port()
    command = [sys.executable, "-m", "pared.cli", "serve", str(folder), "--device", "cpu", *options]
    variables = {**os.environ, "PARED_PORT": str(port), **environment}
    started = subprocess.Popen(command, cwd=TESTS, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{port}"
        while not ready(address):
            assert started.poll() is None, started.stderr.read()
            time.sleep(0.05)
        yield started, address
    finally:
        started.kill()
        started.communicate()


def ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_killed_it_starts_again_and_told_to_end_it_finishes_what_runs(tiny_folder: Path) -> None:
    with process(tiny_folder, "--max-batch", "2") as (server, address):
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "x"}).status_code == 200
        server.send_signal(signal.SIGKILL)
        server.wait(60)
    with process(tiny_folder, "--name", "tiny", PARED_MAX_N="2", PARED_DRAIN_SECONDS="60") as (server, address):
        refused = httpx.post(f"{address}/v1/completions", json={"prompt": "x", "n": 3}).json()
        assert "at most 2" in refused["error"]["message"]
        answers: list[httpx.Response] = []
        body = {"prompt": "x", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 2}

        def ask() -> None:
            answers.append(httpx.post(f"{address}/v1/completions", json=body, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        while "pared:num_requests_running 0.0" in httpx.get(f"{address}/metrics").text:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        log = server.communicate(timeout=100)[1]
        for thread in threads:
            thread.join()
        assert server.returncode == 0
        whole = [answer for answer in answers if answer.status_code == 200]
        assert whole and {answer.status_code for answer in answers} <= {200, 503}
        for answer in whole:
            assert answer.text.count('"finish_reason": "length"') == 2 and answer.text.endswith("[DONE]\n\n")
        events = [json.loads(line) for line in log.splitlines()]
        assert {"serving", "draining", "request"} <= {event["event"] for event in events}


def test_every_option_is_a_variable_and_shows_its_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        app(["serve", "--help"])
    printed = capsys.readouterr().out
    options = re.findall(r"^ +--([\w-]+)(.*(?:\n {20,}.*)*)", printed, re.MULTILINE)
    assert len(options) > 15
    for name, text in options:
        if name != "help":
            assert f"env var: PARED_{name.upper().replace('-', '_')}" in re.sub(r"\s+", " ", text), name


def test_a_wrong_folder_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pared", "serve", str(tmp_path), "--port", str(free_port())])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert "config.json" in capsys.readouterr().err
