"""The second launch of the shared_basis format: y = C z + bias of every part, from the z that triton_basis.py made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .triton_fused import activate
from .triton_parts import before, pick, place, stream
from .unit import Around


@triton.jit
def _y_gemv(
    z_ptr,
    scale_ptr,
    z_size,
    part,
    n,
    coefficients,
    biases,
    biased,
    outputs,
    widths,
    columns,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Outputs n of a part, in fp32. EARLY: z may not be there yet."""
    size, stride, c_ptr = pick(part, outputs), pick(part, columns), pick(part, coefficients)
    k = tl.arange(0, BLOCK_K)
    rows = c_ptr + n[:, None].to(tl.int64) * stride + k[None, :]
    z_row = z_ptr + before(part, widths) + k
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    w = stream(rows, 0, n < size, k, stride)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for start in range(0, stride, BLOCK_K):
        ahead = stream(rows, start + BLOCK_K, n < size, k, stride)
        z = _sum_splits(z_row + start, z_size, start + k < stride, SPLITS).to(c_ptr.dtype.element_ty)
        total += w.to(tl.float32) * z.to(tl.float32)[None, :]
        w = ahead
    y = tl.sum(total, axis=1)
    if NORM:
        y *= tl.load(scale_ptr)
    if BIASED:
        y += tl.load(pick(part, biases) + n, mask=n < pick(part, biased), other=0.0).to(tl.float32)
    return y


@triton.jit
def _coefficients_gemv(
    z_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    z_size,
    coefficients,
    biases,
    biased,
    outputs,
    widths,
    columns,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part, block = 0, tl.program_id(0)
    if ACT == "":
        part, block = place(block, outputs, BLOCK_N)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    z = (z_ptr, scale_ptr, z_size)
    parts = (coefficients, biases, biased, outputs, widths, columns)
    y = _y_gemv(*z, part, n, *parts, SPLITS, BIASED, NORM, EARLY, BLOCK_N, BLOCK_K)
    if ACT != "":
        y = activate(y, ACT) * _y_gemv(*z, 1, n, *parts, SPLITS, BIASED, NORM, False, BLOCK_N, BLOCK_K)
    at, mask = before(part, outputs) + n, n < pick(part, outputs)
    if ADD:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _y_gemm(
    z_ptr,
    scale_ptr,
    z_size,
    m,
    M,
    part,
    n,
    coefficients,
    biases,
    biased,
    outputs,
    widths,
    columns,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows m and outputs n of a part, in fp32. EARLY: z may not be there yet."""
    size, stride, c_ptr = pick(part, outputs), pick(part, columns), pick(part, coefficients)
    k = tl.arange(0, BLOCK_K)
    z_rows = z_ptr + before(part, widths) + m[:, None].to(tl.int64) * z_size + k[None, :]
    rows = c_ptr + n[None, :].to(tl.int64) * stride + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for start in range(0, stride, BLOCK_K):
        inside = start + k < stride
        w = tl.load(rows + start, mask=(n < size)[None, :] & inside[:, None], other=0.0, eviction_policy="evict_first")
        z = _sum_splits(z_rows + start, M * z_size, (m < M)[:, None] & inside[None, :], SPLITS)
        total = tl.dot(z.to(c_ptr.dtype.element_ty), w, total, input_precision="ieee")
    if NORM:
        total *= tl.load(scale_ptr + m, mask=m < M, other=0.0)[:, None]
    if BIASED:
        bias = tl.load(pick(part, biases) + n, mask=n < pick(part, biased), other=0.0)
        total += bias.to(tl.float32)[None, :]
    return total


@triton.jit
def _coefficients_gemm(
    z_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    M,
    y_size,
    z_size,
    coefficients,
    biases,
    biased,
    outputs,
    widths,
    columns,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part, block = 0, tl.program_id(1)
    if ACT == "":
        part, block = place(block, outputs, BLOCK_N)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    z = (z_ptr, scale_ptr, z_size, m, M)
    parts = (coefficients, biases, biased, outputs, widths, columns)
    y = _y_gemm(*z, part, n, *parts, SPLITS, BIASED, NORM, EARLY, BLOCK_M, BLOCK_N, BLOCK_K)
    if ACT != "":
        up = _y_gemm(*z, 1, n, *parts, SPLITS, BIASED, NORM, False, BLOCK_M, BLOCK_N, BLOCK_K)
        y = activate(y, ACT) * up
    at = m[:, None].to(tl.int64) * y_size + before(part, outputs) + n[None, :]
    mask = (m < M)[:, None] & (n < pick(part, outputs))[None, :]
    if ADD:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits(z, size, mask, SPLITS: tl.constexpr):
    """z as the first launch left it, or the sum of its partial sums in their order."""
    total = tl.load(z, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(z + split * size, mask=mask, other=0.0)
    return total


def launch(
    z: torch.Tensor,
    scale: torch.Tensor | None,
    coefficients: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    widths: tuple[int, ...],
    tile: tuning.Tile,
    name: str,
    around: Around,
    y: torch.Tensor,
) -> None:
    """y [M, sum N], or [M, N] of gate and up, from z."""
    splits, m, size = z.shape
    outputs, early = tuple(c.shape[0] for c in coefficients), tuning.overlaps(name)
    made = outputs[:1] if around.act else outputs
    grid = (triton.cdiv(m, tile.m), sum(triton.cdiv(n, tile.n) for n in made))
    arguments = {
        "coefficients": tuple(coefficients),
        "biases": tuple(c if b is None else b for c, b in zip(coefficients, bias, strict=True)),
        "biased": tuple(0 if b is None else len(b) for b in bias),
        "outputs": outputs,
        "widths": widths,
        "columns": tuple(c.shape[1] for c in coefficients),
        "SPLITS": splits,
        "BIASED": any(b is not None for b in bias),
        "NORM": scale is not None,
        "ACT": around.act or "",
        "ADD": around.residual is not None,
        "EARLY": early,
        **tuning.blocks(tile),
        **({"launch_pdl": True} if early else {}),
    }
    tensors = (z, scale, around.residual, y)
    if m == 1:
        _coefficients_gemv[(grid[1],)](*tensors, size, **arguments)
    else:
        _coefficients_gemm[grid](*tensors, m, y.shape[1], size, BLOCK_M=tile.m, **arguments)
