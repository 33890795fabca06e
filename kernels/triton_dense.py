"""Triton kernels of the dense format: y [M, N] = x [M, K] @ W [N, K]^T + bias [N].

M = 1 is a stream of weights: 16-byte loads that leave the cache first, products summed in fp32
registers, one reduction at the end; tensor cores would only add work. From M = 2 on a tile of rows
goes through tensor cores, so that weights are read once for all rows of a tile. Where the grid would
not fill the machine K is split: every split writes fp32 partial sums, and a second kernel adds them
in a fixed order, so results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning

SUM_BLOCK = 1024


@triton.jit
def _gemv(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    k_split,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(split * k_split, min(split * k_split + k_split, K), BLOCK_K):
        inside = start + k < K
        x = tl.load(x_ptr + start + k, mask=inside, other=0.0, eviction_policy="evict_last")
        mask = (n < N)[:, None] & inside[None, :]
        w = tl.load(w_rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + split * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _gemm(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    k_split,
    HAS_BIAS: tl.constexpr,
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
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(split * k_split, min(split * k_split + k_split, K), BLOCK_K):
        inside = start + k < K
        x = tl.load(x_rows + start, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_rows + start, mask=(n < N)[None, :] & inside[:, None], other=0.0, eviction_policy="evict_first")
        total = tl.dot(x, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    row = split.to(tl.int64) * M + m
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + row[:, None] * N + n[None, :], total.to(y_ptr.dtype.element_ty), mask=mask)


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


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool = False) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] or None, all contiguous and of one dtype -> y [M, N] of that dtype, or fp32."""
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n, dtype=torch.float32 if wide else x.dtype)
    if y.numel() == 0:
        return y
    name = tuning.target()
    tile = tuning.linear_tile(m, x.dtype, name)
    programs = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    splits = tuning.splits(programs, k, tile, name)
    k_split = triton.cdiv(triton.cdiv(k, tile.k), splits) * tile.k
    out = y if splits == 1 else x.new_empty(splits, m, n, dtype=torch.float32)
    own_bias = bias if splits == 1 else None
    launch = {"HAS_BIAS": own_bias is not None, "num_warps": tile.warps, "num_stages": tile.stages}
    if m == 1:
        _gemv[(programs, splits)](x, weight, own_bias, out, n, k, k_split, BLOCK_N=tile.n, BLOCK_K=tile.k, **launch)
    else:
        blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        grid = (triton.cdiv(m, tile.m), triton.cdiv(n, tile.n), splits)
        _gemm[grid](x, weight, own_bias, out, m, n, k, k_split, **blocks, **launch)
    if splits > 1:
        blocks_of_y = (triton.cdiv(m * n, SUM_BLOCK),)
        _sum_partials[blocks_of_y](out, bias, y, m * n, n, SPLITS=splits, HAS_BIAS=bias is not None, BLOCK=SUM_BLOCK)
    return y
