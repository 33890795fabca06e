"""Who runs in the next step: continuous batching with chunked prefill over a fixed number of KV blocks.

Sequences are admitted strictly in the order in which they came, each with blocks for all tokens it has by then, so
only decoding makes a running sequence grow. When blocks run out the youngest gives all of its own back and is
recomputed later: the oldest always goes on, and since none is admitted that could outgrow the cache, all finish.

Of the prompts that are being read the oldest gets half of a step's rows and the shortest get the rest: a short one
need not wait for long ones before it, nor a long one for ever.
"""

from __future__ import annotations

import time
from collections import deque

from ..errors import BadParameter
from .cache import BlockAllocator
from .prefix import PrefixCache
from .sequence import Chunk, Sequence


class Scheduler:
    """Chooses the chunks of each step. `running` followed by `waiting` is always in order of arrival.

    max_batch: sequences that run at once. chunk: token rows of one step at most, no fewer than max_batch.
    rope_switch: context length beyond which the model's rotary tables change for a whole sequence, or None.
    prefixes: where sequences find what others have computed; None: every sequence is computed in full.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        page: int,
        max_batch: int,
        chunk: int,
        rope_switch: int | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        if max_batch < 1 or chunk < max_batch:
            raise BadParameter(
                f"max_batch must be at least 1 and chunk at least max_batch (every running sequence takes one row of a "
                f"step), got max_batch={max_batch}, chunk={chunk}"
            )
        self.allocator = allocator
        self.page = page
        self.max_batch = max_batch
        self.chunk = chunk
        self.rope_switch = rope_switch
        self.prefixes = prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def capacity(self) -> int:
        """Tokens that one sequence alone could keep in the cache."""
        return self.allocator.total * self.page

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and take its blocks back."""
        queue = self.running if sequence in self.running else self.waiting
        queue.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, decoding sequences first; empty only when nothing is left to do."""
        self._switch_rope()
        self._grow()
        self._admit()
        return self._chunks()

    def advance(self, chunk: Chunk) -> None:
        """A chunk has been computed: its keys and values are in the cache."""
        chunk.sequence.computed = chunk.stop
        if self.prefixes is not None:
            self.prefixes.remember(chunk)

    def _switch_rope(self) -> None:
        """Start over, with the rotary tables of long sequences, what has just outgrown those of short ones."""
        if self.rope_switch is None:
            return
        for sequence in self.running:
            if sequence.rope_floor <= self.rope_switch < len(sequence.tokens):
                sequence.rope_floor = len(sequence.tokens)
                self._release(sequence)
                sequence.keys = []

    def _grow(self) -> None:
        """Give every running sequence blocks for all of its tokens, oldest first, at the cost of the youngest."""
        served = 0
        while served < len(self.running):
            sequence = self.running[served]
            missing = self._missing(sequence)
            if missing <= self.allocator.free:
                sequence.blocks += self.allocator.allocate(missing)
                served += 1
            else:
                self._preempt()

    def _preempt(self) -> None:
        victim = self.running.pop()
        self._release(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1

    def _admit(self) -> None:
        """Let sequences in while every running one could still grow by a block.

        That margin also keeps out a sequence that was preempted just now.
        """
        while self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            self._reuse(sequence)
            missing = self._missing(sequence)
            if missing + len(self.running) > self.allocator.free:
                self._release(sequence)
                return
            sequence.blocks += self.allocator.allocate(missing)
            sequence.started = sequence.started or time.monotonic()
            self.running.append(self.waiting.popleft())

    def _chunks(self) -> list[Chunk]:
        """One row for each decoding sequence; prompts share what is left of the budget."""
        for sequence in self.running:
            if sequence.pending > 1:  # others may have computed some of it since it was let in
                self._reuse(sequence)
        decoding = [sequence for sequence in self.running if sequence.pending == 1]
        reading = [sequence for sequence in self.running if sequence.pending > 1]
        rows = [1] * len(decoding) + _shares([one.pending for one in reading], self.chunk - len(decoding))
        each = zip(decoding + reading, rows, strict=True)
        return [Chunk(sequence, sequence.computed, sequence.computed + count) for sequence, count in each if count]

    def _missing(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self.page) - len(sequence.blocks)

    def _reuse(self, sequence: Sequence) -> None:
        if self.prefixes is not None:
            self.prefixes.reuse(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        if not sequence.generated:
            sequence.cached = 0


def _shares(pending: list[int], budget: int) -> list[int]:
    """Rows of a step for prompts with so many tokens left, oldest first."""
    shares = [0] * len(pending)
    if pending:
        shares[0] = min(pending[0], -(-budget // 2))
    left = budget - sum(shares)
    for i in sorted(range(len(pending)), key=pending.__getitem__):
        more = min(pending[i] - shares[i], left)
        shares[i] += more
        left -= more
    return shares
