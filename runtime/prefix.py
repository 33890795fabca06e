"""Prefix caching: sequences that begin alike share the KV blocks of their common beginning.

A full block is known by a hash over its tokens and everything before them, so equal keys mean equal keys and values.
Rotary tables that depend on a sequence's length (dynamic, longrope) make that length part of what a block holds.
"""

from __future__ import annotations

import hashlib
from array import array

from .cache import BlockAllocator
from .sequence import Chunk, Sequence


class PrefixCache:
    """Finds blocks that were computed before, and remembers those that are.

    rope_from: the sequence length above which the rotary tables of all its tokens depend on it; None: they never do.
    """

    def __init__(self, allocator: BlockAllocator, page: int, rope_from: int | None) -> None:
        self._allocator = allocator
        self._page = page
        self._rope_from = rope_from

    def reuse(self, sequence: Sequence) -> None:
        """Let a sequence go on behind whatever of its next tokens is known; at least one is left to compute.

        The blocks that it holds for them already are given back.
        """
        if sequence.computed % self._page or sequence.params.prompt_logprobs is not None:
            return
        at = sequence.computed // self._page
        self._extend(sequence)
        found = self._allocator.claim(sequence.keys[at : (len(sequence.tokens) - 1) // self._page])
        self._allocator.release(sequence.blocks[at : at + len(found)])
        sequence.blocks[at : at + len(found)] = found
        sequence.computed += len(found) * self._page
        if not sequence.generated:
            sequence.cached += len(found) * self._page

    def remember(self, chunk: Chunk) -> None:
        """The blocks that a computed chunk has filled may be used by others."""
        sequence, filled = chunk.sequence, range(chunk.start // self._page, chunk.stop // self._page)
        if filled:
            self._extend(sequence)
        for place in filled:
            self._allocator.remember(sequence.blocks[place], sequence.keys[place])

    def _extend(self, sequence: Sequence) -> None:
        """Hash what has no key yet of the sequence's full blocks."""
        for start in range(len(sequence.keys) * self._page, len(sequence.tokens) - self._page + 1, self._page):
            digest = hashlib.sha256(sequence.keys[-1] if sequence.keys else b"")
            digest.update(array("q", [self._length(sequence, start), *sequence.tokens[start : start + self._page]]))
            sequence.keys.append(digest.digest())

    def _length(self, sequence: Sequence, start: int) -> int:
        """What rotary tables see of the sequence's length in the block that begins at `start`, beyond its position."""
        if self._rope_from is None or sequence.rope_floor <= self._rope_from:
            return 0
        return max(sequence.rope_floor, start)
