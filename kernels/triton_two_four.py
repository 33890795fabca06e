"""Triton kernels of the two_four format: y [M, N] = x [M, K] @ W^T, two values of every four and their positions.

At M = 1 the zeros are not multiplied: a thread takes neighbouring groups, 16 bytes of first values and 16 of second
ones, and each value picks its x of four by two bits of its position. Those four are read once for all rows that a
thread has. Positions are fixed to groups: nothing is counted and no address is computed from data. Above one row, and
for prefill, see triton_sparse.py.

A launch begins while the one ahead of it ends (tuning.overlaps): its first positions are read before it waits for x.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import triton_sparse, tuning
from .triton_sparse import finish, quad
from .unit import Around


@triton.jit
def _products(values, W, mask, code, j: tl.constexpr, x0, x1, x2, x3):
    """The products of a group of every word, whose positions are half byte j of `code`: fp32 [BLOCK_N, BLOCK_W]."""
    one = tl.load(values, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    two = tl.load(values + W, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    code = code >> (4 * j)
    first = tl.where((code & 2) != 0, x2[None, :], tl.where((code & 1) != 0, x1[None, :], x0[None, :]))
    second = tl.where((code & 8) != 0, x3[None, :], tl.where((code & 4) != 0, x2[None, :], x1[None, :]))
    return one * first + two * second


@triton.jit
def _two_four_gemv(
    x_ptr,
    values_ptr,
    words_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    N,
    K,
    units,
    w_split,
    eps,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    W = units * UNIT  # so that the compiler knows how rows are aligned
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    w = tl.arange(0, BLOCK_W)
    rows = n[:, None].to(tl.int64) * W
    words, values = words_ptr + rows + w[None, :], values_ptr + 16 * rows + w[None, :]
    up_rows = (N + n)[:, None].to(tl.int64) * W
    up_words, up_values = words_ptr + up_rows + w[None, :], values_ptr + 16 * up_rows + w[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    squares = tl.zeros([BLOCK_W], tl.float32)
    begin = split * w_split
    stop = min(begin + w_split, W)
    code = tl.load(words + begin, mask=(n < N)[:, None] & (begin + w < stop)[None, :], other=0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for start in range(begin, stop, BLOCK_W):
        inside = start + w < stop
        mask = (n < N)[:, None] & inside[None, :]
        beyond = (n < N)[:, None] & (start + BLOCK_W + w < stop)[None, :]
        ahead = tl.load(words + start + BLOCK_W, mask=beyond, other=0)
        if ACT != "":
            up_code = tl.load(up_words + start, mask=mask, other=0)
        for pair in range(4):
            for j in tl.static_range(2):
                group = (2 * pair + j) * W + start + w
                x0, x1, x2, x3 = quad(x_ptr, group, inside)
                if NORM:
                    squares += x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
                    n0, n1, n2, n3 = quad(norm_ptr, group, inside)
                    x0, x1, x2, x3 = x0 * n0, x1 * n1, x2 * n2, x3 * n3
                at = values + (4 * pair + 2 * j) * W + start
                total += _products(at, W, mask, code, j, x0, x1, x2, x3)
                if ACT != "":
                    at = up_values + (4 * pair + 2 * j) * W + start
                    up += _products(at, W, mask, up_code, j, x0, x1, x2, x3)
            code = code >> 8
            if ACT != "":
                up_code = up_code >> 8
        code = ahead
    scale = 1.0
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / K + eps)
    sums, up_sums = tl.sum(total, axis=1), tl.sum(up, axis=1)
    finish(sums, up_sums, scale, n, N, split, bias_ptr, residual_ptr, y_ptr, HAS_BIAS, ACT, ADD)


def two_four_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None,
    wide: bool = False,
    around: Around | None = None,
) -> torch.Tensor:
    """x [M, K], values [N, 16, W] of its dtype, words int32 [N, W], bias [N] or None -> y [M, N] of that dtype or fp32.

    around: y [M, N / 2] where it has an activation; one launch. Without, more rows than tuning.EXPANDED_ROWS go to
    cuBLAS.
    """
    m, k = x.shape
    if m == 1:
        return _gemv(x, values, words, bias, wide, around)
    n, width = words.shape
    weights = triton_sparse.Weights((values, words), n, k, width, 0, two_four=True)
    return triton_sparse.rows(x, weights, bias, wide, around)


def _gemv(
    x: torch.Tensor,
    values: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None,
    wide: bool,
    around: Around | None,
) -> torch.Tensor:
    given, width = around or Around(), words.shape[1]
    n, name = words.shape[0] // (2 if given.act else 1), tuning.target()
    y = x.new_empty(1, n, dtype=torch.float32 if wide else x.dtype)
    tile = tuning.two_four_tile(name, gated=bool(given.act))
    programs, columns, early = triton.cdiv(n, tile.n), tile.k // 32, tuning.overlaps(name)
    splits = 1 if around else tuning.splits(programs, x.shape[1], tile, name)
    norm, short = given.norm, 32 * width - x.shape[1]
    if short:  # groups are read whole
        x, norm = F.pad(x, (0, short)), None if norm is None else F.pad(norm, (0, short))
    unit = math.gcd(width, 8)
    out = y if splits == 1 else x.new_empty(splits, 1, n, dtype=torch.float32)
    w_split = triton.cdiv(triton.cdiv(width, columns), splits) * columns
    _two_four_gemv[(programs, splits)](
        x,
        values,
        words,
        bias,
        norm,
        given.residual,
        out,
        n,
        x.shape[1] - short,
        width // unit,
        w_split,
        given.eps,
        HAS_BIAS=bias is not None and splits == 1,
        NORM=norm is not None,
        ACT=given.act or "",
        ADD=given.residual is not None,
        EARLY=early,
        UNIT=unit,
        BLOCK_N=tile.n,
        BLOCK_W=columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if early else {}),
    )
    return y if splits == 1 else triton_sparse.add_up(out, bias, y)
