"""`pared serve` as a process: TLS, a unix socket, and what it says of files and places that are none."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from pared.tests.serving import eventually, free_port

TESTS = Path(__file__).resolve().parent
BODY = {"prompt": "x", "max_tokens": 5}


@contextmanager
def server(folder: Path, *options: object) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "pared.cli", "serve", str(folder), "--device", "cpu", *map(str, options)]
    wide = {**os.environ, "COLUMNS": "400"}  # a message is not broken at the end of a line
    started = subprocess.Popen(command, cwd=TESTS, env=wide, stderr=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def wait_for(client: httpx.Client, started: subprocess.Popen) -> None:
    def ready() -> bool:
        assert started.poll() is None, started.stderr.read()
        try:
            return client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    eventually(ready, pause=0.05)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate and key of 127.0.0.1."""
    home, issued = tmp_path_factory.mktemp("tls"), authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(home / "certificate.pem")
    issued.private_key_pem.write_to_path(home / "key.pem")
    return home / "certificate.pem", home / "key.pem"


def test_tls(tiny_folder: Path, authority: trustme.CA, files: tuple[Path, Path]) -> None:
    port, trusting = free_port(), ssl.create_default_context()
    authority.configure_trust(trusting)
    with server(tiny_folder, "--port", port, "--certificate", files[0], "--private-key", files[1]) as started:
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusting) as client:
            wait_for(client, started)
            assert client.post("/v1/completions", json=BODY).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health")  # nobody is answered in the clear
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"https://127.0.0.1:{port}/health")


def test_a_unix_socket(tiny_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "pared.sock"
    with server(tiny_folder, "--socket", place) as started:
        eventually(lambda: place.exists() or started.poll() is not None, pause=0.05)
        with httpx.Client(base_url="http://pared", transport=httpx.HTTPTransport(uds=str(place))) as client:
            wait_for(client, started)
            assert client.post("/v1/completions", json=BODY).status_code == 200


def test_bindings_that_cannot_be_are_one_message(tiny_folder: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, key = files
    empty = tmp_path / "empty.pem"
    empty.touch()
    locked = tmp_path / "locked.pem"
    kept = serialization.load_pem_private_key(key.read_bytes(), None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    locked.write_bytes(kept.private_bytes(*form, serialization.BestAvailableEncryption(b"secret")))
    for options, named in (
        (("--certificate", tmp_path / "none.pem", "--private-key", key), "none.pem"),
        (("--private-key", key), "--certificate"),
        (("--certificate", empty, "--private-key", key), "empty.pem"),
        (("--certificate", certificate, "--private-key", locked), "locked.pem"),
        (("--socket", tmp_path / "nowhere" / "pared.sock"), "nowhere"),
        (("--certificate", certificate), "certificate.pem"),
    ):
        with server(tiny_folder, "--port", free_port(), *options) as started:
            _, said = started.communicate(timeout=60)
        assert started.returncode == 1, (options, said)
        assert named in said and "Traceback" not in said, (options, said)


def test_a_taken_port_is_one_message(tiny_folder: Path) -> None:
    port = free_port()
    with server(tiny_folder, "--port", port) as first, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        wait_for(client, first)
        with server(tiny_folder, "--port", port) as second:
            _, said = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"{port}" in said and "--port" in said and "Traceback" not in said
