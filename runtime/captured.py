"""Decode steps captured in CUDA graphs: one launch a step, whatever the decoder is made of.

A graph is captured for a bucket of sequences and plays any number of them that is not larger: the rows that are left
over decode token 0 of a sequence of one, whose key and value go to the reserved KV block. Inputs are static and filled
before each play; shapes, and so all grids, depend on the bucket and on the width of its block tables alone.
"""

from __future__ import annotations

from typing import Any

import torch

from .batch import Batch
from .cache import RESERVED_BLOCK, KVCache
from .model import Decoder

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Dense where a row costs time, as tiles of 16 and 64 rows do; larger steps run as they are."""

ROWS = ("tokens", "positions", "rope_lens", "slots", "context_lens")


def bucket(size: int) -> int:
    """The smallest bucket that holds `size` sequences, which is at most the last."""
    return next(rows for rows in BUCKETS if rows >= size)


def padding(rows: int, width: int, device: torch.device) -> Batch:
    """A batch of `rows` sequences of one token each, none of which anyone waits for; tables of `width` blocks."""

    def each(value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    return Batch(
        tokens=each(0),
        positions=each(0),
        rope_lens=each(1),
        slots=each(RESERVED_BLOCK),
        query_starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
        context_lens=each(1, torch.int32),
        block_tables=torch.full((rows, width), RESERVED_BLOCK, dtype=torch.int32, device=device),
        logit_rows=torch.arange(rows, device=device),
        max_query=1,
    )


def fill(static: Batch, batch: Batch, live: int) -> int:
    """Copy a decode batch into the first rows of `static`, of which `live` held the last one; how many live now.

    Rows that fall free keep their tokens and tables: a context of one reads neither.
    """
    size, width = batch.block_tables.shape
    for name in ROWS:
        getattr(static, name)[:size].copy_(getattr(batch, name))
    static.block_tables[:size, :width].copy_(batch.block_tables)
    if size < live:
        static.slots[size:live].fill_(RESERVED_BLOCK)
        static.context_lens[size:live].fill_(1)
    return size


class CapturedStep:
    """One graph of `rows` sequences over static inputs. Its logits are overwritten by the next play of any graph."""

    def __init__(self, decoder: Decoder, batch: Batch, cache: KVCache, width: int, pool: Any) -> None:
        """Captures; `pool`: a handle of the memory that graphs share, since they never play at the same time."""
        self.table_width = width
        self._static = padding(bucket(len(batch.tokens)), width, decoder.device)
        self._live = fill(self._static, batch, 0)
        side = torch.cuda.Stream(decoder.device)
        side.wait_stream(torch.cuda.current_stream(decoder.device))
        with torch.cuda.stream(side):  # kernels are compiled and libraries set up, which no graph can hold
            decoder(self._static, cache)
        torch.cuda.current_stream(decoder.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._logits = decoder(self._static, cache)

    def replay(self, batch: Batch) -> torch.Tensor:
        """The logits of a batch that the bucket holds."""
        self._live = fill(self._static, batch, self._live)
        self._graph.replay()
        return self._logits[: self._live]
