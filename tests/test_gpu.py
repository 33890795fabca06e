"""The kernel contracts on a real GPU, where there is one: formats, attention, and a captured graph."""

from __future__ import annotations

import pytest
import torch

from pared.kernels import attention, dispatch, formats, shared_basis
from pared.kernels.unit import Unit
from pared.tests.test_attention import CASES, arguments, definition, torch_own
from pared.tests.truth import assert_as_good

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

DEVICE = "cuda"
FORMAT_CASES = [(module, unit) for module in formats.FORMATS for unit in module.cases()]


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64, 130])
def test_every_format_is_as_good_as_its_reference(rows):
    for module, unit in FORMAT_CASES:
        packed, paths = module.encode(unit), list(unit.modules)
        k = unit.modules[paths[0]][1]
        x = torch.randn(rows, k).to(next(iter(unit.tensors.values())).dtype)
        with dispatch.strict():
            y = module.apply(x.to(DEVICE), module.prepare(packed, DEVICE), paths[0]).cpu()
        own = torch.cat([module.reference(x, packed, path) for path in paths], dim=1)
        truth = torch.cat([module.reference(x.float(), packed, path) for path in paths], dim=1)
        assert_as_good(y, own, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_is_as_good_as_torch(case, dtype):
    given = arguments(case, dtype)
    with dispatch.strict():
        y = attention.paged_attention(*(g.to(DEVICE) if isinstance(g, torch.Tensor) else g for g in given)).cpu()
    assert_as_good(y, torch_own(given), definition(given, torch.float64), rounds_inside=True)


@pytest.mark.parametrize("rows", [1, 8])
def test_apply_can_be_captured_in_a_graph_and_replays_bit_for_bit(rows):
    for module, unit in FORMAT_CASES:
        path, (_, k) = next(iter(unit.modules.items()))
        prepared = module.prepare(module.encode(unit), DEVICE)
        x = torch.randn(rows, k, device=DEVICE).to(next(iter(unit.tensors.values())).dtype)
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
