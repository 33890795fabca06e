"""Two ways to send an answer, one of which ends with the client: as events while it grows, or whole."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from .refusals import Refused, refusal

T = TypeVar("T")
PING_S = 15.0
"""A stream that is silent for so long, in the queue or while a long prompt is read, looks dead to proxies."""
PING = {"type": "http.response.body", "body": b": ping\n\n", "more_body": True}
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Server-sent events: one object each, an error object if something fails on the way, then [DONE]; and comments
    where nothing else is sent.

    close: called when the stream has ended, for whatever reason.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Callable[[], None]) -> None:
        super().__init__(_lines(events), media_type="text/event-stream", headers=HEADERS)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pinging: asyncio.Task[None] | None = None

        async def tell(message: Message) -> None:
            nonlocal pinging
            if pinging is None:
                pinging = asyncio.create_task(self._ping(send))
            elif not message.get("more_body"):
                pinging.cancel()
            self._told = time.monotonic()
            await send(message)

        try:
            await super().__call__(scope, receive, tell)
        finally:
            if pinging is not None:
                pinging.cancel()
            self._close()

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_S)
            if time.monotonic() - self._told >= PING_S:
                await send(PING)


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
    except Exception as error:
        yield f"data: {json.dumps(refusal(error).body)}\n\n"
    yield "data: [DONE]\n\n"


async def while_connected(request: Request, work: Awaitable[T], close: Callable[[], None]) -> T:
    """The result of `work`, which is cancelled when the client leaves; `close` is called in any case."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(499, "the client has left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        close()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
