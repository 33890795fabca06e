"""Every way to say no, as OpenAI's error object: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...errors import EngineBusy, EngineError, EngineStopped, ParedError, PromptTooLong, RequestError

if TYPE_CHECKING:
    from .metrics import Metrics

UNSUPPORTED = frozenset(
    [
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "parallel_tool_calls",
        "audio",
        "modalities",
        "prediction",
        "reasoning_effort",
        "store",
        "metadata",
        "service_tier",
        "best_of",
        "suffix",
        "web_search_options",
        "use_beam_search",
        "length_penalty",
        "bad_words",
        "allowed_token_ids",
        "prompt_embeds",
        "priority",
        "cache_salt",
        "verbosity",
        "prompt_cache_key",
        "safety_identifier",
    ]
)
"""Fields that other servers know: they are refused with a word about it, not as misspelt."""

log = logging.getLogger("pared.server")


class Refused(Exception):
    """A request that is answered by an error. `param` names the field that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self._more = dict(headers or {})
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        extra = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}
        return extra.get(self.status, {}) | self._more

    def response(self) -> Response:
        """ASCII, as the message may hold what a client sent."""
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")


def refusal(error: Exception) -> Refused:
    """What a client is told about an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, EngineBusy):
        return Refused(429, str(error), "queue_full")
    if isinstance(error, EngineStopped):
        return Refused(503, str(error), "engine_stopped")
    if isinstance(error, PromptTooLong):
        return Refused(400, str(error), "context_length_exceeded", "prompt")
    if isinstance(error, RequestError):
        return Refused(400, str(error))
    if isinstance(error, EngineError):
        return Refused(503, str(error), "engine_failed")
    if isinstance(error, HTTPException):
        return Refused(error.status_code, f"{error.detail}", headers=error.headers)
    log.error("a request failed", exc_info=error)
    return Refused(500, "the server failed to answer this request; its log says why", "internal_error")


def invalid(error: RequestValidationError, known: frozenset[str]) -> Refused:
    """A body that is not what its endpoint takes, by the first field that is wrong. `known`: the endpoint's fields."""
    found = error.errors()[0]
    path = [str(part) for part in found["loc"][1:]]
    name = path[0] if path else None
    if found["type"] == "json_invalid":
        return Refused(400, f"the body is no JSON: {found['ctx']['error']} at character {found['loc'][-1]}")
    if found["type"] == "extra_forbidden" and len(path) == 1 and name is not None:
        return Refused(400, _unknown(name, known), "unknown_field", name)
    return Refused(400, f"{'.'.join(path) or 'the body'}: {found['msg']}", "invalid_value", name)


def _unknown(name: str, known: frozenset[str]) -> str:
    if name in UNSUPPORTED:
        return f"{name} is not supported by this server; leave it out"
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"unknown field {name[:100]}; " + (
        f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
    )


def install(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error of the app with an error object, and count requests that were not taken."""

    async def told(request: Request, error: Exception) -> Response:
        refused = refusal(error)
        if isinstance(error, (EngineBusy, EngineStopped)):
            metrics.rejected(refused.code or "")
        return refused.response()

    async def told_invalid(request: Request, error: RequestValidationError) -> Response:
        route = request.scope.get("route")
        field = getattr(route, "body_field", None)
        model = getattr(getattr(field, "field_info", None), "annotation", None)
        return invalid(error, frozenset(getattr(model, "model_fields", ()))).response()

    app.add_exception_handler(RequestValidationError, told_invalid)  # type: ignore[arg-type]
    for kind in (HTTPException, Refused, ParedError, Exception):
        app.add_exception_handler(kind, told)
