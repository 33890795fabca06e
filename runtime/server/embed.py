"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import json
import time

import numpy as np
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from ...embedding import Text
from ...errors import BadParameter, PromptTooLong
from .document import answers, refuses
from .reply_schema import EmbeddingList
from .schema import EmbeddingRequest
from .service import Service
from .sse import while_connected


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["embed"], responses=refuses(400, 401, 404, 429, 503))

    @router.post("/v1/embeddings", responses=answers(EmbeddingList))
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Vectors of texts, or of lists of token ids."""
        service.check_model(body.model)
        texts = _texts(body, service.limits.texts)
        encoder = service.encoder
        work = encoder.embed(texts, body.prompt_name)
        vectors, tokens, cut = await while_connected(request, work, lambda: None)
        if any(cut) and not body.truncate:
            raise PromptTooLong(
                f"a text is {max(cut)} tokens too long for this model; shorten it, or send truncate: true"
            )
        vectors = encoder.encoder.finish(vectors, body.normalize, body.dimensions)
        request.state.line.update(texts=len(texts), prompt_tokens=sum(tokens))
        service.metrics.embedded(tokens, time.monotonic() - request.state.arrived)
        # beside the event loop: thousands of long vectors take seconds to write
        reply = await run_in_threadpool(_reply, service.name, vectors.numpy(), sum(tokens), body.encoding_format)
        return Response(reply, media_type="application/json")

    return router


def _texts(body: EmbeddingRequest, most: int) -> list[Text]:
    alone = isinstance(body.input, str) or isinstance(body.input[0], int)
    texts: list[Text] = [body.input] if alone else list(body.input)  # type: ignore[list-item, arg-type]
    if len(texts) > most:
        raise BadParameter(f"at most {most} texts a request, got {len(texts)}")
    if body.prompt_name is not None and not isinstance(texts[0], str):
        raise BadParameter("prompt_name stands before texts; before token ids put the prompt's own")
    return texts


def _reply(model: str, vectors: np.ndarray, tokens: int, form: str) -> str:
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, form)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json.dumps({"object": "list", "data": data, "model": model, "usage": usage})


def _encoded(vector: np.ndarray, form: str) -> str | list[float]:
    """base64: of little-endian fp32, as the OpenAI client asks for."""
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
