"""The scheduler and the block allocator: nothing leaks, nothing starves, and order is kept, whatever happens."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pared.errors import BadParameter, EngineError, PromptTooLong
from pared.runtime.cache import BlockAllocator, KVCache, bytes_per_block
from pared.runtime.params import SamplingParams
from pared.runtime.scheduler import Scheduler
from pared.runtime.sequence import Sequence
from pared.tests.mock_model import VOCAB, expected, make_core, run, tokens_of


def sequence(id: int, tokens: int) -> Sequence:
    params = SamplingParams(max_tokens=8)
    return Sequence(id, [1] * tokens, tokens, params, frozenset(), tokens + 8, tokens)


def advance(chunks: list) -> None:
    """What the engine does after a step: all chunks are computed, and those at their end get a token."""
    for chunk in chunks:
        samples = chunk.samples
        chunk.sequence.computed = chunk.stop
        if samples:
            chunk.sequence.tokens.append(1)


def spans(chunks: list) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.id, chunk.start, chunk.stop) for chunk in chunks]


def test_allocator_never_gives_the_reserved_block_and_knows_its_owners() -> None:
    allocator = BlockAllocator(5)
    blocks = allocator.allocate(4)
    assert sorted(blocks) == [1, 2, 3, 4]
    assert (allocator.free, allocator.used, allocator.total) == (0, 4, 4)
    with pytest.raises(EngineError, match="1 KV blocks were asked for while 0 of 4 are free"):
        allocator.allocate(1)
    allocator.release(blocks[:2])
    for wrong in (blocks[:1], [0], [blocks[2], blocks[2]], [99]):
        with pytest.raises(EngineError, match="released"):
            allocator.release(wrong)
    assert (allocator.free, allocator.used) == (2, 2)


def test_cache_pools_follow_each_layers_heads() -> None:
    cache = KVCache([1, 4, 2], 8, 3, 16, torch.bfloat16, "cpu")
    assert [tuple(k.shape) for k, _ in cache.layers] == [(3, 16, 1, 8), (3, 16, 4, 8), (3, 16, 2, 8)]
    assert cache.nbytes == 3 * bytes_per_block([1, 4, 2], 8, 16, torch.bfloat16) == 3 * 2 * 7 * 8 * 16 * 2
    assert not any(pool.any() for layer in cache.layers for pool in layer)
    with pytest.raises(BadParameter, match="num_blocks=1"):
        KVCache([1], 8, 1, 16, torch.bfloat16, "cpu")


def test_prefill_is_chunked_and_decoding_goes_first() -> None:
    scheduler = Scheduler(BlockAllocator(32), page=4, max_batch=4, chunk=8)
    for id, length in enumerate((3, 12, 5)):
        scheduler.add(sequence(id, length))
    chunks = scheduler.schedule()
    assert spans(chunks) == [(0, 0, 3), (2, 0, 5)]  # the shortest get what the oldest leaves
    advance(chunks)
    chunks = scheduler.schedule()
    assert spans(chunks) == [(0, 3, 4), (2, 5, 6), (1, 0, 6)]
    advance(chunks)
    chunks = scheduler.schedule()
    assert spans(chunks) == [(0, 4, 5), (2, 6, 7), (1, 6, 12)]


def test_a_short_prompt_overtakes_long_ones_and_the_oldest_gets_half() -> None:
    scheduler = Scheduler(BlockAllocator(64), page=4, max_batch=8, chunk=10)
    for id, length in enumerate((40, 40, 3)):
        scheduler.add(sequence(id, length))
    chunks = scheduler.schedule()
    assert spans(chunks) == [(0, 0, 7), (2, 0, 3)]
    advance(chunks)
    for id in (3, 4, 5):  # however many come, the oldest goes on
        scheduler.add(sequence(id, 9))
        chunks = scheduler.schedule()
        assert next(chunk.stop - chunk.start for chunk in chunks if chunk.sequence.id == 0) >= 4
        advance(chunks)


def test_the_youngest_gives_way_and_returns_first() -> None:
    scheduler = Scheduler(BlockAllocator(8), page=2, max_batch=3, chunk=16)
    old, young, waiting = sequence(0, 3), sequence(1, 4), sequence(2, 6)
    for one in (old, young, waiting):
        scheduler.add(one)
    while not scheduler.preemptions:
        advance(scheduler.schedule())
    assert [one.id for one in scheduler.running] == [0]
    assert [one.id for one in scheduler.waiting] == [1, 2]
    assert (young.blocks, young.computed) == ([], 0)
    scheduler.remove(old)
    chunks = scheduler.schedule()
    assert spans(chunks)[0] == (1, 0, len(young.tokens))


def test_a_chunk_must_have_a_row_for_every_sequence() -> None:
    with pytest.raises(BadParameter, match="max_batch=8, chunk=4"):
        Scheduler(BlockAllocator(8), page=2, max_batch=8, chunk=4)


BEGINNINGS = st.sampled_from([[], [1] * 4, [1] * 4 + [2] * 5, [1] * 4 + [3] * 5])


class EngineMachine(RuleBasedStateMachine):
    """Any order of requests, steps, cancellations and failures over caches of any size."""

    @initialize(
        num_blocks=st.integers(3, 14),
        page=st.integers(1, 5),
        max_batch=st.integers(1, 5),
        spare=st.integers(0, 9),
        rope_switch=st.none() | st.integers(2, 20),
        by_length=st.booleans(),
        prefix_caching=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        page: int,
        max_batch: int,
        spare: int,
        rope_switch: int | None,
        by_length: bool,
        prefix_caching: bool,
    ) -> None:
        self.kind = (rope_switch if by_length else None, by_length)
        self.core = make_core(num_blocks, page, 40, max_batch, max_batch + spare, *self.kind, prefix_caching)
        self.room = min(40, (num_blocks - 1) * page)
        self.asked: dict[int, tuple[list[int], SamplingParams]] = {}
        self.given: dict[int, list] = {}
        self.ended_early: set[int] = set()

    @rule(
        prompt=st.builds(operator.add, BEGINNINGS, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24)),
        max_tokens=st.none() | st.integers(1, 20),
        ignore_eos=st.booleans(),
        stop=st.lists(st.integers(0, VOCAB - 1), max_size=3),
    )
    def add(self, prompt: list[int], max_tokens: int | None, ignore_eos: bool, stop: list[int]) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, stop_token_ids=stop)
        if len(prompt) >= self.room:
            with pytest.raises(PromptTooLong, match=str(self.room)):
                self.core.add(prompt, params)
            return
        self.asked[self.core.add(prompt, params)] = (prompt, params)

    @rule()
    def step(self) -> None:
        self.collect(self.core.step())

    @rule(steps=st.integers(5, 20))
    def many_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.collect(self.core.step())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.asked)))
        live = not any(output.finish_reason for output in self.given.get(id, ())) and id not in self.ended_early
        assert self.core.cancel(id) is live
        if live:
            self.ended_early.add(id)

    @rule()
    def fail(self) -> None:
        if not (self.core.scheduler.running or self.core.scheduler.waiting):
            return
        before = set(self.core._live)
        self.core.model.fail_next = True
        with pytest.raises(EngineError, match="told to fail"):
            self.core.step()
        self.ended_early |= before - set(self.core._live)

    def collect(self, outputs: list) -> None:
        for output in outputs:
            self.given.setdefault(output.id, []).append(output)

    @invariant()
    def blocks_that_are_shared_hold_the_same(self) -> None:
        scheduler, allocator, page = self.core.scheduler, self.core.allocator, self.core.cache.page
        held: dict[int, tuple] = {}
        for one in scheduler.running:
            assert len(set(one.blocks)) == len(one.blocks)
            for place, block in enumerate(one.blocks):
                until = (place + 1) * page
                lengths = [max(one.rope_floor, i + 1) for i in range(until - page, until)] if self.kind[1] else None
                shared = one.tokens[:until] if until <= one.computed else id(one), lengths
                assert held.setdefault(block, shared) == shared
        assert len(held) == allocator.used
        assert 0 not in held
        assert allocator.free + allocator.used == allocator.total
        assert not any(one.blocks or one.computed for one in scheduler.waiting)

    @invariant()
    def order_of_arrival_is_kept(self) -> None:
        ids = [one.id for one in (*self.core.scheduler.running, *self.core.scheduler.waiting)]
        assert ids == sorted(ids) == sorted(self.core._live)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for id, outputs in run(self.core).items():
            self.given.setdefault(id, []).extend(outputs)
        assert self.core.allocator.used == 0
        assert self.given.keys() == self.asked.keys()
        for id, (prompt, params) in self.asked.items():
            self.check(self.given[id], expected(prompt, self.room, params, *self.kind), id)

    def check(self, outputs: list, alone: list[int], id: int) -> None:
        reasons = [output.finish_reason for output in outputs]
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        if id in self.ended_early:
            assert reasons[-1] == "abort"
            assert tokens_of(outputs) == alone[: len(outputs) - 1]
        else:
            assert reasons[-1] in ("stop", "length")
            assert tokens_of(outputs) == alone


EngineMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEngineMachine = EngineMachine.TestCase
