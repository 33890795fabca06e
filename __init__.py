"""pared: a runtime for language models that have been pared down.

    from pared import LLM, SamplingParams
    for out in LLM("a-compact-folder").generate(["Once upon a time"], SamplingParams(max_tokens=32)):
        print(out.text)

The names below are imported when they are first used, so that `import pared` loads no torch. Whoever uses
them before torch is loaded gets OpenMP threads that suit shared CPUs (kernels/dispatch.py, `set_threads`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from .convert import convert
    from .runtime.embed import Embedder
    from .runtime.llm import LLM
    from .runtime.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Embedder", "SamplingParams", "__version__", "convert", "errors"]

_HOMES = {
    "Embedder": ".runtime.embed",
    "LLM": ".runtime.llm",
    "SamplingParams": ".runtime.params",
    "convert": ".convert",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "torch" not in sys.modules:
        import_module(".kernels.dispatch", __name__).set_threads()
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Root(ModuleType):
    """Keeps `pared.convert` the function: Python binds a submodule to its package under its own name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root
