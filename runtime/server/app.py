"""The application: a Service behind its endpoints, from warming up to the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ... import __version__
from ..params import SamplingParams
from . import about, document, embed, generate, page, refusals
from .limits import Keys
from .middleware import Bounded, Guarded, Traced
from .service import Service


def create_app(service: Service, keys: Keys, origins: Sequence[str] = ()) -> FastAPI:
    """The service as an ASGI application, whose lifespan starts and stops the engines.

    origins: whose pages may ask from a browser.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for part in service.parts:
            part.start()
        try:
            await warm_up(service)
            service.ready = True
            yield
        finally:
            service.ready = False
            for part in service.parts:
                await part.stop()
            if service.spans is not None:
                await asyncio.to_thread(service.spans.close)

    about_us = "A compressed model behind OpenAI's API."
    app = FastAPI(
        title="pared", version=__version__, description=about_us, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = service
    refusals.install(app, service.metrics)
    app.include_router(page.routes(service))
    app.include_router(about.state_routes(service))
    app.include_router(about.routes(service))
    app.include_router(about.tokenizer_routes(service))
    app.include_router(generate.routes(service))
    app.include_router(embed.routes(service))
    document.install(app, len(keys) > 0)
    app.add_middleware(Bounded, body_bytes=service.limits.body_bytes, body_s=service.limits.body_s)
    app.add_middleware(Guarded, keys=keys)
    if origins:
        told = ["x-request-id", "retry-after"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=told
        )
    app.add_middleware(Traced, spans=service.spans)  # the last one added is the outermost
    return app


async def warm_up(service: Service) -> None:
    """Let kernels be compiled and steps be recorded before anyone waits for them."""
    if service.generator is not None:
        engine = service.generator
        tokens = [next(token for token in range(engine.llm.model.spec.vocab) if token not in engine.llm.core.eos)] * 8
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        await engine.stream([await engine.request(tokens, params)]).outputs()
    if service.embedder is not None:
        await service.embedder.embed([[0] * 8])


async def drain(service: Service) -> None:
    """Take nothing more, and wait for what was taken, for as long as the limits say."""
    service.ready = False
    for part in service.parts:
        part.refuse("the server is about to end; ask another one, or again later")
    waiting = asyncio.gather(*(part.drained() for part in service.parts))
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(waiting, service.limits.drain_s)
