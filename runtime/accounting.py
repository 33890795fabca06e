"""What one decode step reads: a spy on the ops of a step, run on meta tensors, so that it costs nothing.

For a memory-bound step bytes are time, so this is a performance test that needs no GPU. Only tensors
that the ops really receive are counted, in their prepared layout, padding included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .batch import Batch
from .cache import KVCache
from .loader import load
from .model import Decoder

_GATHERS = {torch.ops.aten.index.Tensor, torch.ops.aten.embedding.default}
"""Ops that read as many bytes of a weight as they return, not all of it."""


class WeightSpy(TorchDispatchMode):
    """Counts the bytes of `weights` that each op receives: `read[op name]`."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()
        self._weights = {id(weight): weight for weight in weights}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            if id(tensor) in self._weights:
                self.read[func.name()] += (result if func in _GATHERS else tensor).nbytes
        return result


def decode_traffic(path: str | Path, dtype: torch.dtype | None = None, int8_head: bool = False) -> Counter[str]:
    """Bytes of weights that decoding one token of the folder's model reads, by op; the values add up to all."""
    return step_traffic(load(path, "meta", dtype, int8_head))


def step_traffic(decoder: Decoder) -> Counter[str]:
    """The same of a decoder on the meta device."""
    spy = WeightSpy(list(_tensors(decoder.weights)))
    with spy:
        decoder(*_one_token(decoder))
    return spy.read


def weight_memory(decoder: Decoder) -> int:
    """Bytes of memory behind a decoder's weights, each stretch of it once, whoever shares it."""
    storages = [tensor.untyped_storage() for tensor in _tensors(decoder.weights)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def dense_memory(decoder: Decoder) -> int:
    """Bytes of a decoder's weights if they lay dense, each number in the decoder's dtype."""
    spec = decoder.spec
    absent = spec.names.head if decoder.weights.head is None else None
    linears = sum(linear.n * (linear.k + linear.bias) for path, linear in spec.linears().items() if path != absent)
    return decoder.dtype.itemsize * (linears + sum(math.prod(shape) for shape in spec.plain().values()))


def _one_token(decoder: Decoder) -> tuple[Batch, KVCache]:
    spec = decoder.spec

    def long(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device="meta")

    def short(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="meta")

    batch = Batch(long(1), long(1), long(1), long(1), short(2), short(1), short(1, 1), long(1), max_query=1)
    heads = [layer.kv_heads for layer in spec.layers]
    return batch, KVCache(heads, spec.head_dim, 2, 16, decoder.dtype, torch.device("meta"))


def _tensors(node: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a tree of dataclasses, tuples and lists."""
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, (tuple, list)):
        for part in node:
            yield from _tensors(part)
    elif is_dataclass(node):
        for part in fields(node):
            yield from _tensors(getattr(node, part.name))
