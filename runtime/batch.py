"""What one step of the decoder is given: a ragged batch of token rows over paged KV blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .sequence import Chunk


@dataclass(frozen=True)
class Batch:
    """T token rows of S sequences, of which R rows are wanted as logits.

    Sequence s owns the rows query_starts[s]:query_starts[s+1]; they are the last of its context_lens[s] tokens.
    Its key at position p lies in the KV slot block_tables[s, p // page] * page + p % page. Block 0 belongs to no
    sequence: unused entries of block_tables are 0, and rows that only pad a batch write there.
    """

    tokens: torch.Tensor  # [T] i64
    positions: torch.Tensor  # [T] i64, from 0
    rope_lens: torch.Tensor  # [T] i64: the sequence length that length-dependent rotary tables see
    slots: torch.Tensor  # [T] i64: where the row's key and value are written
    query_starts: torch.Tensor  # [S+1] i32
    context_lens: torch.Tensor  # [S] i32
    block_tables: torch.Tensor  # [S, B] i32
    logit_rows: torch.Tensor  # [R] i64, ascending rows
    max_query: int  # rows of the longest chunk


def build_batch(chunks: list[Chunk], page: int, device: torch.device | str) -> Batch:
    """The batch that computes every chunk; a chunk that reaches its sequence's end asks for one row of logits.

    Prompts whose log-probabilities are wanted ask for more: `Chunk.scored`.
    """
    tokens: list[int] = []
    positions: list[int] = []
    rope_lens: list[int] = []
    slots: list[int] = []
    starts = [0]
    logit_rows = []
    for chunk in chunks:
        sequence, span = chunk.sequence, range(chunk.start, chunk.stop)
        tokens += sequence.tokens[chunk.start : chunk.stop]
        positions += span
        rope_lens += [max(sequence.rope_floor, position + 1) for position in span]
        slots += [sequence.blocks[position // page] * page + position % page for position in span]
        logit_rows += [starts[-1] + position - chunk.start for position in chunk.scored]
        starts.append(len(tokens))
        if chunk.samples:
            logit_rows.append(len(tokens) - 1)
    width = max(len(chunk.sequence.blocks) for chunk in chunks)
    tables = [chunk.sequence.blocks + [0] * (width - len(chunk.sequence.blocks)) for chunk in chunks]

    def tensor(values: list[int] | list[list[int]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    # Few transfers: each costs a decode step as much as a small kernel.
    of_rows = tensor([tokens, positions, rope_lens, slots], torch.int64)
    of_sequences = tensor(starts + [chunk.stop for chunk in chunks], torch.int32)
    return Batch(
        tokens=of_rows[0],
        positions=of_rows[1],
        rope_lens=of_rows[2],
        slots=of_rows[3],
        query_starts=of_sequences[: len(starts)],
        context_lens=of_sequences[len(starts) :],
        block_tables=tensor(tables, torch.int32),
        logit_rows=tensor(logit_rows, torch.int64),
        max_query=max(chunk.stop - chunk.start for chunk in chunks),
    )
