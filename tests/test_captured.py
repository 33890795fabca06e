"""What a captured decode step is fed, on a CPU: buckets, padding, and static inputs that are filled again and again.

tests/test_gpu.py captures and replays real graphs.
"""

from __future__ import annotations

import pytest
import torch

from pared.convert import convert
from pared.runtime import graphs
from pared.runtime.batch import Batch
from pared.runtime.cache import KVCache
from pared.runtime.captured import BUCKETS, bucket, fill, padding
from pared.runtime.graphs import GraphedDecoder
from pared.runtime.loader import load
from pared.tests.test_graphs import STEPS
from pared.tests.test_model import VARIANTS, Runner, random_model, token_rows

CPU = torch.device("cpu")


class Padded:
    """A decoder whose decode steps run, not captured, on the static inputs that a graph would have."""

    def __init__(self, decoder) -> None:
        self.decoder, self.spec, self.dtype = decoder, decoder.spec, decoder.dtype
        self.static: dict[int, tuple[Batch, int]] = {}

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        if batch.max_query > 1:
            return self.decoder(batch, cache)
        rows = bucket(len(batch.tokens))
        static, live = self.static.get(rows) or (padding(rows, 32, CPU), 0)
        self.static[rows] = static, fill(static, batch, live)
        return self.decoder(static, cache)[: len(batch.tokens)]


def test_the_bucket_is_the_smallest_that_holds_the_step():
    assert [bucket(size) for size in (1, 2, 3, 5, 9, 17, 25, BUCKETS[-1])] == [1, 2, 4, 8, 16, 24, 32, BUCKETS[-1]]
    assert list(BUCKETS) == sorted(set(BUCKETS))


def test_rows_that_fall_free_write_to_the_reserved_block_again():
    static = padding(4, 3, CPU)
    rows = torch.tensor([5, 6, 7])
    starts, lens, tables = torch.arange(4).int(), torch.tensor([9, 8, 7]).int(), torch.tensor([[1, 2], [3, 4], [5, 6]])
    batch = Batch(rows, rows, rows, rows, starts, lens, tables.int(), torch.arange(3), max_query=1)
    assert fill(static, batch, 0) == 3
    assert static.slots.tolist() == [5, 6, 7, 0]
    assert static.context_lens.tolist() == [9, 8, 7, 1]
    assert static.block_tables[:3].tolist() == [[1, 2, 0], [3, 4, 0], [5, 6, 0]]
    one = Batch(rows[:1], rows[:1], rows[:1], rows[:1], starts[:2], lens[:1], tables[:1].int(), rows[:1], max_query=1)
    assert fill(static, one, 3) == 1
    assert (static.slots.tolist(), static.context_lens.tolist()) == ([5, 0, 0, 0], [9, 1, 1, 1])


@pytest.mark.parametrize("name", ["llama", "qwen3-window-biased", "gpt2", "opt-350m", "phi3-longrope"])
def test_padded_steps_answer_as_unpadded_ones(tmp_path, name):
    random_model(VARIANTS[name]).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "compact", progress=False)
    decoder = load(tmp_path / "compact", device="cpu")
    logits = []
    for model in (decoder, Padded(decoder)):
        runner = Runner(decoder)
        runner.decoder = model
        for pool in (pool for pools in runner.cache.layers for pool in pools):
            pool[0] = 0.0  # as KVCache makes it: padded rows attend to what they write there
        sequences = [runner.sequence(tokens, floor=len(tokens)) for tokens in token_rows(96)]
        runner.run([(s, len(s.tokens) - 2 * STEPS if len(s.tokens) > 2 * STEPS else 1) for s in sequences])
        for size in (3, 1, 3, 2, 3):
            runner.run([(s, 1) for s in sequences[-size:]])
        logits.append([s.logits for s in sequences])
    for plain, padded in zip(*logits, strict=True):
        torch.testing.assert_close(torch.stack(padded), torch.stack(plain), rtol=0, atol=1e-5)
        assert not torch.stack(plain).isnan().any()


def test_a_cpu_captures_nothing_and_a_graph_is_captured_anew_when_tables_grow(tmp_path, monkeypatch):
    random_model(VARIANTS["llama"]).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "compact", progress=False)
    graphed = GraphedDecoder(load(tmp_path / "compact", device="cpu"))
    assert not graphed._captures
    made = []

    class Step:
        def __init__(self, decoder, batch, cache, width, pool) -> None:
            made.append((bucket(len(batch.tokens)), width))
            self.table_width = width

    monkeypatch.setattr(graphs, "CapturedStep", Step)
    monkeypatch.setattr(graphs.torch.cuda, "graph_pool_handle", lambda: (0, 1))
    for rows, blocks in ((3, 5), (4, 64), (4, 65), (3, 100), (5, 5)):
        batch = padding(rows, blocks, CPU)
        step = graphed._captured(batch, None)
        assert step is graphed._captured(batch, None)
    assert made == [(4, 64), (4, 128), (8, 64)]
