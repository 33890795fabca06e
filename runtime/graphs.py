"""Decode steps that were recorded once and are played again: no Python between two kernels.

    1st step of a size   runs as always, on static inputs, while a tape records its native calls
    2nd step             runs as always; the tape plays the same step beside it and has to give the same bits
    from the 3rd on      the step's rows are copied into the static inputs and the tape plays

A size is a number of sequences with one row each. Chunks of prompts, and larger steps, whose time goes into
arithmetic, take the decoder as it is.

That is a CPU. On a GPU the first step of a bucket of sizes is captured in a CUDA graph (captured.py), which plays it
and all that follow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..kernels import dispatch, ops
from ..kernels.native import bindings, library
from ..kernels.native.tape import Tape
from ..spec import Spec
from .batch import Batch
from .cache import KVCache
from .captured import BUCKETS, CapturedStep, bucket
from .model import Decoder, FfnUse

LARGEST = 16  # sequences of a recorded step
TABLE_WIDTH = 64  # blocks that a first table has room for; more than that, and the step is recorded anew


class GraphedDecoder:
    """A Decoder that plays its decode steps from tapes or graphs. Its logits are overwritten by the next call."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._steps: dict[int, RecordedStep] = {}
        self._graphs: dict[int, CapturedStep] = {}
        self._cache: KVCache | None = None
        self._pool: Any = None

    @property
    def spec(self) -> Spec:
        return self.decoder.spec

    def ffn_use(self) -> tuple[FfnUse | None, ...]:
        """As Decoder's."""
        return self.decoder.ffn_use()

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """As Decoder's."""
        size = len(batch.tokens)
        if batch.max_query > 1 or size > self.largest or len(batch.logit_rows) < size:
            return self.decoder(batch, cache)
        if cache is not self._cache:  # tapes and graphs hold its addresses
            self._steps, self._graphs, self._cache = {}, {}, cache
        if self._captures:
            return self._captured(batch, cache).replay(batch)
        step = self._steps.get(size)
        if step is None or step.table_width < batch.block_tables.shape[1]:
            step = self._steps[size] = RecordedStep(self.decoder, batch, cache)
            return step.logits
        if step.replays is None:
            return step.verify(self.decoder, batch, cache)
        return step.replay(self.decoder, batch) if step.replays else self.decoder(batch, cache)

    def _captured(self, batch: Batch, cache: KVCache) -> CapturedStep:
        """The graph that plays this batch, captured if there is none or its tables have become too narrow."""
        rows, width = bucket(len(batch.tokens)), batch.block_tables.shape[1]
        step = self._graphs.get(rows)
        if step is None or step.table_width < width:
            self._graphs.pop(rows, None)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            step = self._graphs[rows] = CapturedStep(self.decoder, batch, cache, _room(width), self._pool)
        return step

    @property
    def _captures(self) -> bool:
        """Whether steps become CUDA graphs: not where plain torch does the work, which asks the GPU for lengths."""
        return self.decoder.device.type == "cuda" and ops.takes_triton(self.decoder.weights.embed)

    @property
    def largest(self) -> int:
        """Sequences of a step above which nothing is recorded; 0 where plain torch or the interpreter does the work."""
        if self._captures:
            return BUCKETS[-1]
        native = library.load()
        if native is None or self.decoder.device.type != "cpu" or dispatch.interpreting():
            return 0
        return min(LARGEST, native.linear_rows(self.decoder.dtype, 1)) if self.decoder.dtype in bindings.DTYPES else 0


class RecordedStep:
    """One recorded step over static inputs. replays: whether the tape gives what the decoder gives; None: not known."""

    def __init__(self, decoder: Decoder, batch: Batch, cache: KVCache) -> None:
        native = library.load()
        assert native is not None
        self.replays: bool | None = None
        self.table_width = _room(batch.block_tables.shape[1])
        self._rows = decoder.embed(batch)
        room = self.table_width - batch.block_tables.shape[1]
        self._batch = replace(batch, block_tables=torch.nn.functional.pad(batch.block_tables, (0, room)))
        self._tape = Tape(native)
        with self._tape.record():
            self.logits = decoder.run_layers(self._rows, self._batch, cache)

    def replay(self, decoder: Decoder, batch: Batch) -> torch.Tensor:
        """The logits of a batch of this size."""
        self._fill(decoder, batch)
        self._tape.play()
        return self.logits

    def verify(self, decoder: Decoder, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Run the batch both ways; the tape counts from now on if the logits agree bit for bit."""
        expected = decoder(batch, cache)
        self.replays = torch.equal(self.replay(decoder, batch).view(torch.int32), expected.view(torch.int32))
        if not self.replays:
            dispatch.fallback("decode_step", "it is not made of native kernels alone, so it cannot be recorded")
        return expected

    def _fill(self, decoder: Decoder, batch: Batch) -> None:
        """Copy what changes from step to step into the static inputs."""
        rows = decoder.embed(batch)
        for name in ("hidden", "cos", "sin"):
            getattr(self._rows, name).copy_(getattr(rows, name))
        self._batch.slots.copy_(batch.slots)
        self._batch.context_lens.copy_(batch.context_lens)
        self._batch.block_tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables)


def _room(width: int) -> int:
    """The table that is made for one of `width` blocks: twice as wide each time that it grows."""
    return max(TABLE_WIDTH, 1 << (width - 1).bit_length())
