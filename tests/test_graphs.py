"""Decode steps from tapes: the same bits as the decoder, whatever grows, shrinks or moves between two steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pared.convert import convert
from pared.errors import FallbackRefused
from pared.kernels import dispatch
from pared.kernels.native import library
from pared.runtime import graphs
from pared.runtime.graphs import GraphedDecoder
from pared.runtime.llm import LLM
from pared.runtime.loader import load
from pared.runtime.model import Decoder
from pared.runtime.params import SamplingParams
from pared.tests import tiny
from pared.tests.test_model import VARIANTS, Runner, Sequence, random_model, token_rows

NATIVE = library.load()
pytestmark = [
    pytest.mark.skipif(NATIVE is None or NATIVE.level == "scalar", reason="no native kernels to record"),
    pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter takes the Triton path"),
]
STEPS = 6


def decoder_of(name: str, folder: Path, dtype: str = "float32", **options: object) -> Decoder:
    random_model(VARIANTS[name]).save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "compact", progress=False, dtype=dtype, **options)
    return load(folder / "compact", device="cpu")


def decoded(decoder: Decoder | GraphedDecoder, sizes: list[int], vocab: int = 96) -> list[list[torch.Tensor]]:
    """Prompts of different lengths, then one step for each of `sizes`, of so many sequences; their logits."""
    runner = Runner(decoder.decoder if isinstance(decoder, GraphedDecoder) else decoder)
    runner.decoder = decoder
    sequences = [runner.sequence(tokens, floor=len(tokens)) for tokens in token_rows(vocab)]
    run(runner, [(s, len(s.tokens) - 2 * STEPS if len(s.tokens) > 2 * STEPS else 1) for s in sequences])
    for size in sizes:
        run(runner, [(s, 1) for s in sequences[-size:]])
    return [s.logits for s in sequences]


def run(runner: Runner, work: list[tuple[Sequence, int]]) -> None:
    runner.run(work)
    for sequence, count in work:  # the logits of a tape are overwritten by the next step
        sequence.logits[-count:] = [row.clone() for row in sequence.logits[-count:]]


def same(left: list[list[torch.Tensor]], right: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(torch.stack(a), torch.stack(b)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_is_recorded_whole_and_gives_the_same_bits(tmp_path, name):
    decoder = decoder_of(name, tmp_path)
    graphed = GraphedDecoder(decoder)
    sizes = [2] * STEPS + [1] * STEPS
    with dispatch.strict():
        assert same(decoded(graphed, sizes), decoded(decoder, sizes))
    assert {size: step.replays for size, step in graphed._steps.items()} == {2: True, 1: True}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    decoder = decoder_of("llama", tmp_path, dtype)
    graphed, sizes = GraphedDecoder(decoder), [1] * STEPS + [2, 2, 2]
    assert same(decoded(graphed, sizes), decoded(decoder, sizes))
    assert all(step.replays for step in graphed._steps.values())


def test_sizes_may_come_in_any_order_and_tables_may_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "TABLE_WIDTH", 2)
    decoder = decoder_of("qwen3", tmp_path)
    graphed, sizes = GraphedDecoder(decoder), [1, 2, 1, 2, 2, 1, 1, 2, 1]
    assert same(decoded(graphed, sizes), decoded(decoder, sizes))
    assert {step.table_width for step in graphed._steps.values()} == {16}


def test_another_cache_starts_anew(tmp_path):
    decoder = decoder_of("llama", tmp_path)
    graphed = GraphedDecoder(decoder)
    expected = decoded(decoder, [1] * STEPS)
    for _ in range(2):  # a Runner brings its own cache
        assert same(decoded(graphed, [1] * STEPS), expected)


def test_a_basis_beside_dense_modules_is_recorded_too(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 39 + 1}" for i in range(400)))
    source = tiny.checkpoint(tmp_path / "src")
    method = "basis_sharing:ratio=30,group=2,samples=4,length=32,modules=q_proj,up_proj"
    convert(source, tmp_path / "out", progress=False, methods=(method,), calibration=text)
    decoder = load(tmp_path / "out", device="cpu")
    assert len(decoder.weights.blocks[0].qkv.parts) > 1
    graphed, sizes = GraphedDecoder(decoder), [1] * STEPS + [3] * 4
    with dispatch.strict():
        assert same(decoded(graphed, sizes, vocab=40), decoded(decoder, sizes, vocab=40))
    assert all(step.replays for step in graphed._steps.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["bitmap", "two_four"])
def test_sparse_modules_are_recorded_too(tmp_path, format, dtype):
    model, of = random_model(VARIANTS["llama"]), 4 if format == "two_four" else 16
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            chance = torch.rand(parameter.numel() // of, of, generator=torch.Generator().manual_seed(1))
            parameter.data[(chance.argsort(dim=1) < of // 2).view_as(parameter)] = 0
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", progress=False, dtype=dtype)
    decoder = load(tmp_path / "out", device="cpu")
    assert {part.format for part, _ in decoder.weights.blocks[0].qkv.parts} == {format}
    graphed, sizes = GraphedDecoder(decoder), [1] * STEPS + [2] * 4
    with dispatch.strict():
        assert same(decoded(graphed, sizes), decoded(decoder, sizes))
    assert all(step.replays for step in graphed._steps.values())


def test_a_step_with_foreign_parts_is_found_out_and_never_replayed(tmp_path, monkeypatch):
    decoder = decoder_of("llama", tmp_path)
    head = decoder.weights.head
    decoder.weights = replace(decoder.weights, head=lambda x, wide: head(x, wide) * 2)
    expected = decoded(decoder, [1] * STEPS)
    with pytest.raises(FallbackRefused, match="cannot be recorded"), dispatch.strict():
        decoded(GraphedDecoder(decoder), [1] * STEPS)
    monkeypatch.setattr(dispatch, "FALLBACKS", type(dispatch.FALLBACKS)())
    graphed = GraphedDecoder(decoder)
    with pytest.warns(dispatch.SlowerPath, match="decode_step"):
        assert same(decoded(graphed, [1] * STEPS), expected)
    assert [step.replays for step in graphed._steps.values()] == [False]
    assert [op for op, _ in dispatch.FALLBACKS] == ["decode_step"]


def test_large_steps_and_prompts_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST", 1)
    graphed = GraphedDecoder(decoder_of("llama", tmp_path))
    decoded(graphed, [2, 2, 2])
    assert not graphed._steps


def test_without_native_kernels_nothing_is_recorded(tmp_path, monkeypatch):
    decoder = decoder_of("llama", tmp_path)
    monkeypatch.setattr(library, "load", lambda: None)
    assert GraphedDecoder(decoder).largest == 0


def test_a_failing_step_leaves_nothing_half_recorded(tmp_path):
    decoder = decoder_of("llama", tmp_path)
    graphed, expected, head = GraphedDecoder(decoder), decoded(decoder, [1] * STEPS), decoder.weights.head
    decoder.weights = replace(decoder.weights, head=lambda x, wide: 1 / 0 if len(x) == 1 else head(x, wide))
    with pytest.raises(ZeroDivisionError):
        decoded(graphed, [1])
    assert not graphed._steps
    decoder.weights = replace(decoder.weights, head=head)
    assert same(decoded(graphed, [1] * STEPS), expected)


def test_batches_that_grow_and_shrink_answer_as_alone(smollm2):
    prompts = ["The sky is", "Once upon a time, in a small town by the sea, there", "2 + 2 =", "Water boils at"]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (20, 7, 13, 4)]
    llm = LLM(smollm2, max_batch=3, num_blocks=64)
    together = [output.token_ids for output in llm.generate(prompts, params)]
    assert all(step.replays is not False for step in llm.core.model._steps.values())
    assert any(step.replays for step in llm.core.model._steps.values())
    graphs_off = LLM(smollm2, max_batch=3, num_blocks=64)
    graphs_off.core.model = graphs_off.model
    alone = [graphs_off.generate(prompt, each)[0].token_ids for prompt, each in zip(prompts, params, strict=True)]
    matches = sum(a == b for a, b in zip(together, alone, strict=True))
    assert matches >= 3  # in bf16 a lone row adds in another order than its batch (library.linear)
