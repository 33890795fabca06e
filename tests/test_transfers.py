"""What a step moves between host and device: one transfer of its batch there, one read of its tokens back.

tests/test_gpu.py lets torch itself say the same on a GPU.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pared.convert import convert
from pared.runtime.batch import build_batch
from pared.runtime.cache import KVCache
from pared.runtime.engine import EngineCore
from pared.runtime.loader import load
from pared.runtime.params import SamplingParams
from pared.runtime.sampler import sample
from pared.runtime.sequence import Chunk, Sequence
from pared.tests import tiny

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal")
OPTIONS = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 3},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.2, "logit_bias": {3: 1.0}},
    "barred": {"min_tokens": 6, "stop_token_ids": (5,)},
}


class Reads(TorchFunctionMode):
    """Counts the calls for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.names += [name] if name in READS else []
        return func(*args, **(kwargs or {}))


class Transfers(TorchDispatchMode):
    """Counts ops that read a tensor of the CPU and make one elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = [value.device.type for value in args if isinstance(value, torch.Tensor)]
        if "cpu" in read and isinstance(out, torch.Tensor) and out.device.type != "cpu":
            self.ops[func._schema.name] += 1
        return out


def sequence(tokens: list[int], blocks: list[int], rope_floor: int, **options: object) -> Sequence:
    params = SamplingParams(**options)
    return Sequence(0, tokens, 2, params, frozenset(params.stop_token_ids), 99, rope_floor, blocks=blocks)


def chunks() -> list[Chunk]:
    """Five rows of a prompt, a decode step, and a chunk that ends before its prompt does."""
    first, second = sequence([7, 8, 9, 6, 5], [3, 1], 5), sequence([1, 2, 4, 3, 2, 1, 0, 9, 8], [2, 5, 4], 2)
    third = sequence([4, 4, 4, 4], [6], 9)
    return [Chunk(first, 0, 5), Chunk(second, 8, 9), Chunk(third, 1, 3)]


def test_a_batch_is_its_definition() -> None:
    batch = build_batch(chunks(), 4, "cpu")
    assert batch.tokens.tolist() == [7, 8, 9, 6, 5, 8, 4, 4]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 8, 1, 2]
    assert batch.rope_lens.tolist() == [5, 5, 5, 5, 5, 9, 9, 9]
    assert batch.slots.tolist() == [12, 13, 14, 15, 4, 16, 25, 26]
    assert batch.query_starts.tolist() == [0, 5, 6, 8]
    assert batch.context_lens.tolist() == [5, 9, 3]
    assert batch.block_tables.tolist() == [[3, 1, 0], [2, 5, 4], [6, 0, 0]]
    assert batch.logit_rows.tolist() == [4, 5]
    assert batch.max_query == 5
    assert {name: value.dtype for name, value in vars(batch).items() if name != "max_query"} == {
        **dict.fromkeys(("tokens", "positions", "rope_lens", "slots", "logit_rows"), torch.int64),
        **dict.fromkeys(("query_starts", "context_lens", "block_tables"), torch.int32),
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_batch_moves_in_one_transfer_and_every_part_is_aligned(count: int) -> None:
    with Transfers() as seen:
        there = build_batch(chunks()[:count], 4, "meta")
    assert seen.ops.total() == 1
    here = build_batch(chunks()[:count], 4, "cpu")
    for name, value in vars(here).items():
        if isinstance(value, torch.Tensor):
            assert value.data_ptr() % 16 == 0 or not value.numel(), name
            assert value.is_contiguous(), name
            assert getattr(there, name).shape == value.shape


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    home = tmp_path_factory.mktemp("transfers")
    convert(tiny.checkpoint(home / "hf"), home / "compact", progress=False)
    decoder = load(home / "compact", device="cpu")
    heads = [layer.kv_heads for layer in decoder.spec.layers]
    cache = KVCache(heads, decoder.spec.head_dim, 64, 4, decoder.dtype, "cpu")
    return EngineCore(decoder, cache, context=32, eos=frozenset(), max_batch=8, chunk=64)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_step_reads_its_tokens_and_nothing_else(core: EngineCore, options: dict) -> None:
    for prompt in ([1, 2, 3], [4, 5]):
        core.add(prompt, SamplingParams(max_tokens=6, **options))
    found = []
    while core.busy:
        with Reads() as seen:
            core.step()
        found.append(seen.names)
    assert found == [["tolist"]] * 6


def test_plain_greedy_sampling_moves_nothing_to_the_device() -> None:
    """On meta tensors everything runs but the read itself."""
    with Transfers() as seen, Reads() as reads, pytest.raises(NotImplementedError):
        sample(torch.empty(2, 9, device="meta"), [sequence([1, 2], [1], 2) for _ in range(2)])
    assert not seen.ops
    assert reads.names == ["tolist"]
