"""What launch sizes are tried on: a format at one shape and M, and attention; on meta tensors, or cold on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..kernels import attention, formats
from ..kernels.unit import Prepared
from . import samples
from .paths import prepared_for_gpu

DTYPE = torch.bfloat16
CHECKED_ROWS = 2  # of y against references, which take long


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

    def on_gpu(self, rotated: int) -> Ground:
        """The same on this GPU, with `rotated` bytes of copies."""
        ...


@dataclass(frozen=True)
class FormatOnRows:
    """A format at [n, k] and M = m; where it has several forms, the last on a GPU and all for the compiler."""

    name: str
    n: int
    k: int
    m: int

    def __str__(self) -> str:
        return f"{self.name} {self.n}x{self.k} at {self.m}"

    def on_meta(self) -> list[Callable[[], Any]]:
        module = formats.by_name(self.name)
        x = torch.empty(self.m, self.k, dtype=DTYPE, device="meta")
        units = samples.units(module, self.n, self.k, DTYPE).values()
        return [samples.applying(module, prepared_for_gpu(module, module.encode(unit)), x) for unit in units]

    def on_gpu(self, rotated: int) -> Ground:
        module = formats.by_name(self.name)
        packed = module.encode(list(samples.units(module, self.n, self.k, DTYPE).values())[-1])
        x, size = samples.random((self.m, self.k), DTYPE) * self.k**0.5, module.traffic(packed, self.m).weight_bytes
        few = x[:CHECKED_ROWS]
        own, truth = (module.reference(given, packed, samples.PATH) for given in (few, few.float()))
        there = x.to("cuda")

        def call(prepared: Prepared) -> torch.Tensor:
            y: torch.Tensor = module.apply(there, prepared, samples.PATH)
            return y

        def copied() -> Prepared:
            tensors = {role: tensor.clone() for role, tensor in packed.tensors.items()}
            prepared: Prepared = module.prepare(dataclasses.replace(packed, tensors=tensors), "cuda")
            return prepared

        return Ground(call, [copied() for _ in range(max(1, rotated // size))], size, own, truth)


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

    def on_gpu(self, rotated: int) -> Ground:
        q, pools, tables = self._tensors("cpu")
        size = 2 * pools[0].nbytes
        weights = [tuple(pool.to("cuda", copy=True) for pool in pools) for _ in range(max(1, rotated // size))]
        call = partial(self._call, q.to("cuda"), tuple(table.to("cuda") for table in tables))
        own, truth = (
            self._torchs(q.to(dtype), *(pool.to(dtype) for pool in pools)) for dtype in (DTYPE, torch.float32)
        )
        return Ground(call, weights, size, own, truth)

    def _tensors(self, device: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
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

    def _call(self, q: torch.Tensor, tables: tuple[torch.Tensor, ...], pools: tuple[torch.Tensor, ...]) -> torch.Tensor:
        k_pool, v_pool = pools
        starts, lengths, blocks = tables
        scale = samples.HEAD_DIM**-0.5
        return attention.paged_attention(q, k_pool, v_pool, starts, lengths, blocks, self.rows, scale, 0)

    def _torchs(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor) -> torch.Tensor:
        """torch's own attention, in the dtype of q."""

        def heads(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.reshape(self.sequences, -1, *tensor.shape[-2:]).transpose(1, 2)

        own = heads(q), heads(k_pool), heads(v_pool)
        y = F.scaled_dot_product_attention(*own, is_causal=self.rows > 1, enable_gqa=True)
        return y.transpose(1, 2).reshape(q.shape)
