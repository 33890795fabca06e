"""The server as a process: uvicorn, told to end by a signal, ends when what it was asked is answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .app import create_app, drain
from .limits import Keys, read_keys
from .logs import configure
from .protocol import PatientProtocol
from .service import Service

log = logging.getLogger("pared.server")


@dataclass(frozen=True)
class Binding:
    """Where to listen, and to whom. socket: a unix socket in place of host and port. certificate, private_key: files
    for TLS. origins: whose pages may ask from a browser (CORS)."""

    host: str = "127.0.0.1"
    port: int = 8000
    socket: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    root_path: str = ""
    origins: tuple[str, ...] = ()


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


def serve(service: Service, binding: Binding, key_file: Path | None, log_level: str) -> None:
    """Serve until a signal comes."""
    where = str(binding.socket) if binding.socket else f"{binding.host}:{binding.port}"
    Server(configuration(application(service, binding.origins, key_file, log_level, where), binding)).run()


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
