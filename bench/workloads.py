"""What launch sizes are tried on: a format at one shape and M, alone or with what stands around it, and attention.

Each is compiled on meta tensors, or timed cold on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..kernels import attention, decode, formats, fused
from ..kernels.around import reference
from ..kernels.unit import Packed, Prepared, Unit
from . import samples
from .paths import prepared_for_gpu

DTYPE = torch.bfloat16
CHECKED_ROWS = 2  # of y against references, which take long

Tensors = tuple[torch.Tensor, ...]
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Ground:
    """A workload on a GPU: `call` on any of `weights`, copies of `size` bytes; own and truth of its first rows."""

    call: Callable[[Any], torch.Tensor]
    weights: Sequence[Any]
    size: int
    own: torch.Tensor
    truth: torch.Tensor


class Workload(Protocol):
    """Something that a launch size can be tried on."""

    def on_meta(self) -> list[Callable[[], Any]]:
        """Calls whose launches are to be compiled."""
        ...

    def on(self, device: str, rotated: int) -> Ground:
        """The same on a device, with `rotated` bytes of copies."""
        ...


@dataclass(frozen=True)
class FormatOnRows:
    """A format at [n, k] and M = m; of several forms the compiler gets all, a device the last.

    around: what stands around it, one of samples.AROUNDS, or nothing; gate and up have n outputs together.
    """

    name: str
    n: int
    k: int
    m: int
    around: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.n}x{self.k} at {self.m}" + (f", {self.around}" if self.around else "")

    def on_meta(self) -> list[Callable[[], Any]]:
        x = torch.empty(self.m, self.k, dtype=DTYPE, device="meta")
        laid_out = [prepared_for_gpu(self._module, self._module.encode(unit)) for unit in self._units()]
        if self.around:
            return [samples.arounds(self._module, prepared, x)[self.around] for prepared in laid_out]
        return [samples.applying(self._module, prepared, x) for prepared in laid_out]

    def on(self, device: str, rotated: int) -> Ground:
        packed = self._module.encode(self._units()[-1])
        x, size = (
            samples.random((self.m, self.k), DTYPE) * self.k**0.5,
            self._module.traffic(packed, self.m).weight_bytes,
        )
        copies = [self._copied(packed, device) for _ in range(max(1, rotated // (size * self._parts)))]
        own, truth = (self._reference(x[:CHECKED_ROWS].to(dtype), packed) for dtype in (DTYPE, torch.float32))
        return Ground(self._call(x.to(device)), copies, size * self._parts, own, truth)

    @property
    def _module(self) -> ModuleType:
        return formats.by_name(self.name)

    @property
    def _parts(self) -> int:
        return 2 if self.around == samples.GATED else 1

    def _units(self) -> list[Unit]:
        return list(samples.units(self._module, self.n // self._parts, self.k, DTYPE).values())

    def _copied(self, packed: Packed, device: str) -> Prepared:
        tensors = {role: tensor.clone() for role, tensor in packed.tensors.items()}
        prepared: Prepared = self._module.prepare(dataclasses.replace(packed, tensors=tensors), device)
        if self.around != samples.GATED:
            return prepared
        stacked = samples.gated(self._module, prepared)
        assert stacked is not None
        return stacked

    def _call(self, x: torch.Tensor) -> Callable[[Prepared], torch.Tensor]:
        if not self.around:
            return lambda prepared: self._module.apply(x, prepared, samples.PATH)
        around = samples.around(self.around, x, self.n // self._parts)
        return lambda prepared: self._module.apply_around(x, prepared, samples.PATH, around)

    def _reference(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        def linear(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self._module.reference(x, packed, samples.PATH)] * self._parts, dim=1)

        if not self.around:
            return linear(x)
        return reference(x, linear, samples.around(self.around, x, self.n // self._parts))


@dataclass(frozen=True)
class Attention:
    """So many sequences of `rows` new tokens each (one, or the whole context), at Llama-3-8B's heads."""

    sequences: int
    rows: int
    context: int

    def __str__(self) -> str:
        return f"attention of {self.sequences} x {self.rows} rows in {self.context}"

    def on_meta(self) -> list[Callable[[], Any]]:
        q, pools, tables = self._tensors("meta")
        return [partial(self._call, q, tables, pools)]

    def on(self, device: str, rotated: int) -> Ground:
        q, pools, tables = self._tensors("cpu")
        size = 2 * pools[0].nbytes
        weights = [_moved(pools, device) for _ in range(max(1, rotated // size))]
        call = partial(self._call, q.to(device), tuple(table.to(device) for table in tables))
        own, truth = (
            _attended(q.to(dtype), (pools[0].to(dtype), pools[1].to(dtype)), self.sequences)
            for dtype in (DTYPE, torch.float32)
        )
        return Ground(call, weights, size, own, truth)

    def _tensors(self, device: str) -> tuple[torch.Tensor, Pair, Tensors]:
        """q, the pools, and query_starts, context_lens and block_tables: every sequence has blocks of its own."""
        blocks = self.context // samples.PAGE
        shape = (self.sequences * blocks, samples.PAGE, samples.KV_HEADS, samples.HEAD_DIM)
        q = samples.random((self.sequences * self.rows, samples.HEADS, samples.HEAD_DIM), DTYPE)
        pool = samples.random(shape, DTYPE)
        starts = torch.arange(self.sequences + 1, dtype=torch.int32) * self.rows
        lengths = torch.full((self.sequences,), self.context, dtype=torch.int32)
        tables = torch.arange(self.sequences * blocks, dtype=torch.int32).view(self.sequences, blocks)
        return (
            q.to(device),
            (pool.to(device), pool.flip(0).to(device)),
            tuple(t.to(device) for t in (starts, lengths, tables)),
        )

    def _call(self, q: torch.Tensor, tables: Tensors, pools: Pair) -> torch.Tensor:
        k_pool, v_pool = pools
        starts, lengths, blocks = tables
        scale = samples.HEAD_DIM**-0.5
        return attention.paged_attention(q, k_pool, v_pool, starts, lengths, blocks, self.rows, scale, 0)


@dataclass(frozen=True)
class DecodeStep:
    """The attention of so many sequences that decode one token each, with its rotation and cache write."""

    sequences: int
    context: int

    def __str__(self) -> str:
        return f"decode step of {self.sequences} in {self.context}"

    def on_meta(self) -> list[Callable[[], Any]]:
        return [partial(self._call, *self._tensors("meta"))]

    def on(self, device: str, rotated: int) -> Ground:
        qkv, turn, where, pools = self._tensors("cpu")
        size = 2 * pools[0].nbytes
        own, truth = (self._torchs(dtype, qkv, turn, where[0], pools) for dtype in (DTYPE, torch.float32))
        weights = [_moved(pools, device) for _ in range(max(1, rotated // size))]
        call = partial(self._call, qkv.to(device), _moved(turn, device), tuple(t.to(device) for t in where))
        return Ground(call, weights, size, own, truth)

    def _tensors(self, device: str) -> tuple[torch.Tensor, Pair, Tensors, Pair]:
        """q|k|v; cosines and sines; slots, context_lens and block_tables; the pools."""
        _, pools, (_, lengths, tables) = Attention(self.sequences, 1, self.context)._tensors(device)
        qkv = samples.random((self.sequences, (samples.HEADS + 2 * samples.KV_HEADS) * samples.HEAD_DIM), DTYPE)
        angles = torch.arange(self.sequences * samples.HEAD_DIM // 2).view(self.sequences, -1).float()
        slots = (torch.arange(self.sequences) + 1) * self.context - 1
        turn = (angles.cos().to(device), angles.sin().to(device))
        return qkv.to(device), turn, (slots.to(device), lengths, tables), pools

    def _call(self, qkv: torch.Tensor, turn: Pair, where: Tensors, pools: Pair) -> torch.Tensor:
        slots, lengths, tables = where
        sizes = (samples.HEADS, samples.KV_HEADS, samples.HEAD_DIM)
        y = decode.decode(qkv, *turn, *pools, slots, lengths, tables, *sizes, None, 0.0, samples.HEAD_DIM**-0.5, 0)
        assert y is not None
        return y

    def _torchs(
        self, dtype: torch.dtype, qkv: torch.Tensor, turn: Pair, slots: torch.Tensor, pools: Pair
    ) -> torch.Tensor:
        """The same in separate steps, in `dtype`."""
        written = pools[0].to(dtype, copy=True), pools[1].to(dtype, copy=True)
        q = fused.rotary_cache_reference(qkv.to(dtype), *turn, *written, slots, samples.HEADS)
        return _attended(q, written, self.sequences)


def _moved(pair: Pair, device: str) -> Pair:
    """Copies on `device`."""
    return pair[0].to(device, copy=True), pair[1].to(device, copy=True)


def _attended(q: torch.Tensor, pools: Pair, sequences: int) -> torch.Tensor:
    """torch's own attention, in the dtype of q, over pools that hold one sequence after the other."""

    def heads(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(sequences, -1, *tensor.shape[-2:]).transpose(1, 2)

    own = heads(q), heads(pools[0]), heads(pools[1])
    y = F.scaled_dot_product_attention(*own, is_causal=len(q) > sequences, enable_gqa=True)
    return y.transpose(1, 2).reshape(q.shape)
