"""HTTP/1.1 as uvicorn speaks it, with an end to its patience: who does not say what he asks is hung up on."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """Closes a connection on which no request begins, or its headers do not end, within the time for a body; and one
    on which a body goes on that long after it was answered.

    uvicorn itself waits for ever, on a new connection and as soon as one byte more has come.
    """

    _hangs_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._stop_waiting()  # the headers are complete, and not answered
        elif self._hangs_up is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        seconds = self.config.app.state.service.limits.body_s  # type: ignore[union-attr]
        self._hangs_up = self.loop.call_later(seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._hangs_up is not None:
            self._hangs_up.cancel()
            self._hangs_up = None
