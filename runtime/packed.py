"""Many texts at once through the decoder, packed one after the other: no row is padding, no key outlives its layer.

    texts   a0 a1 a2 | b0 | c0 c1       query_starts 0 3 4 6
    blocks  1 1 1      2    3 3         each text begins a block of the pools, which all layers share

Every text is whole in its batch, so attention sees it alone: company changes a vector by no more than a matrix
product of other height rounds differently. Where tokens see those after them too, each row asks on its own, as the
last of all tokens of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..embedding import Tokens, row_weights
from .batch import Batch
from .cache import RESERVED_BLOCK, LayerCache
from .model import Decoder

PAGE = 16


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The numbers of the texts of each batch: at most `budget` tokens together, or one longer text alone.

    Longest first, so that the texts of a batch are alike and a lack of memory shows at once.
    """
    made: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not made or lengths[i] > room:
            made.append([])
            room = budget
        made[-1].append(i)
        room -= lengths[i]
    return made


class Packed:
    """A decoder that turns packed texts into vectors, pooled as `pooling` says."""

    def __init__(self, decoder: Decoder, pooling: str) -> None:
        self.decoder, self.pooling = decoder, pooling
        self._cache: LayerCache | None = None

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Tokens]) -> torch.Tensor:
        """fp32 [B, embed_dim] on the decoder's device, not normalised. No text may be empty."""
        weights = [row_weights(len(text.ids) - text.start, self.pooling) for text in texts]
        batch, rows, blocks = _pack(texts, weights, self.decoder.device)
        if not self.decoder.spec.causal:
            batch = _both_ways(batch)
        hidden = self.decoder.states(batch, self._pools(blocks)).float()
        weighted = hidden * torch.cat([w[w > 0] for w in weights]).to(hidden.device)[:, None]
        return torch.segment_reduce(weighted, "sum", lengths=rows.to(hidden.device), axis=0)

    def _pools(self, blocks: int) -> LayerCache:
        """Pools of at least so many blocks; kept for the next batch."""
        if self._cache is None or self._cache.num_blocks < blocks:
            spec = self.decoder.spec
            heads = [layer.kv_heads for layer in spec.layers]
            self._cache = LayerCache(heads, spec.head_dim, blocks, PAGE, self.decoder.dtype, self.decoder.device)
        return self._cache


def _pack(
    texts: Sequence[Tokens], weights: Sequence[torch.Tensor], device: torch.device
) -> tuple[Batch, torch.Tensor, int]:
    """The batch of these texts, asking for the rows that have a weight; how many those are of each text; and blocks."""
    lengths = np.array([len(text.ids) for text in texts])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    blocks = -(-lengths // PAGE)
    first = RESERVED_BLOCK + 1 + np.concatenate([[0], np.cumsum(blocks)[:-1]])
    table = np.arange(blocks.max())
    tables = np.where(table < blocks[:, None], first[:, None] + table, RESERVED_BLOCK)
    pairs = zip(weights, texts, starts[:-1].tolist(), strict=True)
    wanted = [torch.nonzero(w)[:, 0] + start + text.start for w, text, start in pairs]
    tokens = np.concatenate([text.ids for text in texts])
    of_rows = np.stack([tokens, positions, np.repeat(lengths, lengths), np.repeat(first * PAGE, lengths) + positions])
    rows = torch.from_numpy(of_rows.astype(np.int64)).to(device)
    of_texts = torch.from_numpy(np.concatenate([starts, lengths]).astype(np.int32)).to(device)
    batch = Batch(
        tokens=rows[0],
        positions=rows[1],
        rope_lens=rows[2],
        slots=rows[3],
        query_starts=of_texts[: len(starts)],
        context_lens=of_texts[len(starts) :],
        block_tables=torch.from_numpy(tables.astype(np.int32)).to(device),
        logit_rows=torch.cat(wanted).to(device),
        max_query=int(lengths.max()),
    )
    return batch, torch.tensor([len(rows) for rows in wanted]), RESERVED_BLOCK + 1 + int(blocks.sum())


def _both_ways(batch: Batch) -> Batch:
    """The batch with each row as a sequence of its own, over the keys of its whole text."""
    rows = torch.arange(len(batch.tokens) + 1, dtype=torch.int32, device=batch.tokens.device)
    counts = batch.query_starts.diff()
    return replace(
        batch,
        query_starts=rows,
        context_lens=batch.context_lens.repeat_interleave(counts),
        block_tables=batch.block_tables.repeat_interleave(counts, dim=0),
        max_query=2,  # a batch of single rows would write its keys on the way, when other rows have read already
    )
