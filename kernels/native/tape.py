"""Record the native calls that a computation makes, and play them again as one call.

The CPU's counterpart of a CUDA graph: no Python runs between two kernels, and one team of threads stays together for
all of them. A replay reads and writes the tensors of the recorded calls, with what these hold by then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from . import library
from .bindings import Library


class Tape:
    """The native calls that were made inside `with tape.record():`, in order. What plain torch did in between is not
    among them."""

    def __init__(self, native: Library) -> None:
        self._native = native
        self._handle: int | None = None
        self._kept: list[Any] = []  # the calls hold addresses: these tensors have to stay

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Run and record every native call of this thread; once only."""
        self._handle = self._native.calls.pared_tape_start()
        try:
            with library.recording(cast("Library", _Keeping(self._native, self._kept))):
                yield
        finally:
            self._native.calls.pared_tape_stop()

    def play(self) -> None:
        """Make the recorded calls again."""
        self._native.calls.pared_tape_play(self._handle, torch.get_num_threads())

    def __del__(self) -> None:
        if self._handle is not None:
            self._native.calls.pared_tape_free(self._handle)


class _Keeping:
    """A Library whose methods keep what they were given."""

    def __init__(self, native: Library, kept: list[Any]) -> None:
        self._native, self._kept = native, kept

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._native, name)
        return self._keeping(found) if callable(found) else found

    def _keeping(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._kept.append(arguments)
            return method(*arguments)

        return call
