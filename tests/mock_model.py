"""A model without weights whose next token is a function of everything the engine has to get right.

It writes each token and its rotary length into the KV pools, reads every earlier one back through the block table
of its sequence, and folds what it sees into the next token: a wrong slot, table, position or length changes the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pared.runtime.batch import Batch
from pared.runtime.cache import KVCache
from pared.runtime.engine import EngineCore
from pared.runtime.params import SamplingParams
from pared.spec import Rope

VOCAB = 37
EOS = 0
LAYERS = (1, 3)
BY_LENGTH = Rope("dynamic", 10_000.0, 4, max_positions=0)


@dataclass(frozen=True)
class MockLayer:
    kv_heads: int


@dataclass(frozen=True)
class MockSpec:
    vocab: int = VOCAB
    head_dim: int = 2
    causal: bool = True
    max_positions: int = 64
    layers: tuple[MockLayer, ...] = tuple(MockLayer(heads) for heads in LAYERS)
    rope: Rope | None = BY_LENGTH
    rope_switch: int | None = None


class MockModel:
    """by_length: whether a key depends on the length of its sequence, beside its position."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, rope_switch: int | None = None, by_length: bool = True) -> None:
        self.by_length = by_length
        self.spec = MockSpec(rope_switch=rope_switch)
        if not by_length:
            self.spec = MockSpec(rope=None)
        self.batches: list[Batch] = []
        self.fail_next = False

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the mock was told to fail")
        self.batches.append(batch)
        check_batch(batch, cache)
        for k_pool, v_pool in cache.layers:
            k_pool.flatten(0, 1)[batch.slots] = batch.tokens[:, None, None].to(k_pool.dtype)
            lengths = batch.rope_lens if self.by_length else batch.positions + 1
            v_pool.flatten(0, 1)[batch.slots] = lengths[:, None, None].to(v_pool.dtype)
        logits = torch.empty(len(batch.logit_rows), VOCAB)
        for place, row in enumerate(batch.logit_rows.tolist()):
            logits[place] = logits_for(next_token(*self.seen(batch, cache, row)))
        return logits

    def ffn_use(self) -> tuple[None, ...]:
        return (None,) * len(LAYERS)

    def seen(self, batch: Batch, cache: KVCache, row: int) -> tuple[list[int], list[int]]:
        """Tokens and rotary lengths that this row may attend to, as the last layer's cache holds them."""
        s = int(torch.searchsorted(batch.query_starts, row, right=True)) - 1
        k_pool, v_pool = cache.layers[-1]
        assert torch.equal(k_pool, cache.layers[0][0].expand_as(k_pool))
        position = int(batch.positions[row])
        table = batch.block_tables[s].tolist()
        slots = [table[p // cache.page] * cache.page + p % cache.page for p in range(position + 1)]
        return [[int(x) for x in pool.flatten(0, 1)[slots, 0, 0]] for pool in (k_pool, v_pool)]


def check_batch(batch: Batch, cache: KVCache) -> None:
    """Every row's position and slot must follow from the sequence's length and table."""
    lengths = batch.query_starts.diff()
    assert batch.max_query == int(lengths.max())
    assert int(batch.query_starts[-1]) == len(batch.tokens) == len(batch.slots) == len(batch.rope_lens)
    for s, (start, stop) in enumerate(
        zip(batch.query_starts[:-1].tolist(), batch.query_starts[1:].tolist(), strict=True)
    ):
        end = int(batch.context_lens[s])
        assert batch.positions[start:stop].tolist() == list(range(end - (stop - start), end))
        for row in range(start, stop):
            block, offset = divmod(int(batch.slots[row]), cache.page)
            assert block == batch.block_tables[s, int(batch.positions[row]) // cache.page] != 0
            assert offset == int(batch.positions[row]) % cache.page
    assert len(set(batch.slots.tolist())) == len(batch.slots)


def next_token(tokens: list[int], rope_lens: list[int]) -> int:
    folded = 17
    for token, length in zip(tokens, rope_lens, strict=True):
        folded = (folded * 31 + token * 7 + length) % 100_003
    return folded % VOCAB


def logits_for(token: int) -> torch.Tensor:
    """[V], best at `token` and falling off to its right, all distinct."""
    return -((torch.arange(VOCAB) - token) % VOCAB).float() * 0.3


def expected(
    prompt: list[int],
    limit: int,
    params: SamplingParams,
    rope_switch: int | None = None,
    by_length: bool = True,
) -> list[int]:
    """The greedy answer of a prompt that runs alone, without engine, cache or batch."""
    tokens, floor = list(prompt), len(prompt) if by_length else 0
    limit = min(limit, len(prompt) + (params.max_tokens or limit))
    while len(tokens) < limit:
        if rope_switch is not None and floor <= rope_switch < len(tokens):
            floor = len(tokens)
        token = next_token(tokens, [max(floor, i + 1) for i in range(len(tokens))])
        generated = len(tokens) - len(prompt)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
        if generated < params.min_tokens and token in stops:
            token = next(t % VOCAB for t in range(token, token + VOCAB) if t % VOCAB not in stops)
        tokens.append(token)
        if token in stops and generated >= params.min_tokens:
            break
    return tokens[len(prompt) :]


class LetterTokenizer:
    """One letter a token; the first one, which is the end of text, is special."""

    letters = " abcdefghijklmnopqrstuvwxyz0123456789"
    eos = EOS

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.letters[i] for i in ids if not (skip_special_tokens and i == EOS))

    def chat(self, messages: list[dict]) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))


def make_core(
    num_blocks: int = 32,
    page: int = 4,
    context: int = 64,
    max_batch: int = 4,
    chunk: int = 16,
    rope_switch: int | None = None,
    by_length: bool = True,
    prefix_caching: bool = False,
) -> EngineCore:
    cache = KVCache(LAYERS, 2, num_blocks, page, torch.float32, "cpu")
    model = MockModel(rope_switch, by_length)
    sizes = {"context": context, "max_batch": max_batch, "chunk": chunk}
    return EngineCore(model, cache, eos=frozenset([EOS]), prefix_caching=prefix_caching, **sizes)


def run(core: EngineCore) -> dict[int, list]:
    """All outputs until the engine is idle, by request."""
    found: dict[int, list] = {}
    for _ in range(10_000):
        if not core.busy:
            return found
        for output in core.step():
            found.setdefault(output.id, []).append(output)
    raise AssertionError("the engine does not come to an end")


def tokens_of(outputs: list) -> list[int]:
    return [output.token for output in outputs if output.token is not None]
