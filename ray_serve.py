"""The application that `pared deploy ray` names: what `pared serve` serves, behind Ray Serve, once for each replica."""

from __future__ import annotations

from typing import Any

from ray import serve

from .errors import EngineStopped
from .kernels.dispatch import set_threads
from .serve_cli import application as served


def _build() -> Any:
    """Called where a replica starts, before torch is imported there."""
    set_threads()
    app = served()
    from .runtime.server.middleware import Unmarked

    app.add_middleware(Unmarked)
    return app


@serve.deployment
@serve.ingress(_build)
class Replica:
    """Holds an engine of its own."""

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises. Raises EngineStopped."""
        for part in self.app.state.service.parts:  # type: ignore[attr-defined]
            if not part.alive:
                raise part.error or EngineStopped("the engine has not been started")


application = Replica.bind()  # type: ignore[attr-defined]
