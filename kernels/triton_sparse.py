"""What the Triton kernels of the sparse formats share: groups of four inputs, the end of a row, tiles made dense.

A tile is [BLOCK_N, BLOCK_K] of the dense weight, put together in registers. Above one row of x it goes through tensor
cores, for all rows at once (`_gemm`); above tuning.EXPANDED_ROWS it is written down (`_spread`), for cuBLAS to read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import tuning
from .triton_dense import SUM_BLOCK, _sum_partials
from .triton_fused import activate
from .triton_sparse_tiles import bitmap_tile, two_four_tile
from .unit import Around


@triton.jit
def singles(word):
    """The two fp32 numbers of each 8-byte word."""
    return word.to(tl.int32).to(tl.float32, bitcast=True), (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _half(bits, DTYPE: tl.constexpr):
    return bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def halves(word, DTYPE: tl.constexpr):
    """The four numbers of a 16-bit DTYPE of each 8-byte word, in fp32."""
    return _half(word, DTYPE), _half(word >> 16, DTYPE), _half(word >> 32, DTYPE), _half(word >> 48, DTYPE)


@triton.jit
def quad(ptr, group, mask):
    """Elements 4 group to 4 group + 3 in fp32, read 8 or 16 bytes at a time: four tensors as long as `group`."""
    words = ptr.to(tl.pointer_type(tl.int64))
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    if tl.float32 == DTYPE:
        at = words + 2 * group[:, None] + tl.arange(0, 2)[None, :]
        low, high = tl.split(tl.load(at, mask=mask[:, None], other=0, eviction_policy="evict_last"))
        x0, x1 = singles(low)
        x2, x3 = singles(high)
        return x0, x1, x2, x3
    else:
        word = tl.load(words + group, mask=mask, other=0, eviction_policy="evict_last")
        return halves(word, DTYPE)


@triton.jit
def finish(
    y,
    up,
    scale,
    n,
    N,
    split,
    bias_ptr,
    residual_ptr,
    y_ptr,
    HAS_BIAS: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
):
    """Store outputs n of one row from their sums y, or of gate and `up`: scaled, with bias, activation and residual."""
    y *= scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if ACT != "":
        up *= scale
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        y = activate(y, ACT) * up
    if ADD:
        y += tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + split * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _tile(weights, n, rows, t, width, jump, TWO_FOUR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(tile t of rows n, zero beyond `rows` of them; its first column; the column where it ends)."""
    if TWO_FOUR:
        return two_four_tile(weights, n, rows, t, width, BLOCK_N, BLOCK_K)
    else:
        return bitmap_tile(weights, n, rows, t, width, jump, BLOCK_N, BLOCK_K)


