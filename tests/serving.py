"""A server for tests: the real thing on a free port, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from pared.runtime.server.app import create_app
from pared.runtime.server.limits import Keys
from pared.runtime.server.run import Server
from pared.runtime.server.service import Service


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(service: Service, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """The address of a running server, ready; it is ended, and its end waited for, when the block is left."""
    port = free_port()
    app = create_app(service, Keys(keys))
    server = Server(uvicorn.Config(app, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


def eventually(true: Callable[[], bool]) -> None:
    """Wait until something has become so."""
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until, "it does not come true"
        time.sleep(0.005)
