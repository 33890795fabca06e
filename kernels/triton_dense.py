"""Triton kernels of the dense format: y [M, N] = x [M, K] @ W [N, K]^T + bias [N].

M = 1 is a stream of weights: 16-byte loads that leave the cache first, products summed in fp32
registers, one reduction at the end; tensor cores would only add work. From M = 2 on a tile of rows
goes through tensor cores, so that weights are read once for all rows of a tile. Where the grid would
not fill the machine K is split: every split writes fp32 partial sums, and a second kernel adds them
in a fixed order, so results do not change from run to run.

What stands around the linear (unit.py) costs no launch of its own. An RMSNorm's weight multiplies x on its way in;
its 1 / rms belongs to a whole row, so the squares are summed beside the products and y is scaled at the end, before
the bias. A gated activation has each program take the same columns of gate and of up. K stays whole then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .triton_fused import activate
from .unit import Around

SUM_BLOCK = 1024


@triton.jit
def _gemv(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    N,
    K,
    k_split,
    eps,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    up_rows = w_ptr + (N + n)[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(split * k_split, min(split * k_split + k_split, K), BLOCK_K):
        inside = start + k < K
        x = tl.load(x_ptr + start + k, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + start + k, mask=inside, other=0.0, eviction_policy="evict_last")
        mask = (n < N)[:, None] & inside[None, :]
        w = tl.load(w_rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
        total += w.to(tl.float32) * x[None, :]
        if ACT != "":
            w = tl.load(up_rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
            up += w.to(tl.float32) * x[None, :]
    scale = 1.0
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / K + eps)
    y = tl.sum(total, axis=1) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if ACT != "":
        other = tl.sum(up, axis=1) * scale
        if HAS_BIAS:
            other += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        y = activate(y, ACT) * other
    if ADD:
        y += tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + split * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _gemm(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    M,
    N,
    K,
    k_split,
    eps,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Row tiles vary fastest: programs that run together share their weights, the larger operand.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
    w_rows = w_ptr + n[None, :].to(tl.int64) * K + k[:, None]
    up_rows = w_ptr + (N + n)[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(split * k_split, min(split * k_split + k_split, K), BLOCK_K):
        inside = start + k < K
        x = tl.load(x_rows + start, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += wide * wide
            x = (wide * tl.load(norm_ptr + start + k, mask=inside, other=0.0)[None, :]).to(x.dtype)
        mask = (n < N)[None, :] & inside[:, None]
        w = tl.load(w_rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
        total = tl.dot(x, w, total, input_precision="ieee")
        if ACT != "":
            w = tl.load(up_rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
            up = tl.dot(x, w, up, input_precision="ieee")
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
def _sum_partials(
    partials_ptr, bias_ptr, y_ptr, size, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials_ptr + split * size + at, mask=at < size, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < size)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    wide: bool = False,
    around: Around | None = None,
) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] or None, all contiguous and of one dtype -> y [M, N] of that dtype, or fp32.

    around: y [M, N / 2] where it has an activation; one launch, whatever the shape.
    """
    (m, k), n = x.shape, weight.shape[0] // (2 if around and around.act else 1)
    y = x.new_empty(m, n, dtype=torch.float32 if wide else x.dtype)
    if y.numel() == 0:
        return y
    name = tuning.target()
    if around is None:
        tile = tuning.linear_tile(m, x.dtype, name)
        splits = tuning.splits(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), k, tile, name)
    else:
        tile, splits = tuning.whole_tile(m, n, x.dtype, name, gated=bool(around.act)), 1
    out = y if splits == 1 else x.new_empty(splits, m, n, dtype=torch.float32)
    _launch(x, weight, bias if splits == 1 else None, out, n, tile, splits, around or Around())
    if splits > 1:
        blocks_of_y = (triton.cdiv(m * n, SUM_BLOCK),)
        _sum_partials[blocks_of_y](out, bias, y, m * n, n, SPLITS=splits, HAS_BIAS=bias is not None, BLOCK=SUM_BLOCK)
    return y


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    n: int,
    tile: tuning.Tile,
    splits: int,
    around: Around,
) -> None:
    """out [M, n], or a partial sum [M, n] of each split."""
    m, k = x.shape
    k_split = triton.cdiv(triton.cdiv(k, tile.k), splits) * tile.k
    arguments = {
        "HAS_BIAS": bias is not None,
        "NORM": around.norm is not None,
        "ACT": around.act or "",
        "ADD": around.residual is not None,
        **tuning.blocks(tile),
    }
    tensors = (x, weight, bias, around.norm, around.residual, out)
    if m == 1:
        _gemv[(triton.cdiv(n, tile.n), splits)](*tensors, n, k, k_split, around.eps, **arguments)
    else:
        grid = (triton.cdiv(m, tile.m), triton.cdiv(n, tile.n), splits)
        _gemm[grid](*tensors, m, n, k, k_split, around.eps, BLOCK_M=tile.m, **arguments)
