"""POST /v1/completions and /v1/chat/completions: one stream of deltas, sent as it comes or folded."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ...errors import BadParameter, PromptTooLong
from ..llm import Request as Asked
from ..outputs import Delta, Output
from ..params import SamplingParams
from .document import refuses, streams
from .replies import ChatReply, CompletionReply, Frame, Json, usage
from .reply_schema import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from .sampling import chat_params, completion_params
from .schema import ChatRequest, CompletionRequest, Conversation
from .service import Service
from .sse import EventStream, while_connected

Reply = ChatReply | CompletionReply


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"], responses=refuses(400, 401, 404, 429, 503))

    @router.post("/v1/completions", responses=streams(Completion, CompletionChunk))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, or lists of token ids."""
        service.check_model(body.model)
        params = completion_params(body, service.llm.default_params, service.limits)
        prompts = _prompts(body.prompt)
        if len(prompts) > service.limits.prompts:
            raise BadParameter(f"at most {service.limits.prompts} prompts a request, got {len(prompts)}")
        last, special = body.truncate_prompt_tokens, body.add_special_tokens
        asked = [await _asked(service, prompt, params, last, special) for prompt in prompts]
        frame = _frame(service, "cmpl", request, body.return_token_ids)
        reply = CompletionReply(frame, body.logprobs is not None, body.echo)
        return await _answer(service, request, asked, reply, body)

    @router.post("/v1/chat/completions", responses=streams(ChatCompletion, ChatCompletionChunk))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation through the model's chat template."""
        service.check_model(body.model)
        params = chat_params(body, service.llm.default_params, service.limits)
        tokens = await service.engine.beside(conversation, service, body)
        asked = await _asked(service, tokens, params, body.truncate_prompt_tokens)
        reply = ChatReply(_frame(service, "chatcmpl", request, body.return_token_ids), body.logprobs)
        return await _answer(service, request, [asked], reply, body)

    return router


def conversation(service: Service, body: Conversation) -> list[int]:
    """Token ids of a conversation. Raises BadParameter for what is not the template's to decide."""
    tokenizer = service.tokenizer
    template = body.chat_template_kwargs or {}
    taken = set(inspect.signature(tokenizer.hf.apply_chat_template).parameters) & template.keys()
    if taken:
        raise BadParameter(f"chat_template_kwargs may not hold {', '.join(sorted(taken))}")
    switches = {name: getattr(body, name) for name in ("add_generation_prompt", "continue_final_message")}
    messages = [message.plain() for message in body.messages]
    return tokenizer.chat(messages, body.add_special_tokens, **switches, **template)


def _prompts(prompt: Any) -> list[str | list[int]]:
    alone = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if alone else list(prompt)


async def _asked(
    service: Service, prompt: str | list[int], params: SamplingParams, last: int | None, special: bool = False
) -> Asked:
    """last: tokens to keep of the prompt, None: all. special: put those tokens around a text."""
    whole = prompt
    if isinstance(prompt, str):
        whole = await service.engine.beside(service.llm.tokenizer.encode, prompt, special)
    tokens = whole if last is None else whole[-last:]
    most = service.limits.prompt_tokens
    if most is not None and len(tokens) > most:
        raise PromptTooLong(f"the prompt has {len(tokens)} tokens and this server takes {most}; shorten it")
    asked = await service.engine.request(list(tokens), params)  # type: ignore[arg-type]
    return replace(asked, text=prompt) if isinstance(prompt, str) and len(tokens) == len(whole) else asked


def _frame(service: Service, prefix: str, request: Request, token_ids: bool) -> Frame:
    return Frame(f"{prefix}-{request.state.id}", service.name, service.llm.tokenizer, token_ids)


async def _answer(
    service: Service, request: Request, asked: list[Asked], reply: Reply, body: CompletionRequest | ChatRequest
) -> Response:
    answers = service.engine.stream(asked)
    outputs = [one.output() for one in asked]
    deltas = service.metrics.watch(answers, outputs, request.state.line, request.state.arrived)
    if isinstance(body, CompletionRequest) and body.max_tokens == 0:
        deltas = _silent(deltas)
    if body.stream:
        told = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(deltas, outputs, reply, told), answers.close)
    await while_connected(request, _fold(deltas, outputs), answers.close)
    choices = [reply.choice(output, place, one) for place, output in enumerate(outputs) for one in output.choices]
    return JSONResponse(reply.frame.reply(reply.whole, choices, usage=usage(outputs)))


async def _fold(deltas: AsyncIterator[tuple[int, Delta]], outputs: list[Output]) -> None:
    async for place, delta in deltas:
        outputs[place].fold(delta)


async def _silent(deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    """Nothing but what is known about the prompt."""
    async for place, delta in deltas:
        yield place, replace(delta, text="", token_ids=(), logprobs=(), finish_reason="length", stop_reason=None)


async def _events(
    deltas: AsyncIterator[tuple[int, Delta]], outputs: list[Output], reply: Reply, with_usage: bool
) -> AsyncIterator[Json]:
    def piece(choice: Json) -> Json:
        return reply.frame.reply(reply.piece, [choice], **({"usage": None} if with_usage else {}))

    begun: set[tuple[int, int]] = set()
    async for place, delta in deltas:
        output = outputs[place]
        output.fold(delta)
        if (place, delta.index) not in begun:
            begun.add((place, delta.index))
            for choice in reply.opening(output, place, delta):
                yield piece(choice)
        if delta.text or delta.finish_reason or (reply.logprobs and delta.logprobs) or reply.frame.token_ids:
            yield piece(reply.delta(output, place, delta))
    if with_usage:
        yield reply.frame.reply(reply.piece, [], usage=usage(outputs))
