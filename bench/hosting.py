"""A server to be measured or tested: the real thing on a free port, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..runtime.server.app import create_app
from ..runtime.server.limits import Keys
from ..runtime.server.run import Binding, Server, configuration
from ..runtime.server.service import Service


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(service: Service, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """The address of a running server, ready; it is ended, and its end waited for, when the block is left."""
    port = free_port()
    server = Server(configuration(create_app(service, Keys(keys)), Binding(port=port)))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start; its log says why")
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        if thread.is_alive():
            raise RuntimeError("the server does not end")
