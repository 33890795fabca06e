"""The tiles that GPUs get, on ragged shapes in the interpreter; test_triton_interpret.py runs it.

Everywhere else the interpreter takes large tiles of its own, since it pays by the operation.
"""

from __future__ import annotations

import pytest
import torch

from pared.kernels import attention, bitmap, decode, triton_attention, triton_basis, triton_dense, tuning, two_four
from pared.kernels.around import reference
from pared.kernels.shared_basis import ALIGN
from pared.kernels.unit import Around, Prepared, Unit
from pared.tests.test_attention import STEPS, Case, arguments, check_step, definition, step_arguments, torch_own
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


@pytest.mark.parametrize("name", ["decode", "eight heads a key head", "heads of their own", "a long one in a window"])
def test_a_decode_step(name):
    given = step_arguments(STEPS[name], torch.float32, 16, normed=True)
    copies = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in given)
    with poisoned():
        y = decode.decode(*copies)
    check_step(given, y, copies[3:5])


@pytest.mark.parametrize("rows", [1, 3, 20, 64])
@pytest.mark.parametrize("gated", [False, True])
def test_a_linear_and_what_stands_around_it(rows, gated):
    x, weight, bias = torch.randn(rows, 300), torch.randn(66, 300) * 300**-0.5, torch.randn(66)
    residual = torch.randn(rows, 33 if gated else 66)
    around = Around(torch.rand(300) + 0.5, 1e-5, "gelu" if gated else None, residual)
    with poisoned():
        y = triton_dense.linear(x, weight, bias, around=around)
    wide = Around(around.norm.double(), 1e-5, around.act, residual.double())
    assert_as_good(
        y,
        reference(x, lambda x: torch.nn.functional.linear(x, weight, bias), around),
        reference(x, lambda x: x.double() @ weight.double().t() + bias.double(), wide).double(),
    )


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_basis_and_what_stands_around_it(rows):
    """gate | up of different ranks, the second pivoted; K of 2090 is cut for the first launch."""
    x, residual, k = torch.randn(rows, 2090), torch.randn(rows, 33), 2090
    order = torch.randperm(k).int()
    bases = [torch.randn(21, k) * k**-0.5, torch.randn(40, k - 40) * k**-0.5]
    full = [bases[0], torch.cat([torch.eye(40), bases[1]], dim=1)[:, order.long().argsort()]]
    coefficients = [torch.randn(33, 21) * 21**-0.5, torch.randn(33, 40) * 40**-0.5]
    biases = [torch.randn(33), None]
    around = Around(torch.rand(k) + 0.5, 1e-5, "silu", residual)
    with poisoned():
        y = triton_basis.basis_linear(x, [None, order], bases, coefficients, biases, around)

    def linear(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ys = [x.to(dtype) @ b.to(dtype).t() @ c.to(dtype).t() for b, c in zip(full, coefficients, strict=True)]
        return torch.cat([ys[0] + biases[0].to(dtype), ys[1]], dim=1)

    own = reference(x, lambda x: linear(x, torch.float32), around)
    assert_as_good(y, own, reference(x, lambda x: linear(x, torch.float64), around))


def zeros_in(n: int, k: int, pattern: str) -> tuple[torch.Tensor, Prepared, object]:
    """A weight of half zeros, its layout for a GPU, and the format. pattern: 2:4, even rows or odd ones."""
    if tuning.target() == "gfx942":
        pytest.skip("sparse formats have the same tiles, or wider ones")
    order = torch.rand(n, k // 4, 4).argsort(dim=2).flatten(1) if pattern == "2:4" else torch.rand(n, k).argsort(dim=1)
    weight = torch.randn(n, k) * k**-0.5
    weight[order >= (2 if pattern == "2:4" else k // 2)] = 0
    if pattern == "odd rows":
        weight[: n // 4] = 0
    module = two_four if pattern == "2:4" else bitmap
    prepared = module.prepare(module.encode(Unit({"m": (n, k)}, {"weight": weight, "bias": torch.randn(n)})), "cpu")
    assert pattern == "2:4" or (prepared.tensors[4] is not None) == (pattern == "even rows")
    return weight, prepared, module


@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 37, 1048), (1, 5, 4200), (3, 33, 600), (16, 40, 152), (20, 33, 72)], ids=str
)
@pytest.mark.parametrize("pattern", ["2:4", "even rows", "odd rows"])
def test_sparse_linear(rows, n, k, pattern):
    """Long K are cut where grids are small; beyond 16 rows fp32 has the whole weight made dense."""
    weight, prepared, module = zeros_in(n, k, pattern)
    x, bias = torch.randn(rows, k), prepared.tensors[-1]
    with poisoned():
        y = module.apply(x, prepared, "m")
        again = module.apply(x, prepared, "m")
    truth = x.double() @ weight.double().t() + bias.double()
    assert_as_good(y, torch.nn.functional.linear(x, weight, bias), truth)
    assert torch.equal(y, again)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("pattern", ["2:4", "even rows", "odd rows"])
def test_a_sparse_linear_and_what_stands_around_it(rows, pattern):
    weight, prepared, module = zeros_in(66, 300, pattern)
    x, residual, bias = torch.randn(rows, 300), torch.randn(rows, 33), prepared.tensors[-1]
    around = Around(torch.rand(300) + 0.5, 1e-5, "gelu", residual)
    with poisoned():
        y = module.apply_around(x, prepared, "m", around)
    wide = Around(around.norm.double(), 1e-5, "gelu", residual.double())
    assert_as_good(
        y,
        reference(x, lambda x: torch.nn.functional.linear(x, weight, bias), around),
        reference(x, lambda x: x.double() @ weight.double().t() + bias.double(), wide).double(),
    )
