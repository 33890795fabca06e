"""A client of any OpenAI endpoint, with a watch: one streamed answer, and when each piece of it came."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2 as httpx

from ..errors import EndpointError

CONNECT_S = 30.0


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how. url: of the server, with its /v1 or without. model: "" until the server is asked.

    chat: through /chat/completions. options: fields of every request. seconds: time for a piece of an answer to come.
    """

    url: str
    model: str = ""
    chat: bool = False
    key: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 600.0

    @property
    def base(self) -> str:
        """The address under which OpenAI's paths are."""
        bare = self.url.rstrip("/")
        return bare if bare.endswith("/v1") else f"{bare}/v1"

    @property
    def path(self) -> str:
        return "/chat/completions" if self.chat else "/completions"

    def body(self, prompt: str) -> dict[str, Any]:
        """The request for one prompt."""
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        return {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **asked, **self.options}


@dataclass
class Answer:
    """One request as its client saw it; seconds, `sent` by time.perf_counter.

    ttft: until the first piece that held text (or that ended an answer without any). itls: between two such pieces.
    latency: until the last piece. Tokens are the server's count, or its pieces where it tells none. error: "" for an
    answer that came whole.
    """

    sent: float
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds of a token after the first; None where there is none."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@asynccontextmanager
async def connected(endpoint: Endpoint) -> AsyncIterator[tuple[httpx.AsyncClient, Endpoint]]:
    """A client of as many connections as it needs, and the endpoint with a model that it serves.

    Raises EndpointError when the server is not there, refuses, or is not one.
    """
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    times = httpx.Timeout(endpoint.seconds, connect=CONNECT_S)
    try:
        client = httpx.AsyncClient(base_url=endpoint.base, headers=headers, limits=limits, timeout=times)
    except (httpx.InvalidURL, UnicodeEncodeError, ValueError) as error:
        raise EndpointError(f"{endpoint.url} cannot be asked: {error}") from error
    async with client:
        yield client, replace(endpoint, model=endpoint.model or await _first_model(client, endpoint))


async def _first_model(client: httpx.AsyncClient, endpoint: Endpoint) -> str:
    try:
        response = await client.get("/models")
        if response.status_code != 200:
            raise EndpointError(f"{endpoint.base}/models {_refusal(response)}")
        return str(response.json()["data"][0]["id"])
    except httpx.TransportError as error:
        raise EndpointError(
            f"{endpoint.base}: {_told(error)}; is the server running, and is this its address?"
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise EndpointError(f"{endpoint.base}/models lists no model as OpenAI's API does; give --model") from error


async def ask(client: httpx.AsyncClient, endpoint: Endpoint, prompt: str) -> Answer:
    """Ask, and watch the answer to its end. Whatever goes wrong is told in `Answer.error`."""
    answer = Answer(time.perf_counter())
    try:
        await _watch(client, endpoint, prompt, answer)
    except EndpointError as error:
        answer.error = str(error)
    except httpx.TransportError as error:
        answer.error = f"{_told(error)}, after {answer.output_tokens} pieces"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        answer.error = f"an event is not as OpenAI's API has it: {error!r}"
    return answer


async def _watch(client: httpx.AsyncClient, endpoint: Endpoint, prompt: str, answer: Answer) -> None:
    usage: dict[str, Any] = {}
    last, done = answer.sent, False
    async with client.sse(endpoint.path, method="POST", json=endpoint.body(prompt)) as events:
        if events.response.status_code != 200:
            await events.response.aread()
            raise EndpointError(_refusal(events.response))
        async for event in events:
            now = time.perf_counter()
            if event.data == "[DONE]":  # read on: a stream read to its end gives its connection back
                done = True
                continue
            told = json.loads(event.data)
            if told.get("error"):
                raise EndpointError(f"broke off: {told['error'].get('message')}")
            usage = told.get("usage") or usage
            if not told["choices"]:
                continue
            answer.latency = now - answer.sent
            if _text(told["choices"][0]) or (told["choices"][0].get("finish_reason") and not answer.ttft):
                if answer.ttft:
                    answer.itls.append(now - last)
                answer.ttft = answer.ttft or now - answer.sent
                answer.output_tokens += 1
                last = now
    if not done:
        raise EndpointError(f"broke off: the stream ended without [DONE], after {answer.output_tokens} pieces")
    if not answer.ttft:
        raise EndpointError("the stream held no answer")
    answer.output_tokens = usage.get("completion_tokens", answer.output_tokens)
    answer.prompt_tokens = usage.get("prompt_tokens", 0)


def _text(choice: dict[str, Any]) -> str:
    """What is new of an answer; models that think may say it under names of their own."""
    delta = choice.get("delta", {})
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def _refusal(response: httpx.Response) -> str:
    """The status, and the message of OpenAI's error object where there is one."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text[:200]
    return f"answered {response.status_code}: {message}"


def _told(error: httpx.TransportError) -> str:
    return f"{type(error).__name__} {error}".strip()
