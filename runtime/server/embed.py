"""POST /v1/embeddings."""

from __future__ import annotations

import base64

import torch
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ...errors import BadParameter, PromptTooLong
from ..async_embedder import Text
from .schema import EmbeddingRequest
from .service import Service
from .sse import while_connected


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["embed"])

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Vectors of texts, or of lists of token ids."""
        service.check_model(body.model)
        encoder = service.encoder
        texts = _texts(body)
        most = service.limits.texts
        if len(texts) > most:
            raise BadParameter(f"at most {most} texts a request, got {len(texts)}")
        work = encoder.embed(texts, body.prompt_name)
        vectors, tokens, cut = await while_connected(request, work, lambda: None)
        if any(cut) and not body.truncate:
            raise PromptTooLong(
                f"a text is {max(cut)} tokens too long for this model; shorten it, or send truncate: true"
            )
        vectors = encoder.encoder.finish(vectors, body.normalize, body.dimensions)
        request.state.line.update(texts=len(texts), prompt_tokens=sum(tokens))
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}
        return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})

    return router


def _texts(body: EmbeddingRequest) -> list[Text]:
    alone = isinstance(body.input, str) or isinstance(body.input[0], int)
    return [body.input] if alone else list(body.input)  # type: ignore[list-item, arg-type]


def _encoded(vector: torch.Tensor, form: str) -> str | list[float]:
    """base64: of little-endian fp32, as the OpenAI client asks for."""
    values = vector.float().cpu().numpy()
    return values.tolist() if form == "float" else base64.b64encode(values.astype("<f4").tobytes()).decode()
