"""Triton kernels of the bitmap format at one row of x; above, see triton_sparse.py.

Where rows keep nearly equally many weights (sparse_layout.py), a thread walks one row: the next eight values are one
load of 16 bytes, the steps between their columns one of 4. The neighbours of a thread walk the rows next to its own
and stay close to its column, so that what they gather of x lies in a few lines of the first-level cache. The warps of
a program take shares of the same rows, which are added at the end: no launch more, whatever stands around.

Other matrices are put together tile by tile and multiplied, which takes many more instructions a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_sparse, tuning
from .sparse_layout import CHECK, RUN, UNIT
from .triton_sparse import finish, halves, singles
from .triton_sparse_tiles import bitmap_tile
from .unit import Around

_RUN, _UNIT, _CHECK = tl.constexpr(RUN), tl.constexpr(UNIT), tl.constexpr(CHECK)


@triton.jit
def _row_scale(x_ptr, K, eps, BLOCK: tl.constexpr):
    """1 / rms of x [K]."""
    squares = tl.zeros([BLOCK], tl.float32)
    k = tl.arange(0, BLOCK)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        squares += x * x
    return 1.0 / tl.sqrt(tl.sum(squares, axis=0) / K + eps)


@triton.jit
def _two_words(ptr, at, mask):
    """8-byte words `at` and at + 1 of ptr, in one load of 16 bytes."""
    both = ptr + at[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(both, mask=mask[:, None], other=0, eviction_policy="evict_first"))


@triton.jit
def _eight(ptr, at, mask):
    """Values at to at + 7 of ptr in fp32, `at` a multiple of 8: eight tensors of its shape."""
    words = ptr.to(tl.pointer_type(tl.int64))
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    if tl.float32 == DTYPE:
        a, b = _two_words(words, at // 2, mask)
        c, d = _two_words(words, at // 2 + 2, mask)
        v0, v1 = singles(a)
        v2, v3 = singles(b)
        v4, v5 = singles(c)
        v6, v7 = singles(d)
        return v0, v1, v2, v3, v4, v5, v6, v7
    else:
        a, b = _two_words(words, at // 4, mask)
        v0, v1, v2, v3 = halves(a, DTYPE)
        v4, v5, v6, v7 = halves(b, DTYPE)
        return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _walk(x_ptr, norm_ptr, values_ptr, steps_ptr, columns_ptr, n, inside, rows, first, runs, share, NORM: tl.constexpr):
    """Sums over `share` runs of rows n from `first` on, which begins a check; one thread has one of each: [LANES]."""
    UNITS: tl.constexpr = _RUN // _UNIT
    mask = inside & (first < runs)
    column = tl.load(columns_ptr + (first // (_CHECK // _RUN)).to(tl.int64) * rows + n, mask=mask, other=0)
    sums = tl.zeros(column.shape, tl.float32)
    for step in range(share):
        mask = inside & (first + step < runs)
        run = (first + step).to(tl.int64)
        for unit in tl.static_range(UNITS):
            word = tl.load(
                steps_ptr + (run * UNITS + unit) * rows + n, mask=mask, other=0, eviction_policy="evict_first"
            )
            values = _eight(values_ptr, (run * rows + n) * _RUN + unit * _UNIT, mask)
            for i in tl.static_range(_UNIT):
                column += (word >> (4 * i)) & 15
                x = tl.load(x_ptr + column, eviction_policy="evict_last").to(tl.float32)
                if NORM:
                    x *= tl.load(norm_ptr + column, eviction_policy="evict_last")
                sums += values[i] * x
    return sums


@triton.jit
def _ell_gemv(
    x_ptr,
    values_ptr,
    steps_ptr,
    columns_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    N,
    K,
    rows,
    runs,
    share,
    eps,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    lane = tl.arange(0, SHARES * BLOCK_N)
    row, first = tl.program_id(0) * BLOCK_N + lane % BLOCK_N, lane // BLOCK_N * share
    ell = (x_ptr, norm_ptr, values_ptr, steps_ptr, columns_ptr)
    sums = _walk(*ell, row, row < N, rows, first, runs, share, NORM)
    y = tl.sum(sums.reshape(SHARES, BLOCK_N), axis=0)
    up = y
    if ACT != "":
        sums = _walk(*ell, N + row, row < N, rows, first, runs, share, NORM)
        up = tl.sum(sums.reshape(SHARES, BLOCK_N), axis=0)
    scale = 1.0
    if NORM:
        scale = _row_scale(x_ptr, K, eps, BLOCK_X)
    finish(y, up, scale, n, N, 0, bias_ptr, residual_ptr, y_ptr, HAS_BIAS, ACT, ADD)


@triton.jit
def _bitmap_gemv(
    x_ptr,
    weights,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    N,
    K,
    words,
    jump,
    eps,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for t in range(tl.cdiv(K, BLOCK_K)):
        k = t * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last")
        w, _, _ = bitmap_tile(weights, n, N, t, words, jump, BLOCK_N, BLOCK_K)
        total += w.to(tl.float32) * x[None, :]
        if ACT != "":
            w, _, _ = bitmap_tile(weights, N + n, 2 * N, t, words, jump, BLOCK_N, BLOCK_K)
            up += w.to(tl.float32) * x[None, :]
    scale = 1.0
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / K + eps)
    sums, up_sums = tl.sum(total, axis=1), tl.sum(up, axis=1)
    finish(sums, up_sums, scale, n, N, 0, bias_ptr, residual_ptr, y_ptr, HAS_BIAS, ACT, ADD)


def bitmap_linear(
    x: torch.Tensor,
    laid: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    sizes: Sequence[int],
    wide: bool = False,
    around: Around | None = None,
) -> torch.Tensor:
    """x [M, K], sizes (N, K, jump), bias [N] or None of x's dtype -> y [M, N] of that dtype or fp32.

    laid: values, steps, columns for one row that is walked in step, else values, bits, ahead, starts. around: y
    [M, N / 2] where it has an activation; one launch. Without, more rows than tuning.EXPANDED_ROWS go to cuBLAS.
    """
    n, k, jump = sizes
    if x.shape[0] == 1:
        return _gemv(x, laid, bias, sizes, wide, around or Around())
    weights = triton_sparse.Weights(tuple(laid), n, k, laid[1].shape[1], jump, two_four=False)
    return triton_sparse.rows(x, weights, bias, wide, around)


def _gemv(
    x: torch.Tensor,
    laid: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    sizes: Sequence[int],
    wide: bool,
    around: Around,
) -> torch.Tensor:
    (rows, k, jump), name = sizes, tuning.target()
    n = rows // (2 if around.act else 1)
    y = x.new_empty(1, n, dtype=torch.float32 if wide else x.dtype)
    behind = (bias, around.norm, around.residual, y, n, k)
    flags: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "NORM": around.norm is not None,
        "ACT": around.act or "",
        "ADD": around.residual is not None,
    }
    if len(laid) == 3:
        tile, early = tuning.ELL_GEMV.get(name, tuning.ELL_GEMV["default"]), tuning.overlaps(name)
        runs, check = len(laid[1]) * UNIT // RUN, CHECK // RUN
        share = triton.cdiv(triton.cdiv(runs, check), tile.warps) * check
        flags |= {"EARLY": early, "SHARES": tile.warps, "BLOCK_N": tile.n, "BLOCK_X": 1024, "num_warps": tile.warps}
        flags |= {"launch_pdl": True} if early else {}
        grid = (triton.cdiv(n, tile.n),)
        _ell_gemv[grid](x, *laid, *behind, rows, runs, share, around.eps, **flags)
        return y
    tile = tuning.bitmap_tile(name, gated=bool(around.act))
    flags |= tuning.blocks(tile)
    _bitmap_gemv[(triton.cdiv(n, tile.n),)](x, tuple(laid), *behind, laid[1].shape[1], jump, around.eps, **flags)
    return y
