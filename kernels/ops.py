"""One door to torch.library: an op is a schema, a CPU function, a GPU function and a fake.

`torch.library.Library` and not `torch.library.custom_op`: a CPU decode step makes 200 calls and more, and each cost
1.7 us above the bare function here, 3.8 us through custom_op (9 us outside of inference mode).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .dispatch import interpreting

_LIBRARY = torch.library.Library("pared", "FRAGMENT")


def register(schema: str, *, cpu: Callable[..., Any], gpu: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `pared::<schema>` and return it; CPU tensors take `gpu` when Triton's interpreter is on."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, gpu if interpreting() else cpu, "CPU")
    _LIBRARY.impl(name, gpu, "CUDA")
    torch.library.register_fake(f"pared::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.pared, name).default


@functools.cache
def triton_kernels(family: str) -> Any:
    """The module `triton_<family>` of this folder, or None where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f".triton_{family}", __package__)


def takes_triton(x: torch.Tensor) -> bool:
    """Whether Triton's kernels run on x: on a GPU, or anywhere in the interpreter."""
    return (x.device.type == "cuda" or interpreting()) and triton_kernels("fused") is not None
