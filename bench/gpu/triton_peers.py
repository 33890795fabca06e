"""Kernels of other people's designs, written anew, to be timed beside ours.

TEAL's GEMV (arXiv 2408.14690, section 4.4) skips inputs of small size: the weight lies column-major, so that an input
is one run of N weights, and a run whose input is skipped is never read. Theirs adds the pieces of K by atomics in
16 bits, into a y that has to be zeroed; here each piece leaves fp32 sums that a second launch adds in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...kernels import tuning
from ...kernels.triton_dense import SUM_BLOCK, _sum_partials

BLOCK_N, BLOCK_K = 128, 32
WAVES = 4
"""Programs a multiprocessor at least: those whose inputs are skipped leave early."""


@triton.jit
def _gather(
    x_ptr, columns_ptr, sums_ptr, threshold, N, K, K_SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * K_SPLIT
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in range(0, K_SPLIT, BLOCK_K):
        k = first + start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
        kept = tl.abs(x) > threshold
        at = k[:, None].to(tl.int64) * N + n[None, :]
        mask = kept[:, None] & (n < N)[None, :]
        weight = tl.load(columns_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
        total += weight.to(tl.float32) * x[:, None]
    tl.store(sums_ptr + tl.program_id(1) * N + n, tl.sum(total, axis=0), mask=n < N)


def gather_gemv(x: torch.Tensor, columns: torch.Tensor, threshold: float) -> torch.Tensor:
    """y [1, N] of x [1, K] and columns [K, N], both contiguous; inputs of |x| <= threshold count as zero."""
    k, n = columns.shape
    if x.shape != (1, k) or x.dtype != columns.dtype or not (x.is_contiguous() and columns.is_contiguous()):
        raise ValueError(
            f"gather_gemv wants contiguous x [1, {k}] of {columns.dtype} and columns [K, N], got {tuple(x.shape)} of "
            f"{x.dtype} with strides {x.stride()} and columns with strides {columns.stride()}"
        )
    wanted = WAVES * tuning.MULTIPROCESSORS.get(tuning.target(), tuning.MULTIPROCESSORS["default"])
    splits, across = 1, triton.cdiv(n, BLOCK_N)
    while across * splits < wanted and splits * BLOCK_K < k:
        splits *= 2
    sums = x.new_empty(splits, n, dtype=torch.float32)
    k_split = triton.cdiv(triton.cdiv(k, BLOCK_K), splits) * BLOCK_K
    sizes = {"K_SPLIT": k_split, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": 4}
    _gather[(across, splits)](x, columns, sums, threshold, n, k, **sizes)
    y = x.new_empty(1, n)
    _sum_partials[(triton.cdiv(n, SUM_BLOCK),)](sums, None, y, n, n, SPLITS=splits, HAS_BIAS=False, BLOCK=SUM_BLOCK)
    return y
