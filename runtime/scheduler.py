"""Who runs in the next step: continuous batching with chunked prefill over a fixed number of KV blocks.

Sequences are admitted strictly in the order in which they came, each with blocks for all tokens it has by then, so
only decoding makes a running sequence grow. When blocks run out the youngest gives all of its own back and is
recomputed later: the oldest always goes on, and since none is admitted that could outgrow the cache, all finish.
"""

from __future__ import annotations

from collections import deque

from ..errors import BadParameter
from .cache import BlockAllocator
from .sequence import Chunk, Sequence


class Scheduler:
    """Chooses the chunks of each step. `running` followed by `waiting` is always in order of arrival.

    max_batch: sequences that run at once. chunk: token rows of one step at most, no fewer than max_batch.
    rope_switch: context length beyond which the model's rotary tables change for a whole sequence, or None.
    """

    def __init__(
        self, allocator: BlockAllocator, page: int, max_batch: int, chunk: int, rope_switch: int | None = None
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

    def _switch_rope(self) -> None:
        """Start over, with the rotary tables of long sequences, what has just outgrown those of short ones."""
        if self.rope_switch is None:
            return
        for sequence in self.running:
            if sequence.rope_floor <= self.rope_switch < len(sequence.tokens):
                sequence.rope_floor = len(sequence.tokens)
                sequence.computed = 0

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
        """Let sequences in that the step has rows for, while every running one could still grow by a block.

        That margin also keeps out a sequence that was preempted just now.
        """
        while self.waiting and len(self.running) < self.max_batch:
            if sum(running.pending for running in self.running) >= self.chunk:
                return
            sequence = self.waiting[0]
            missing = self._missing(sequence)
            if missing + len(self.running) > self.allocator.free:
                return
            sequence.blocks += self.allocator.allocate(missing)
            self.running.append(self.waiting.popleft())

    def _chunks(self) -> list[Chunk]:
        """One row for each decoding sequence, then what is left of the budget for prefill, oldest first."""
        budget = self.chunk
        chunks = []
        for sequence in sorted(self.running, key=lambda running: running.pending > 1):
            stop = min(len(sequence.tokens), sequence.computed + budget)
            if stop > sequence.computed:
                chunks.append(Chunk(sequence, sequence.computed, stop))
                budget -= stop - sequence.computed
        return chunks

    def _missing(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self.page) - len(sequence.blocks)

    def _release(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
