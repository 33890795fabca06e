"""Triton kernel of the int8 format: y [M, N] = (x [M, K] @ W [N, K]^T) * scale [N] + bias [N].

M = 1 is a stream of weights, as for the dense format. From M = 2 on the integers, which 16 bits hold exactly,
become x's dtype and go through tensor cores; the scale is multiplied in at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dispatch import interpreting

BLOCK_N, BLOCK_K, BLOCK_M = (64, 256, 16) if interpreting() else (16, 512, 16)


@triton.jit
def _int8_gemv(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, N, K, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = w_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        x = tl.load(x_ptr + start + k, mask=inside, other=0.0, eviction_policy="evict_last")
        w = tl.load(rows + start, mask=(n < N)[:, None] & inside[None, :], other=0, eviction_policy="evict_first")
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(total, axis=1) * tl.load(scale_ptr + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _int8_gemm(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
    w_rows = w_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (start + k < K)[None, :]
        x = tl.load(x_rows + start, mask=(m < M)[:, None] & inside, other=0.0)
        w = tl.load(w_rows + start, mask=(n < N)[:, None] & inside, other=0, eviction_policy="evict_first")
        # By way of fp32, as hardware does it; straight to bf16 is something that the interpreter does not know.
        total += tl.dot(x, tl.trans(w.to(tl.float32).to(x.dtype)), input_precision="ieee")
    y = total * tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + m[:, None].to(tl.int64) * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, wide: bool
) -> torch.Tensor:
    """y [M, N] in x.dtype, or in fp32 where wide. x [M, K], weight int8 [N, K], scale and bias fp32 [N]."""
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n, dtype=torch.float32 if wide else x.dtype)
    tensors, flags = (x, weight, scale, bias, y), {"HAS_BIAS": bias is not None, "BLOCK_N": BLOCK_N}
    if m == 1:
        _int8_gemv[(triton.cdiv(n, BLOCK_N),)](*tensors, n, k, **flags, BLOCK_K=BLOCK_K)
    elif m:
        grid = (triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N))
        _int8_gemm[grid](*tensors, m, n, k, **flags, BLOCK_M=BLOCK_M, BLOCK_K=64)
    return y
