"""What one step of the decoder is given: a ragged batch of token rows over paged KV blocks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .sequence import Chunk
from .transfer import to_device


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
    logit_rows: list[int] = []
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
    tables = [block for chunk in chunks for block in _padded(chunk.sequence.blocks, width)]
    longs, shorts = _moved(
        (tokens, positions, rope_lens, slots, logit_rows),
        (starts, [chunk.stop for chunk in chunks], tables),
        torch.device(device),
    )
    return Batch(
        tokens=longs[0],
        positions=longs[1],
        rope_lens=longs[2],
        slots=longs[3],
        query_starts=shorts[0],
        context_lens=shorts[1],
        block_tables=shorts[2].view(len(chunks), width),
        logit_rows=longs[4],
        max_query=max(chunk.stop - chunk.start for chunk in chunks),
    )


def _padded(blocks: list[int], width: int) -> list[int]:
    return blocks + [0] * (width - len(blocks))


def _moved(
    longs: Sequence[list[int]], shorts: Sequence[list[int]], device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """int64 and int32 tensors on `device`, all by one transfer: each costs a step as much as a small kernel."""
    wide, narrow = array("q"), array("i")
    long_places, short_places = _appended(wide, longs), _appended(narrow, shorts)
    there = to_device(torch.frombuffer(bytearray(wide.tobytes() + narrow.tobytes()), dtype=torch.int32), device)
    border = 2 * len(wide)
    of_longs, of_shorts = there[:border].view(torch.int64), there[border:]
    return [of_longs[place] for place in long_places], [of_shorts[place] for place in short_places]


def _appended(values: array[int], lists: Sequence[list[int]]) -> list[slice]:
    """Append the lists to `values`; where each lies.

    Each begins at a multiple of 16 bytes, as tensors of their own do: Triton compiles a kernel anew where one does not.
    """
    unit, places = 16 // values.itemsize, []
    for one in lists:
        places.append(slice(len(values), len(values) + len(one)))
        values.extend(one)
        values.extend([0] * (-len(one) % unit))
    return places
