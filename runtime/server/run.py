"""The server as a process: uvicorn, told to end by a signal, ends when what it was asked is answered."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, getaddrinfo
from socket import socket as Socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ...errors import BadParameter
from .app import create_app, drain
from .limits import Keys, read_keys
from .logs import configure
from .protocol import PatientProtocol
from .service import Service

log = logging.getLogger("pared.server")


@dataclass(frozen=True)
class Binding:
    """Where to listen, and to whom. socket: a unix socket in place of host and port. certificate, private_key: files
    for TLS. origins: whose pages may ask from a browser (CORS). Raises BadParameter for files that are of no use."""

    host: str = "127.0.0.1"
    port: int = 8000
    socket: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    root_path: str = ""
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.socket and not self.socket.parent.is_dir():
            raise BadParameter(f"--socket: {self.socket.parent} is no folder; make it first")
        if self.private_key and not self.certificate:
            raise BadParameter("--private-key is of use with its --certificate only")
        if self.certificate:
            try:
                given = (self.certificate, self.private_key)
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(*given, password="")  # without one, a locked key asks the terminal
            except OSError as error:  # SSLError is one
                files = " and ".join(str(file) for file in (self.certificate, self.private_key) if file)
                raise BadParameter(
                    f"{files} cannot be used for TLS: {error}; PEM files without a passphrase are needed"
                ) from None

    @property
    def where(self) -> str:
        return str(self.socket) if self.socket else f"{self.host}:{self.port}"

    @contextmanager
    def taken(self) -> Iterator[list[Socket] | None]:
        """While open, host and port are ours: who cannot have them is told before a model is loaded.

        Nobody is let in before the server listens. None for a unix socket. Raises BadParameter.
        """
        if self.socket:
            yield None
            return
        try:
            family, kind, protocol, _, address = getaddrinfo(self.host, self.port, type=SOCK_STREAM)[0]
            own = Socket(family, kind, protocol)
            own.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            own.bind(address)
        except OSError as error:
            said = f"cannot listen at {self.where}: {error.strerror}; choose another --port or --host"
            raise BadParameter(said) from None
        with own:
            yield [own]


class Server(uvicorn.Server):
    """Drains before it ends; a second signal ends it at once."""

    _draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None or not self.started:
            self.should_exit = self.force_exit = True
            return
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        service: Service = self.config.app.state.service  # type: ignore[union-attr]
        log.info("draining", extra={"line": {"seconds_at_most": service.limits.drain_s}})
        await drain(service)
        self.should_exit = True


def serve(
    service: Service, binding: Binding, sockets: list[Socket] | None, key_file: Path | None, log_level: str
) -> None:
    """Serve until a signal comes. sockets: of `binding.taken()`."""
    app = application(service, binding.origins, key_file, log_level, binding.where)
    Server(configuration(app, binding)).run(sockets)


def application(
    service: Service, origins: Sequence[str], key_file: Path | None, log_level: str, where: str | None = None
) -> FastAPI:
    """The application with its keys, and the log that it writes. where: it listens, if that is known."""
    configure(log_level)
    keys = Keys(read_keys(key_file))
    line = {"model": service.name, "at": where, "keys": len(keys), "limits": asdict(service.limits)}
    if service.generator is not None:  # what a request gets that asks for nothing else
        line["sampling"] = asdict(service.llm.default_params)
    log.info("serving", extra={"line": line})
    return create_app(service, keys, origins)


def configuration(app: FastAPI, binding: Binding) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        host=binding.host,
        port=binding.port,
        uds=str(binding.socket) if binding.socket else None,
        ssl_certfile=binding.certificate,
        ssl_keyfile=binding.private_key,
        root_path=binding.root_path,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
