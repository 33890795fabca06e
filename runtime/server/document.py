"""The OpenAPI document: beside what each endpoint takes, what it answers and every way in which it may refuse."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from .reply_schema import ChatCompletionChunk, CompletionChunk, Reply

_WORDS = {
    400: "The request is not what this endpoint takes; `param` names the field.",
    401: "No known API key, where the server has keys.",
    404: "The model is not served here, or does something else.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too much waits already; ask again later.",
    431: "There are too many headers.",
    503: "The server is warming up or about to end, or the engine has failed.",
}
_LATER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    429: _LATER,
    503: _LATER,
}
_STREAMED = (
    "The answer; with `stream`, server-sent events whose data are pieces of it, an error object where something fails "
    "on the way, and `[DONE]` at the end."
)
_SCHEMAS = "#/components/schemas/"

TEXT: dict[int | str, dict[str, Any]] = {200: {"description": "The metrics.", "content": {"text/plain": {}}}}


class ErrorDetail(BaseModel):
    """What is wrong, for people in `message`, for programs in the others."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


def answers(model: type[Reply]) -> dict[int | str, dict[str, Any]]:
    """What a route answers."""
    return {200: {"model": model}}


def streams(whole: type[Reply], piece: type[Reply]) -> dict[int | str, dict[str, Any]]:
    """What a route answers at once, and the pieces of it that it sends as events, described as in OpenAPI 3.2."""
    told = [{"$ref": _SCHEMAS + model.__name__} for model in (piece, ErrorReply)]
    json = {"contentMediaType": "application/json", "contentSchema": {"anyOf": told}}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, json]}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {200: {"model": whole, "description": _STREAMED, "content": {"text/event-stream": {"schema": event}}}}


def refuses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How a route says no: with these, and where a request is too large or too slow."""
    each = sorted({408, 413, 431, *statuses})
    return {
        status: {"model": ErrorReply, "description": _WORDS[status], "headers": _HEADERS.get(status, {})}
        for status in each
    }


def install(app: FastAPI, keys: bool) -> None:
    """Have the document as the server behaves: no 422, as its own errors say more, and a key where it has `keys`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, keys: bool) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    parts = made["components"]
    for unused in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(unused, None)
    for piece in (CompletionChunk, ChatCompletionChunk):  # FastAPI knows those of whole answers
        schema = piece.model_json_schema(mode="serialization", ref_template=_SCHEMAS + "{model}")
        parts["schemas"] |= {**schema.pop("$defs"), piece.__name__: schema}
    if keys:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for operation in (each for path in made["paths"].values() for each in path.values()):
        operation["responses"].pop("422", None)
        if "401" in operation["responses"] and keys:
            operation["security"] = [{"key": []}]
    return made
