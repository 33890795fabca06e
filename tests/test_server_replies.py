"""Whatever the server answers is what its OpenAPI document says, whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from pydantic import ValidationError

from pared.compact import open_folder
from pared.reports import folder_report
from pared.runtime.server import reply_schema as replies
from pared.runtime.server.limits import Limits
from pared.runtime.server.opening import Wanted, open_service
from pared.runtime.server.reply_schema import Reply
from pared.tests.serving import serving

TALK = [{"role": "user", "content": "What is that?"}]
MORE = {"n": 2, "temperature": 1, "seed": 3, "return_token_ids": True, "max_tokens": 6}
SCORED = {"logprobs": 2, "echo": True, "stop": ["a", "e"]}
CASES: list[tuple[str, dict[str, Any] | None, type[Reply]]] = [
    ("/health", None, replies.Health),
    ("/ready", None, replies.Readiness),
    ("/version", None, replies.Version),
    ("/info", None, replies.ServerInfo),
    ("/v1/models", None, replies.ModelList),
    ("/v1/models/tiny", None, replies.Model),
    ("/tokenizer_info", None, replies.TokenizerInfo),
    ("/tokenize", {"prompt": "x"}, replies.TokenList),
    ("/tokenize", {"messages": TALK, "return_token_strs": True}, replies.TokenList),
    ("/detokenize", {"tokens": [70, 71]}, replies.Detokenized),
    ("/v1/embeddings", {"input": ["x", "yz"]}, replies.EmbeddingList),
    ("/v1/embeddings", {"input": [70], "encoding_format": "base64"}, replies.EmbeddingList),
    ("/v1/completions", {"prompt": "x"}, replies.Completion),
    ("/v1/completions", {"prompt": ["x", "yz"], **MORE, **SCORED}, replies.Completion),
    ("/v1/completions", {"prompt": "x", "max_tokens": 0, **SCORED}, replies.Completion),
    ("/v1/completions", {"prompt": "x", "max_tokens": 6, "stop_token_ids": list(range(64))}, replies.Completion),
    ("/v1/chat/completions", {"messages": TALK}, replies.ChatCompletion),
    ("/v1/chat/completions", {"messages": TALK, **MORE, "logprobs": True, "top_logprobs": 2}, replies.ChatCompletion),
]
PIECES = {replies.Completion: replies.CompletionChunk, replies.ChatCompletion: replies.ChatCompletionChunk}


@pytest.fixture(scope="module")
def http(tiny_folder: Path) -> Iterator[httpx.Client]:
    wanted = Wanted(device="cpu", max_batch=4, chunk=64, kv_cache_bytes=2**20, pooling="mean")
    service = open_service(tiny_folder, "tiny", Limits(), wanted)
    with open_folder(tiny_folder) as folder:
        service.folder = folder_report(folder).as_json()
    with serving(service) as address, httpx.Client(base_url=address, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    return http.get("/openapi.json").json()


def promised(document: dict[str, Any], path: str, body: object) -> dict[str, Any]:
    """The schema that the document gives for a path's answer, by media type."""
    operation = document["paths"][path.replace("/tiny", "/{name}")]["get" if body is None else "post"]
    return {kind: told["schema"] for kind, told in operation["responses"]["200"]["content"].items()}


def named(model: type[Reply]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def events(text: str) -> list[str]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return lines


@pytest.mark.parametrize(("path", "body", "model"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_answers_are_as_the_document_says(
    http: httpx.Client, document: dict[str, Any], path: str, body: dict[str, Any] | None, model: type[Reply]
) -> None:
    answer = http.get(path) if body is None else http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    schemas = promised(document, path, body)
    assert schemas["application/json"] == named(model)
    model.model_validate_json(answer.content)
    if model in PIECES:
        piece = PIECES[model]
        end, data = schemas["text/event-stream"]["properties"]["data"]["anyOf"]
        assert end == {"const": "[DONE]"} and data["contentSchema"]["anyOf"][0] == named(piece)
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        for event in events(http.post(path, json=asked).text):
            piece.model_validate_json(event)


def test_every_schema_is_in_the_document(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    asked = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert asked == set(schemas) and len(asked) > 30
    for _, _, model in CASES:
        assert schemas[model.__name__]["additionalProperties"] is False


def test_a_field_that_is_not_promised_is_noticed(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x"}).json()
    with pytest.raises(ValidationError, match="Extra inputs"):
        replies.Completion.model_validate(answer | {"secret": 1})
    with pytest.raises(ValidationError, match="usage"):
        replies.Completion.model_validate({name: value for name, value in answer.items() if name != "usage"})
