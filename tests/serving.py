"""What tests of the server share: the server itself, and waiting for what it does on its own."""

from __future__ import annotations

import time
from collections.abc import Callable

from pared.bench.hosting import free_port, serving

__all__ = ["eventually", "free_port", "serving"]


def eventually(true: Callable[[], bool], seconds: float = 60, pause: float = 0.005) -> None:
    """Wait until something has become so."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it does not come true"
        time.sleep(pause)
