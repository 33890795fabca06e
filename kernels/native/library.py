"""Find the native CPU library of this machine, or build it."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import build
from .bindings import Library

BESIDE_THE_SOURCES = build.SOURCES  # where setup.py leaves the library

_recording: contextvars.ContextVar[Library | None] = contextvars.ContextVar("pared_recording", default=None)


def load() -> Library | None:
    """The native kernels of this machine, built at the first call when need be; None says `why_not`."""
    return _recording.get() or _outcome()[0]


@contextlib.contextmanager
def recording(instead: Library) -> Iterator[None]:
    """Within this block `load` gives `instead` (tape.py)."""
    token = _recording.set(instead)
    try:
        yield
    finally:
        _recording.reset(token)


def why_not() -> str:
    """Why `load` gave None; empty when it did not."""
    return _outcome()[1]


@functools.cache
def _outcome() -> tuple[Library | None, str]:
    return find_or_build()


def find_or_build() -> tuple[Library | None, str]:
    """The library beside the sources, then the cached one, then a new one; or None and the reason. Raises nothing."""
    name = build.file_name()
    for folder in (BESIDE_THE_SOURCES, cache_folder()):
        found = _open(folder / name)
        if found:
            return found, ""
    try:
        return _build(), ""
    except (build.BuildFailed, OSError) as error:
        return None, f"no native CPU kernels: {error}"


def cache_folder() -> Path:
    """Where a library that was built at first use is kept: $PARED_CACHE, else ~/.cache/pared."""
    chosen = os.environ.get("PARED_CACHE")
    return Path(chosen or os.path.expanduser("~/.cache/pared"))


def _open(path: Path) -> Library | None:
    """The library at `path`, or None when it is missing, damaged, or made for another system."""
    if not build.intact(path):
        return None
    try:
        return Library(path)
    except (OSError, AttributeError):
        return None


def _build() -> Library:
    """Build into the cache folder, or for this process alone where that cannot be written."""
    try:
        return Library(build.compile_library(cache_folder()))
    except OSError:
        with tempfile.TemporaryDirectory(prefix="pared-") as folder:
            return Library(build.compile_library(folder))  # stays loaded when its file is gone