@triton.jit
def _gemm(
    x_ptr,
    weights,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    M,
    N,
    K,
    width,
    jump,
    tiles,
    t_split,
    eps,
    TWO_FOUR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    x_rows = x_ptr + m[:, None].to(tl.int64) * K
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for t in range(split * t_split, min(split * t_split + t_split, tiles)):
        w, start, stop = _tile(weights, n, N, t, width, jump, TWO_FOUR, BLOCK_N, BLOCK_K)
        k = start + tl.arange(0, BLOCK_K)
        inside = k < min(stop, K)
        x = tl.load(x_rows + k[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += wide * wide
            x = (wide * tl.load(norm_ptr + k, mask=inside, other=0.0)[None, :]).to(x.dtype)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        if ACT != "":
            w, start, stop = _tile(weights, N + n, 2 * N, t, width, jump, TWO_FOUR, BLOCK_N, BLOCK_K)
            up = tl.dot(x, tl.trans(w), up, input_precision="ieee")
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / K + eps)
        total *= scale[:, None]
        up *= scale[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if ACT != "":
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        total = activate(total, ACT) * up
    at = (split.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _spread(
    weights, y_ptr, N, K, width, jump, tiles, TWO_FOUR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    w, start, stop = _tile(weights, n, N, tl.program_id(0), width, jump, TWO_FOUR, BLOCK_N, BLOCK_K)
    k = start + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < min(stop, K))[None, :]
    tl.store(y_ptr + n[:, None].to(tl.int64) * K + k[None, :], w, mask=mask)


class Weights:
    """A sparse weight [N, K] as the kernels take it: tensors, and `width`, `jump` of sparse_layout.py."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], n: int, k: int, width: int, jump: int, two_four: bool):
        self.tensors, self.n, self.k, self.two_four = tensors, n, k, two_four
        self.width, self.jump = width, jump

    def tiles(self, columns: int) -> int:
        """Tiles of so many columns that a row has."""
        if self.two_four:
            return 8 * triton.cdiv(self.width, columns // 4)
        return triton.cdiv(self.k, columns)


def rows(
    x: torch.Tensor, weights: Weights, bias: torch.Tensor | None, wide: bool, around: Around | None
) -> torch.Tensor:
    """x [M, K] -> y [M, N]: tiles made dense for tensor cores, or from tuning.EXPANDED_ROWS on the whole weight."""
    if around is None and x.shape[0] > tuning.expanded_rows(x.dtype, tuning.target()):
        return spread(x, weights, bias, wide)
    return gemm(x, weights, bias, wide, around)


def gemm(
    x: torch.Tensor, weights: Weights, bias: torch.Tensor | None, wide: bool, around: Around | None
) -> torch.Tensor:
    """x [M, K] -> y [M, N] of x's dtype or fp32; [M, N / 2] with an activation. Around: one launch, else K is split."""
    m, n = x.shape[0], weights.n // (2 if around and around.act else 1)
    y = x.new_empty(m, n, dtype=torch.float32 if wide else x.dtype)
    name = tuning.target()
    tile = tuning.sparse_tile(m, x.dtype, name, gated=bool(around and around.act))
    grid, tiles = (triton.cdiv(m, tile.m), triton.cdiv(n, tile.n)), weights.tiles(tile.k)
    splits = 1 if around else min(tiles, tuning.splits(grid[0] * grid[1], weights.k, tile, name))
    given = around or Around()
    arguments: dict[str, Any] = {
        "TWO_FOUR": weights.two_four,
        "HAS_BIAS": bias is not None and splits == 1,
        "NORM": given.norm is not None,
        "ACT": given.act or "",
        "ADD": given.residual is not None,
        "BLOCK_M": tile.m,
        **tuning.blocks(tile),
    }
    out = y if splits == 1 else x.new_empty(splits, m, n, dtype=torch.float32)
    sizes = (m, n, weights.k, weights.width, weights.jump, tiles, triton.cdiv(tiles, splits))
    _gemm[(*grid, splits)](x, weights.tensors, bias, given.norm, given.residual, out, *sizes, given.eps, **arguments)
    return y if splits == 1 else add_up(out, bias, y)


def add_up(partials: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """y [M, N] = the sum of partials [splits, M, N] in their order, and bias."""
    size, n = y.numel(), y.shape[1]
    _sum_partials[(triton.cdiv(size, SUM_BLOCK),)](
        partials, bias, y, size, n, SPLITS=len(partials), HAS_BIAS=bias is not None, BLOCK=SUM_BLOCK
    )
    return y


def spread(x: torch.Tensor, weights: Weights, bias: torch.Tensor | None, wide: bool) -> torch.Tensor:
    """x [M, K] times the whole weight, made dense for this one product.

    The scratch comes from torch's allocator: the next layer gets the same memory, on its own stream and in a captured
    graph as well.
    """
    name = tuning.target()
    tile = tuning.SPREAD.get(name, tuning.SPREAD["default"])
    dense = x.new_empty(weights.n, weights.k)
    tiles = weights.tiles(tile.k)
    sizes = (weights.n, weights.k, weights.width, weights.jump, tiles)
    grid = (tiles, triton.cdiv(weights.n, tile.n))
    _spread[grid](weights.tensors, dense, *sizes, TWO_FOUR=weights.two_four, **tuning.blocks(tile))
    y = F.linear(x, dense, bias)
    return y.float() if wide else y
