"""Around every request, outermost first: its id and its line in the log, the key, the body's size and time.

Plain ASGI: what a client sends and when it leaves reaches the endpoints unchanged.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import Keys
from .refusals import Refused
from .tracing import Spans

OPEN = frozenset(("/", "/health", "/ready", "/metrics"))
"""Paths that need no key: load balancers and scrapers ask them, and the page is where a browser's user gives one."""
MOST_HEADERS = 256
_GOOD_ID = re.compile(r"[\w.:-]{1,64}")

log = logging.getLogger("pared.server")


class Traced:
    """Gives each request an id, the client's own where it sends one, and writes a line about it when it is over.

    Endpoints add what is worth a line to request.state.line; texts never are.
    """

    def __init__(self, app: ASGIApp, spans: Spans | None = None) -> None:
        self.app = app
        self.spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        line = {"request_id": id, "method": scope["method"], "path": scope["path"][:200], "status": 499}
        scope.setdefault("state", {}).update(id=id, line=line)
        begun = time.monotonic()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = id
                line["status"] = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, tell)
        finally:
            line["seconds"] = round(time.monotonic() - begun, 4)
            quiet = scope["path"] in OPEN and line["status"] == 200
            log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"line": line})
            if self.spans is not None and not quiet:
                self.spans.tell(Headers(scope=scope), line)


class Unmarked:
    """Takes the request's id off the reply: for behind a proxy that writes one of its own, known to `Traced`, on it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self.app(scope, receive, tell)


class Guarded:
    """Lets nobody pass without a key, where there are keys."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"] not in OPEN
        if guarded and not self.keys.admit(Headers(scope=scope).get("authorization", "")):
            refused = Refused(401, "send a known API key as 'Authorization: Bearer KEY'", "invalid_api_key")
            await refused.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)


class Bounded:
    """Takes a body in whole before anything is done about it; refuses what is too large, too slow, or all headers.

    request.state.arrived: when it was there, by time.monotonic.
    """

    def __init__(self, app: ASGIApp, body_bytes: int, body_s: float) -> None:
        self.app = app
        self.body_bytes = body_bytes
        self.body_s = body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if len(scope["headers"]) > MOST_HEADERS:
                raise Refused(431, f"at most {MOST_HEADERS} headers a request, got {len(scope['headers'])}")
            body = await asyncio.wait_for(self._body(receive), self.body_s)
        except asyncio.TimeoutError:
            await Refused(408, f"the body did not arrive within {self.body_s:g} s").response()(scope, receive, send)
            return
        except Refused as refused:
            await refused.response()(scope, receive, send)
            return
        if body is None:  # the client has left
            return
        scope.setdefault("state", {})["arrived"] = time.monotonic()
        told = False

        async def replay() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _body(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.body_bytes:
                raise Refused(413, f"the body is larger than {self.body_bytes} bytes", "payload_too_large")
            if not message.get("more_body", False):
                return bytes(body)
