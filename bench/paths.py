"""Which kernels an op reaches: watched while it runs, or sent to its GPU launcher without a GPU."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import ops
from ..kernels.dispatch import interpreting
from ..kernels.unit import Packed, Prepared

NAMESPACE = "pared"
ROOM = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "view", "slice", "t", "unsqueeze"}
COPIES = {"copy_", "set_"}
MAKES_ROOM = ROOM | COPIES
"""What surrounds a kernel: memory for the result, views, and what Triton's interpreter copies. The rest computes."""


def _keys(kind: str) -> Any:
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, {"cpu": "CPU", "cuda": "CUDA"}.get(kind, "Meta")))


class PathSpy(TorchDispatchMode):
    """Notes for every op of ours that runs which path it took: `paths[op]` is triton, native or torch."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: dict[str, str] = {}
        self._within: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace != NAMESPACE:
            if self._within and name not in MAKES_ROOM:
                self.paths[self._within[-1]] = "torch"
            return func(*args, **(kwargs or {}))
        device = _first_tensor(args).device.type
        self.paths[name] = "triton" if device == "cuda" or interpreting() else "native"
        self._within.append(name)
        try:
            with self:  # so that what the op itself calls is seen as well
                return func.redispatch(_keys(device), *args, **(kwargs or {}))
        finally:
            self._within.pop()


class GpuLaunchers(TorchDispatchMode):
    """Ops of ours on meta tensors run what a GPU would run; inside `compile_only` their launches compile.

    ops: the names of those that ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self._asked = ops.takes_triton

    def __enter__(self) -> GpuLaunchers:
        ops.takes_triton = lambda x: True  # steps that a GPU takes as one are offered to it
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        ops.takes_triton = self._asked

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == NAMESPACE:
            self.ops.append(func._schema.name.split("::")[1])
            return func.redispatch(_keys("cuda"), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _CudaIsMeta(TorchFunctionMode):
    """What goes to "cuda" arrives on "meta"."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def there(value: Any) -> Any:
            if func is torch.device:  # a format asks what kind of device it is for
                return value
            return "meta" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value

        return func(*map(there, args), **{name: there(value) for name, value in (kwargs or {}).items()})


def prepared_for_gpu(module: ModuleType, packed: Packed) -> Prepared:
    """What `prepare` lays out for a GPU, padding included, as meta tensors: no GPU is needed."""
    with _CudaIsMeta():
        prepared: Prepared = module.prepare(packed, "cuda")
    tensors = tuple(None if tensor is None else tensor.to("meta") for tensor in prepared.tensors)
    return dataclasses.replace(prepared, tensors=tensors)


def _first_tensor(args: Any) -> torch.Tensor:
    for arg in args:
        found = _first_tensor(arg) if isinstance(arg, (list, tuple)) else arg
        if isinstance(found, torch.Tensor):
            return found
    raise TypeError(f"an op of ours without a tensor: {args}")
