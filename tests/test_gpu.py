"""The kernel contracts on a real GPU, where there is one: formats, attention, and captured graphs."""

from __future__ import annotations

import warnings

import pytest
import torch

from pared.convert import convert
from pared.kernels import attention, bitmap, decode, dense, dispatch, formats, shared_basis, two_four
from pared.kernels.around import reference
from pared.kernels.unit import Around, Unit
from pared.runtime import graphs
from pared.runtime.batch import Batch
from pared.runtime.cache import KVCache
from pared.runtime.captured import bucket, fill, padding
from pared.runtime.engine import EngineCore
from pared.runtime.graphs import GraphedDecoder
from pared.runtime.loader import load
from pared.runtime.params import SamplingParams
from pared.tests.test_attention import (
    CASES,
    STEPS,
    arguments,
    check_step,
    definition,
    step_arguments,
    torch_own,
)
from pared.tests.test_formats import around_of, dtype_of, in_the_order_of_kernels, inputs
from pared.tests.test_model import VARIANTS, random_model
from pared.tests.test_transfers import OPTIONS
from pared.tests.truth import assert_as_good

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

DEVICE = "cuda"
FORMAT_CASES = [(module, unit) for module in formats.FORMATS for unit in module.cases()]
LINEAR_CASES = [(module, unit) for module, unit in FORMAT_CASES if module in formats.LINEAR]


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64, 130])
def test_every_format_is_as_good_as_its_reference(rows):
    for module, unit in FORMAT_CASES:
        packed, paths = module.encode(unit), list(unit.modules)
        k = unit.modules[paths[0]][1]
        x = torch.randn(rows, k).to(dtype_of(unit))
        with dispatch.strict():
            y = module.apply(x.to(DEVICE), module.prepare(packed, DEVICE), paths[0]).cpu()
        own = torch.cat([module.reference(x, packed, path) for path in paths], dim=1)
        truth = torch.cat([module.reference(x.float(), packed, path) for path in paths], dim=1)
        assert_as_good(y, own, truth, rounds_inside=module not in formats.LINEAR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_is_as_good_as_torch(case, dtype):
    given = arguments(case, dtype)
    with dispatch.strict():
        y = attention.paged_attention(*(g.to(DEVICE) if isinstance(g, torch.Tensor) else g for g in given)).cpu()
    assert_as_good(y, torch_own(given), definition(given, torch.float64), rounds_inside=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
def test_a_decode_step_rotates_writes_and_attends(case, normed, dtype):
    given = step_arguments(case, dtype, 16, normed)
    norms = given[11] and tuple(norm.to(DEVICE) for norm in given[11])
    on_gpu = [g.to(DEVICE) if isinstance(g, torch.Tensor) else g for g in given]
    with dispatch.strict():
        y = decode.decode(*on_gpu[:11], norms, *on_gpu[12:])
    check_step(given, y.cpu(), (on_gpu[3].cpu(), on_gpu[4].cpu()))


@pytest.mark.parametrize("kind", ["norm", "norm, gated", "residual", "norm, gated, residual"])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_what_stands_around_a_linear_is_as_good_as_step_by_step(rows, kind):
    for module, unit in LINEAR_CASES:
        dtype, (path, (n, k)) = dtype_of(unit), list(unit.modules.items())[-1]
        if rows > dense.WHOLE_ROWS[dtype] or (dtype != torch.float32 and n < 100):
            continue
        packed, x, around = module.encode(unit), inputs(unit, rows), around_of(kind, rows, k, n, dtype)
        prepared = module.prepare(packed, DEVICE)
        if around.act:
            prepared = module.stack([(prepared, path)] * 2)
        given = Around(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in around))
        y = module.apply_around(x.to(DEVICE), prepared, path, given)
        if y is None:
            assert dtype == torch.float16
            continue

        def linear(x, module=module, packed=packed, path=path, copies=2 if around.act else 1):
            return torch.cat([module.reference(x, packed, path)] * copies, dim=1)

        wide = around._replace(residual=None if around.residual is None else around.residual.float())
        own, truth = in_the_order_of_kernels(x, linear, around), reference(x.float(), linear, wide)
        assert_as_good(y.cpu(), own, truth, rounds_inside=True)


def one_token_each(size: int, position: int, page: int) -> Batch:
    """Sequences of as many blocks as `position` needs, each with blocks of its own."""
    tables = [[1 + 9 * s + block for block in range(position // page + 1)] for s in range(size)]
    return Batch(
        tokens=torch.arange(3, 3 + size, device=DEVICE),
        positions=torch.full((size,), position, device=DEVICE),
        rope_lens=torch.full((size,), position + 1, device=DEVICE),
        slots=torch.tensor([table[-1] * page + position % page for table in tables], device=DEVICE),
        query_starts=torch.arange(size + 1, dtype=torch.int32, device=DEVICE),
        context_lens=torch.full((size,), position + 1, dtype=torch.int32, device=DEVICE),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=DEVICE),
        logit_rows=torch.arange(size, device=DEVICE),
        max_query=1,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt-350m", "mistral-window"])
def test_captured_steps_give_the_bits_of_eager_ones(tmp_path, monkeypatch, name, dtype):
    """Sizes shrink and grow within and across buckets, and tables beyond their width."""
    monkeypatch.setattr(graphs, "TABLE_WIDTH", 2)
    random_model(VARIANTS[name]).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "compact", progress=False, dtype=dtype)
    decoder, page = load(tmp_path / "compact", device=DEVICE), 4
    heads = [layer.kv_heads for layer in decoder.spec.layers]
    cache = KVCache(heads, decoder.spec.head_dim, 64, page, decoder.dtype, DEVICE)
    graphed, widths = GraphedDecoder(decoder), set()
    for position in range(34):
        batch = one_token_each((1, 3, 4, 5, 2)[position % 5], position, page)
        size = len(batch.tokens)
        found = graphed(batch, cache).clone()
        width = graphed._graphs[bucket(size)].table_width
        static = padding(bucket(size), width, decoder.device)
        fill(static, batch, 0)
        assert torch.equal(found, decoder(static, cache)[:size]), position
        if dtype == "float32":
            torch.testing.assert_close(found, decoder(batch, cache), rtol=0, atol=1e-4)
        widths.add(width)
    assert sorted(graphed._graphs) == [1, 2, 4, 8]
    assert widths == {2, 4, 8, 16}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_step_waits_for_nothing_but_its_tokens(tmp_path, options):
    """torch warns of every call that waits: each recorded step has one, the read of what it chose."""
    random_model(VARIANTS["llama"]).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "compact", progress=False, dtype="bfloat16")
    decoder = load(tmp_path / "compact", device=DEVICE)
    heads = [layer.kv_heads for layer in decoder.spec.layers]
    cache = KVCache(heads, decoder.spec.head_dim, 64, 16, decoder.dtype, DEVICE)
    core = EngineCore(GraphedDecoder(decoder), cache, context=40, eos=frozenset(), max_batch=4, chunk=32)
    for prompt in ([1, 2, 3], [4, 5]):
        core.add(prompt, SamplingParams(max_tokens=8, **options))
    for _ in range(3):  # the prompts, and the step that is captured
        core.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        while core.busy:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                core.step()
            assert len(waits) == 1, [str(wait.message) for wait in waits]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [1, 8])
def test_apply_can_be_captured_in_a_graph_and_replays_bit_for_bit(rows):
    for module, unit in FORMAT_CASES:
        path, (_, k) = next(iter(unit.modules.items()))
        prepared = module.prepare(module.encode(unit), DEVICE)
        x = torch.randn(rows, k, device=DEVICE).to(dtype_of(unit))
        eager = module.apply(x, prepared, path)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module.apply(x, prepared, path)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)


