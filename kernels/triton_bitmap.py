"""Triton kernels of the bitmap format at one row of x; above, see triton_sparse.py.

Where rows keep nearly equally many weights (sparse_layout.py), a thread walks one row: the next eight values are one
load of 16 bytes, the steps between their columns one of 4. The neighbours of a thread walk the rows next to its own
and stay close to its column, so that what they gather of x lies in a few lines of the first-level cache. The warps of
a program take shares of the same rows, which are added at the end: no launch more, whatever stands around.

Other matrices are put together tile by tile and multiplied, which takes many more instructions a weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_sparse, tuning
from .sparse_layout import CHECK, RUN, UNIT, Bitmap
from .triton_sparse import finish
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
def _walk(
    x_ptr, norm_ptr, values_ptr, steps_ptr, columns_ptr, n, inside, rows, first, last, NORM: tl.constexpr
):
    """Sums [SHARES, BLOCK_N] of rows n over the runs first [SHARES, 1] up to last; first begins a check."""
    i = tl.arange(0, _UNIT)[None, None, :]
    mask = inside & (first < last)
    column = tl.load(columns_ptr + (first // (_CHECK // _RUN)).to(tl.int64) * rows + n, mask=mask, other=0)
    sums = tl.zeros([first.shape[0], n.shape[1], _UNIT], tl.float32)
    for step in range(tl.max(tl.max(last - first, axis=1), axis=0)):
        run = (first + step).to(tl.int64)
        mask = inside & (run < last)
        at = run * rows + n
        for unit in tl.static_range(_RUN // _UNIT):
            word = tl.load(
                steps_ptr + (run * (_RUN // _UNIT) + unit) * rows + n, mask=mask, other=0, eviction_policy="evict_first"
            )
            value_at = values_ptr + (at * _RUN + unit * _UNIT)[:, :, None] + i
            value = tl.load(value_at, mask=mask[:, :, None], other=0.0, eviction_policy="evict_first")
            steps = (word[:, :, None] >> (4 * i)) & 15
            columns = column[:, :, None] + tl.cumsum(steps, axis=2)
            x = tl.load(x_ptr + columns, eviction_policy="evict_last").to(tl.float32)
            if NORM:
                x *= tl.load(norm_ptr + columns, eviction_policy="evict_last")
            sums += value.to(tl.float32) * x
            column += tl.sum(steps, axis=2)
    return tl.sum(tl.sum(sums, axis=2), axis=0)


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
    first = (tl.arange(0, SHARES) * share)[:, None]
    last = tl.minimum(first + share, runs)
    lanes, inside = n[None, :], (n < N)[None, :]
    ell = (x_ptr, norm_ptr, values_ptr, steps_ptr, columns_ptr)
    y = _walk(*ell, lanes, inside, rows, first, last, NORM)
    up = y
    if ACT != "":
        up = _walk(*ell, N + lanes, inside, rows, first, last, NORM)
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
    x: torch.Tensor, laid: Bitmap, bias: torch.Tensor | None, wide: bool = False, around: Around | None = None
) -> torch.Tensor:
    """x [M, K], laid and bias [N] or None of its dtype -> y [M, N] of that dtype or fp32.

    around: y [M, N / 2] where it has an activation; one launch. Without, more rows than tuning.EXPANDED_ROWS go to
    cuBLAS.
    """
    if x.shape[0] == 1:
        return _gemv(x, laid, bias, wide, around or Around())
    n, words = laid.bits.shape
    tensors = (laid.values, laid.bits, laid.ahead, laid.starts)
    weights = triton_sparse.Weights(tensors, n, x.shape[1], words, laid.jump, two_four=False)
    return triton_sparse.rows(x, weights, bias, wide, around)


def _gemv(x: torch.Tensor, laid: Bitmap, bias: torch.Tensor | None, wide: bool, around: Around) -> torch.Tensor:
    rows, k, name = len(laid.bits), x.shape[1], tuning.target()
    n = rows // (2 if around.act else 1)
    y = x.new_empty(1, n, dtype=torch.float32 if wide else x.dtype)
    flags: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "NORM": around.norm is not None,
        "ACT": around.act or "",
        "ADD": around.residual is not None,
    }
    behind = (bias, around.norm, around.residual, y, n, k)
    if laid.steps is None or laid.columns is None:
        tile = tuning.bitmap_tile(name, gated=bool(around.act))
        weights = (laid.values, laid.bits, laid.ahead, laid.starts)
        grid = (triton.cdiv(n, tile.n),)
        _bitmap_gemv[grid](x, weights, *behind, laid.bits.shape[1], laid.jump, around.eps, **flags, **tuning.blocks(tile))
        return y
    tile, early = tuning.ELL_GEMV.get(name, tuning.ELL_GEMV["default"]), tuning.overlaps(name)
    runs, check = len(laid.steps) * UNIT // RUN, CHECK // RUN
    share = triton.cdiv(triton.cdiv(runs, check), tile.warps) * check
    _ell_gemv[(triton.cdiv(n, tile.n),)](
        x,
        laid.values,
        laid.steps,
        laid.columns,
        *behind,
        rows,
        runs,
        share,
        around.eps,
        **flags,
        EARLY=early,
        SHARES=tile.warps,
        BLOCK_N=tile.n,
        BLOCK_X=1024,
        num_warps=tile.warps,
        **({"launch_pdl": True} if early else {}),
    )
    return y
