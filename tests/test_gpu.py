"""The kernel contracts on a real GPU, where there is one: formats, attention, and a captured graph."""

from __future__ import annotations

import pytest
import torch

from pared.kernels import attention, dispatch, formats
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