def basis_layer(dtype: torch.dtype, device: str) -> tuple[list, object]:
    """q|k|v of an odd rank, v factored and with a bias: the packs, and one Prepared for all."""
    packs = []
    for i, (n, rank) in enumerate(((1024, 683), (1024, 683), (256, 201))):
        basis = (torch.randn(rank, 1024, dtype=torch.float64) / 32).to(dtype)
        tensors = {"basis": basis, f"coefficients.m{i}": (torch.randn(n, rank) * rank**-0.5).to(dtype)}
        if i == 2:
            tensors["bias.m2"] = torch.randn(n).to(dtype)
        unit = Unit({f"m{i}": (n, 1024)}, tensors)
        packs.append(shared_basis.encode(unit if i == 2 else shared_basis.pivot(unit, torch.ones(1024))))
    parts = [(shared_basis.prepare(packed, device), f"m{i}") for i, packed in enumerate(packs)]
    return packs, shared_basis.stack(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64, 130])
def test_stacked_bases_are_as_good_as_their_references(rows, dtype):
    packs, stacked = basis_layer(dtype, DEVICE)
    x = torch.randn(rows, 1024).to(dtype)
    with dispatch.strict():
        y = shared_basis.apply(x.to(DEVICE), stacked, "m0").cpu()
    own, truth = (
        torch.cat([shared_basis.reference(given, packed, f"m{i}") for i, packed in enumerate(packs)], dim=1)
        for given in (x, x.float())
    )
    assert_as_good(y, own, truth)


@pytest.mark.parametrize("rows", [1, 8])
def test_the_second_launch_of_a_basis_waits_for_the_first(rows):
    """It begins before the first has ended; a step that read z too early would differ from one alone."""
    _, stacked = basis_layer(torch.bfloat16, DEVICE)
    inputs = [torch.randn(rows, 1024, device=DEVICE).bfloat16() for _ in range(50)]
    alone = []
    for x in inputs:
        alone.append(shared_basis.apply(x, stacked, "m0"))
        torch.cuda.synchronize()
    for _ in range(20):
        together = [shared_basis.apply(x, stacked, "m0") for x in inputs]
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("pattern", ["2:4", "even rows"])
def test_a_sparse_kernel_waits_for_the_one_ahead_of_it(pattern):
    """It begins before that has ended; one that read x too early would differ from one alone."""
    weight = torch.randn(1024, 1024)
    order = weight.abs().view(1024, -1, 4 if pattern == "2:4" else 1024)
    dropped = order.topk(order.shape[2] // 2, dim=2, largest=False).indices
    weight = weight.view_as(order).scatter(2, dropped, 0).view(1024, 1024).bfloat16() / 32
    module = two_four if pattern == "2:4" else bitmap
    prepared = module.prepare(module.encode(Unit({"m": (1024, 1024)}, {"weight": weight})), DEVICE)
    around = Around(torch.ones(1024, device=DEVICE), 1e-5)
    first = torch.randn(1, 1024, device=DEVICE).bfloat16()

    def chain(wait: bool) -> list[torch.Tensor]:
        xs = [first]
        for _ in range(30):
            xs.append(module.apply_around(xs[-1], prepared, "m", around))
            if wait:
                torch.cuda.synchronize()
        return xs

    alone = chain(wait=True)
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(alone, chain(wait=False), strict=True))
