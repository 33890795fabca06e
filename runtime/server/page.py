"""The page at /: what the server does right now, the model's conversion, and a box to try it.

One document without anything from elsewhere. Its policy names the hashes of its own script and style, so that nothing
else runs, whatever a model or a folder says. web/ holds its three parts.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import HTMLResponse, JSONResponse, Response

from ... import __version__
from .document import answers, refuses
from .reply_schema import ServerInfo
from .service import Service

_WEB = Path(__file__).resolve().parent / "web"
SHOWN = ("stock", "disk_bytes", "kinds", "total", "provenance", "sleep")
"""Of what `pared inspect` knows: not the path."""


def page() -> HTMLResponse:
    """The document, which a browser may show and nobody may frame."""
    css, js = ((_WEB / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    html = (_WEB / "page.html").read_text(encoding="utf-8").replace("{{css}}", css).replace("{{js}}", js)
    policy = (
        f"default-src 'none'; script-src {_hash(js)}; style-src {_hash(css)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return HTMLResponse(html, headers=headers | {"X-Content-Type-Options": "nosniff"})


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["about"])

    @router.get("/", include_in_schema=False)
    async def root() -> Response:
        """For browsers."""
        return page()

    @router.get("/info", responses=answers(ServerInfo) | refuses(401))
    async def info() -> Response:
        """The model, how it was converted, and what is stored of it: what `pared inspect` shows."""
        return JSONResponse(about(service))

    return router


def about(service: Service) -> dict[str, Any]:
    """What /info tells. folder: None where the server does not know the folder that its model came from."""
    does = [name for name in ("generator", "embedder") if getattr(service, name) is not None]
    told: dict[str, Any] = {"model": service.name, "version": __version__, "does": does}
    if service.generator is not None:
        llm = service.llm
        told |= {"context": llm.context, "chat": bool(llm.tokenizer.hf.chat_template)}
        told |= {"device": str(llm.model.device), "dtype": str(llm.model.dtype).removeprefix("torch.")}
    folder = service.folder
    return told | {"family": folder.get("family"), "folder": {name: folder[name] for name in SHOWN} if folder else None}
