"""Two ways to send an answer, one of which ends with the client: as events while it grows, or whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .refusals import Refused, refusal

T = TypeVar("T")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Server-sent events: one object each, an error object if something fails on the way, then [DONE].

    close: called when the stream has ended, for whatever reason.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Callable[[], None]) -> None:
        super().__init__(_lines(events), media_type="text/event-stream", headers=HEADERS)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


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
