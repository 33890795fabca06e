"""What the server says of itself, and its tokenizer's own endpoints."""

from __future__ import annotations

import time
from typing import Any

import torch
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from ... import __version__
from ...kernels import dispatch, formats
from .document import TEXT, answers, refuses
from .generate import conversation
from .refusals import Refused
from .reply_schema import Detokenized, Health, Model, ModelList, Readiness, TokenizerInfo, TokenList, Version
from .schema import DetokenizeRequest, TokenizeChat, TokenizeText
from .service import Service


def state_routes(service: Service) -> APIRouter:
    """For whoever watches the server; they ask without a key."""
    router = APIRouter(tags=["state"])

    @router.get("/health", responses=answers(Health) | refuses(503))
    async def health() -> Response:
        """200 while what runs the model lives, 503 when it has died."""
        for part in service.parts:
            if not part.alive:
                raise Refused(503, str(part.error or "the engine has not been started"), "engine_stopped")
        return JSONResponse({"status": "ok"})

    @router.get("/ready", responses=answers(Readiness) | refuses(503))
    async def ready() -> Response:
        """200 while requests are taken: not before the model is warm, nor when the server is about to end."""
        await health()
        if not service.ready:
            raise Refused(503, "the server is warming up or about to end", "not_ready")
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", responses=TEXT | refuses(), response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["about"], responses=refuses(401))
    born = int(time.time())

    def card() -> dict[str, Any]:
        does = [name for name in ("generator", "embedder") if getattr(service, name) is not None]
        fixed = {"object": "model", "created": born, "owned_by": "pared", "root": service.name, "parent": None}
        return {"id": service.name, **fixed, "max_model_len": service.longest, "does": does}

    @router.get("/version", responses=answers(Version))
    async def version() -> Response:
        """pared's version, those of its formats, and the kernels that run here."""
        stored = {module.NAME: module.VERSION for module in formats.FORMATS}
        told: dict[str, Any] = {"version": __version__, "torch": torch.__version__, "formats": stored}
        if service.decoder is not None:
            paths = dispatch.describe(service.decoder.device, service.decoder.dtype)
            told["kernels"] = [dict(zip(("op", "path", "why"), row, strict=True)) for row in paths]
        return JSONResponse(told)

    @router.get("/v1/models", responses=answers(ModelList))
    async def models() -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [card()]})

    @router.get("/v1/models/{name:path}", responses=answers(Model) | refuses(404))
    async def model(name: str) -> Response:
        """The one model, by its name."""
        service.check_model(name)
        return JSONResponse(card())

    return router


def tokenizer_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["tokenizer"], responses=refuses(401))

    @router.post("/tokenize", responses=answers(TokenList) | refuses(400, 404))
    async def tokenize(body: TokenizeText | TokenizeChat) -> Response:
        """Token ids of a text, or of a conversation."""
        service.check_model(body.model)
        tokenizer, beside = service.tokenizer, service.parts[0].beside
        if isinstance(body, TokenizeText):
            tokens = await beside(tokenizer.encode, body.prompt, body.add_special_tokens)
        else:
            tokens = await beside(conversation, service, body)
        pieces = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]
        more = {"token_strs": pieces if body.return_token_strs else None}
        return JSONResponse({"count": len(tokens), "max_model_len": service.longest, "tokens": tokens, **more})

    @router.post("/detokenize", responses=answers(Detokenized) | refuses(400, 404))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.check_model(body.model)
        text = await service.parts[0].beside(service.tokenizer.decode, body.tokens, False)
        return JSONResponse({"prompt": text})

    @router.get("/tokenizer_info", responses=answers(TokenizerInfo))
    async def tokenizer_info() -> Response:
        """What a client needs to build prompts: special tokens and the chat template."""
        hf = service.tokenizer.hf
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: getattr(hf, name) for name in names} | {
            f"{name}_id": getattr(hf, f"{name}_id") for name in names
        }
        more = {"vocab_size": len(hf), "max_model_len": service.longest, "chat_template": hf.chat_template}
        return JSONResponse({"tokenizer_class": type(hf).__name__, **special, **more})

    return router
