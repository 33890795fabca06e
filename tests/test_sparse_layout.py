"""The GPU layouts of sparse weights: they hold the weight bit for bit, and no more bytes than they are said to."""

from __future__ import annotations

import pytest
import torch

from pared.kernels import bitmap, sparse_layout, two_four
from pared.kernels.sparse_layout import FARTHEST, Bitmap
from pared.kernels.unit import Unit


def half_zero(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Half of every row, as pruning by rows leaves it."""
    weight = torch.randn(n, k)
    return weight.scatter(1, torch.rand(n, k).topk(k // 2, dim=1).indices, 0.0).to(dtype)


def laid_out(weight: torch.Tensor) -> Bitmap:
    packed = bitmap.encode(Unit({"m": tuple(weight.shape)}, {"weight": weight}))
    return sparse_layout.bitmap(packed.tensors["bits"], packed.tensors["values"], weight.shape[1])


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("unit", two_four.cases(), ids=range(len(two_four.cases())))
def test_two_four_comes_back(unit):
    tensors = two_four.encode(unit).tensors
    k = unit.modules["m"][1]
    assert same(
        sparse_layout.two_four_dense(*sparse_layout.two_four(tensors["values"], tensors["positions"], k), k),
        unit.tensors["weight"],
    )


@pytest.mark.parametrize("unit", bitmap.cases(), ids=range(len(bitmap.cases())))
def test_a_bitmap_comes_back(unit):
    weight = unit.tensors["weight"]
    laid = laid_out(weight)
    assert same(sparse_layout.bitmap_dense(laid, weight.shape[1]), weight)
    if laid.steps is not None:
        assert same(sparse_layout.ell_dense(laid, weight.shape[1]), weight)


def test_odd_bits_come_back():
    weight = half_zero(4, 64)
    weight[0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])
    laid = laid_out(weight)
    assert same(sparse_layout.bitmap_dense(laid, 64), weight)


def test_gaps_are_bridged():
    """A step has four bits: zeros are stored on the way, in the bits as well, so that both walks count alike."""
    weight = torch.zeros(3, 100)
    weight[0, 40], weight[0, 60:90] = 1, 2
    weight[1, 15:46], weight[2, ::3] = 3, 4
    laid = laid_out(weight)
    assert laid.steps is not None
    assert same(sparse_layout.ell_dense(laid, 100), weight)
    assert same(sparse_layout.bitmap_dense(laid, 100), weight)
    stored = sparse_layout.bridges(weight != 0)
    assert stored[0].nonzero().flatten().tolist() == [FARTHEST, 2 * FARTHEST, 40 + FARTHEST]
    assert not stored[1:].any()


def test_rows_that_differ_are_walked_by_their_bits():
    weight = half_zero(64, 256)
    weight[:32] = 0
    laid = laid_out(weight)
    assert laid.steps is None
    assert laid.values.numel() == (weight != 0).sum()
    assert same(sparse_layout.bitmap_dense(laid, 256), weight)


@pytest.mark.parametrize(("n", "k"), [(256, 4096), (128, 11008), (64, 14336)], ids=str)
def test_bytes_at_the_widths_of_llama(n, k):
    """Shares of dense bf16. A row with a bridge gives all rows a run more: 1.6 % at 4096 inputs."""
    dense, weight = 2 * n * k, half_zero(n, k)
    laid = laid_out(weight)
    assert 0.5781 <= nbytes(laid.values, laid.bits, laid.ahead, laid.starts) / dense < 0.59
    assert 0.6328 <= nbytes(laid.values, laid.steps, laid.columns) / dense < 0.65
    assert nbytes(*(t for t in laid[:-1])) / dense < 0.73
    pairs = torch.randn(n, k).view(n, k // 4, 4)
    weight = pairs.scatter(2, pairs.abs().topk(2, dim=2, largest=False).indices, 0).view(n, k).bfloat16()
    tensors = two_four.encode(Unit({"m": (n, k)}, {"weight": weight})).tensors
    assert nbytes(*sparse_layout.two_four(tensors["values"], tensors["positions"], k)) / dense == 0.5625


def test_stacking_is_laying_out_together():
    parts = [torch.randn(n, 256).bfloat16() for n in (16, 48)]
    for part in parts:
        part[::2, ::2], part[1::2, 1::2] = 0, 0
    together, joined = laid_out(torch.cat(parts)), sparse_layout.side_by_side([laid_out(part) for part in parts])
    assert joined.jump == together.jump
    assert all(torch.equal(one, other) for one, other in zip(joined[:-1], together[:-1], strict=True))
    parts[0][:, 200] = 1  # a run more for the first part, zeros behind the others' last
    longer = sparse_layout.side_by_side([laid_out(part) for part in parts])
    assert same(sparse_layout.bitmap_dense(longer, 256), torch.cat(parts))
    assert longer.steps.shape == (160 // sparse_layout.UNIT, 64)
    parts[0][:8] = 0
    assert sparse_layout.side_by_side([laid_out(part) for part in parts]) is None
    alone = sparse_layout.side_by_side([laid_out(parts[0])] * 2)
    assert same(sparse_layout.bitmap_dense(alone, 256), torch.cat([parts[0]] * 2))
