"""The tiles that GPUs get, on ragged shapes in the interpreter; test_triton_interpret.py runs it.

Everywhere else the interpreter takes large tiles of its own, since it pays by the operation.
"""

from __future__ import annotations

import pytest
import torch

from pared.kernels import attention, triton_attention, triton_basis, triton_dense, tuning
from pared.kernels.shared_basis import ALIGN
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


def zero_columns(weight: torch.Tensor) -> torch.Tensor:
    """As `prepare` lays rows out for a GPU."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % ALIGN))


@pytest.mark.parametrize("lay_out", [zero_columns, torch.clone])
@pytest.mark.parametrize(
    ("rows", "k", "ranks", "outputs"),
    [
        (1, 2090, (21,), (33,)),
        (1, 300, (150, 40, 70), (40, 9, 17)),
        (3, 2090, (21, 7), (40, 33)),
        (70, 150, (70,), (80,)),
    ],
)
@pytest.mark.parametrize("pivoted", ["all", "none", "but the first"])
def test_basis_linear(rows, k, ranks, outputs, pivoted, lay_out):
    """K of 2090 is cut: the grid of the first launch is small. The first part has a bias."""
    x, own, truth, parts = torch.randn(rows, k), [], [], []
    for i, (rank, n) in enumerate(zip(ranks, outputs, strict=True)):
        order = torch.randperm(k).int() if pivoted == "all" or (pivoted != "none" and i) else None
        basis = torch.randn(rank, k - rank if order is not None else k) * k**-0.5
        coefficients, bias = torch.randn(n, rank) * rank**-0.5, None if i else torch.randn(n)
        full = basis
        if order is not None:
            full = torch.cat([torch.eye(rank), basis], dim=1)[:, order.long().argsort()]
        for kept, dtype in ((own, torch.float32), (truth, torch.float64)):
            y = x.to(dtype) @ full.to(dtype).t() @ coefficients.to(dtype).t()
            kept.append(y if bias is None else y + bias.to(dtype))
        parts.append((order, lay_out(basis), lay_out(coefficients), bias))
    arguments = [list(column) for column in zip(*parts, strict=True)]
    with poisoned():
        y = triton_basis.basis_linear(x, *arguments)
        again = triton_basis.basis_linear(x, *arguments)
    assert_as_good(y, torch.cat(own, dim=1), torch.cat(truth, dim=1))
    assert torch.equal(y, again)


@pytest.mark.parametrize("rows", [1, 2])
def test_partial_sums_of_a_basis_are_rounded_as_a_whole_z_is(rows):
    """z = (1 + 2^-9, 1), its small part from another split: bf16 has only 1 of both, so that they cancel."""
    x, basis = torch.zeros(rows, 2090), torch.zeros(2, 2090)
    x[:, 0], x[:, 2000] = 1.0, 2.0**-9
    basis[:, 0], basis[0, 2000] = 1.0, 1.0
    coefficients = torch.tensor([[1.0, -1.0]])
    y = triton_basis.basis_linear(x.bfloat16(), [None], [basis.bfloat16()], [coefficients.bfloat16()], [None])
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("window", [0, 70])
def test_attention(window):
    given = arguments(Case(((1, 130), (40, 100)), heads=2, kv_heads=1, page=16, window=window), torch.float32)
    with poisoned():
        y = triton_attention.paged_attention(*given)
    assert_as_good(y, torch_own(given), definition(given, torch.float64))
    assert_as_good(y, attention.reference(*given), definition(given, torch.float64))
