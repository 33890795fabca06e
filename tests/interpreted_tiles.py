"""The tiles that GPUs get, on ragged shapes in the interpreter; test_triton_interpret.py runs it.

Everywhere else the interpreter takes large tiles of its own, since it pays by the operation.
"""

from __future__ import annotations

import pytest
import torch

from pared.kernels import attention, triton_attention, triton_dense, tuning
from pared.tests.test_attention import Case, arguments, definition, torch_own
from pared.tests.truth import assert_as_good, poisoned


@pytest.fixture(autouse=True, params=["default", "gfx942"])
def gpu(request, monkeypatch):
    monkeypatch.setattr(tuning, "target", lambda: request.param)


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 5, 2090), (3, 33, 2090), (33, 40, 150), (65, 70, 150), (130, 33, 70)])
def test_linear(rows, n, k):
    """The first two are cut along K: their grids are small."""
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k) * k**-0.5, torch.randn(n)
    with poisoned():
        y = triton_dense.linear(x, weight, bias)
        again = triton_dense.linear(x, weight, bias)
    truth = x.double() @ weight.double().t() + bias.double()
    assert_as_good(y, torch.nn.functional.linear(x, weight, bias), truth)
    assert torch.equal(y, again)


@pytest.mark.parametrize("window", [0, 70])
def test_attention(window):
    given = arguments(Case(((1, 130), (40, 100)), heads=2, kv_heads=1, page=16, window=window), torch.float32)
    with poisoned():
        y = triton_attention.paged_attention(*given)
    assert_as_good(y, torch_own(given), definition(given, torch.float64))
    assert_as_good(y, attention.reference(*given), definition(given, torch.float64))
