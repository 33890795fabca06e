"""Triton kernels of the shared_basis format: y = C z + bias, z = B x or x[pivots] + T x[rest], in two launches.

Modules that read the same x (q|k|v, gate|up) run together: the first launch makes the z of every part, the
second the y of every part, side by side (triton_coefficients.py). Their weights stay tensors of their own, since
a basis serves several layers: a launch takes tuples of pointers and sizes, and a program picks its part by its id.

The launches are those of triton_dense.py otherwise: M = 1 multiplies and adds, tiles of rows go through tensor
cores. Pivoted parts gather x by `order`, from L1. Where the first grid would not fill the machine K is split;
z is then partial sums in fp32, which every program of the second launch adds in a fixed order and rounds once
while it reads them, so that there is no third launch and no atomic.

Where a launch can begin before the one ahead of it has ended (tuning.overlaps), the second does: it waits for z
with its first coefficients already on their way.

What stands around (unit.py) costs no launch either. An RMSNorm's weight multiplies x where it is gathered; its 1 / rms
scales y, as both steps are linear, and is left for the second launch by programs of the first that do nothing else. A
gated activation has each program of the second launch make the same columns of gate and of up.

z is [splits, M, the widths of all parts], each width the rank rounded up to ALIGN; the first launch writes zeros
into what is beyond a rank, as rows of the basis and of the coefficients may end in zero columns (`prepare`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import triton_coefficients, tuning
from .shared_basis import ALIGN
from .triton_parts import before, pick, place, stream
from .unit import Around


@triton.jit
def _source(rest, k, inside, pivoted, PIVOTED: tl.constexpr):
    """The column of x that column k of a basis multiplies; `rest` points at it. PIVOTED: "no", "some", "all" parts."""
    source = k
    if PIVOTED == "all":
        source = tl.load(rest, mask=inside, other=0)
    elif PIVOTED == "some":
        source = tl.where(pivoted, tl.load(rest, mask=inside & pivoted, other=0), k)
    return source


@triton.jit
def _normed(x, norm_ptr, at, mask, NORM: tl.constexpr):
    """x in fp32, times the norm's weights `at` its columns."""
    x = x.to(tl.float32)
    if NORM:
        x *= tl.load(norm_ptr + at, mask=mask, other=0.0)
    return x


@triton.jit
def _scale_row(x_ptr, scale_ptr, row, K, eps, BLOCK: tl.constexpr):
    """scale[row] = 1 / rms of x[row]."""
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(scale_ptr + row, 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / K + eps))


@triton.jit
def _basis_gemv(
    x_ptr,
    norm_ptr,
    scale_ptr,
    z_ptr,
    K,
    z_size,
    k_split,
    eps,
    orders,
    bases,
    ranks,
    widths,
    shifts,
    columns,
    PIVOTED: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program, split = tl.program_id(0), tl.program_id(1)
    if NORM:  # the first program is one more than the blocks
        if program == 0:
            if split == 0:
                _scale_row(x_ptr, scale_ptr, program, K, eps, BLOCK_ROW)
            return
        program -= 1
    part, block = place(program, widths, BLOCK_N)
    rank, width, shift, stride = pick(part, ranks), pick(part, widths), pick(part, shifts), pick(part, columns)
    order = pick(part, orders)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rest = order + shift + k
    rows = pick(part, bases) + n[:, None].to(tl.int64) * stride + k[None, :]
    begin = split * k_split
    stop = min(begin + k_split, stride)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    w = stream(rows, begin, n < rank, k, stop)
    for start in range(begin, stop, BLOCK_K):
        ahead = stream(rows, start + BLOCK_K, n < rank, k, stop)
        inside = start + k < K - shift
        source = _source(rest + start, start + k, inside, shift > 0, PIVOTED)
        x = _normed(tl.load(x_ptr + source, mask=inside, other=0.0), norm_ptr, source, inside, NORM)
        total += w.to(tl.float32) * x[None, :]
        w = ahead
    z = tl.sum(total, axis=1)
    if PIVOTED != "no":
        own = (n < shift) & (split == 0)
        pivot = tl.load(order + n, mask=own, other=0)
        z += _normed(tl.load(x_ptr + pivot, mask=own, other=0.0), norm_ptr, pivot, own, NORM)
    tl.store(z_ptr + split * z_size + before(part, widths) + n, z.to(z_ptr.dtype.element_ty), mask=n < width)


@triton.jit
def _basis_gemm(
    x_ptr,
    norm_ptr,
    scale_ptr,
    z_ptr,
    M,
    K,
    z_size,
    k_split,
    eps,
    orders,
    bases,
    ranks,
    widths,
    shifts,
    columns,
    PIVOTED: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program, split = tl.program_id(1), tl.program_id(2)
    if NORM:  # the first programs, one for each row of the tile, are more than the blocks
        if program < BLOCK_M:
            row = tl.program_id(0) * BLOCK_M + program
            if (split == 0) & (row < M):
                _scale_row(x_ptr, scale_ptr, row, K, eps, BLOCK_ROW)
            return
        program -= BLOCK_M
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part, block = place(program, widths, BLOCK_N)
    rank, width, shift, stride = pick(part, ranks), pick(part, widths), pick(part, shifts), pick(part, columns)
    order = pick(part, orders)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + m[:, None].to(tl.int64) * K
    rest = order + shift + k
    rows = pick(part, bases) + n[None, :].to(tl.int64) * stride + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(split * k_split, min(split * k_split + k_split, stride), BLOCK_K):
        mask = (n < rank)[None, :] & (start + k < stride)[:, None]
        w = tl.load(rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
        inside = start + k < K - shift
        source = _source(rest + start, start + k, inside, shift > 0, PIVOTED)
        x = tl.load(x_rows + source[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        if NORM:
            x = _normed(x, norm_ptr, source[None, :], inside[None, :], NORM).to(w.dtype)
        total = tl.dot(x, w, total, input_precision="ieee")
    if PIVOTED != "no":
        own = (n < shift) & (split == 0)
        pivot = tl.load(order + n, mask=own, other=0)
        x = tl.load(x_rows + pivot[None, :], mask=(m < M)[:, None] & own[None, :], other=0.0)
        total += _normed(x, norm_ptr, pivot[None, :], own[None, :], NORM)
    row = (split.to(tl.int64) * M + m) * z_size + before(part, widths)
    mask = (m < M)[:, None] & (n < width)[None, :]
    tl.store(z_ptr + row[:, None] + n[None, :], total.to(z_ptr.dtype.element_ty), mask=mask)


def basis_linear(
    x: torch.Tensor,
    order: list[torch.Tensor | None],
    basis: list[torch.Tensor],
    coefficients: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    around: Around | None = None,
) -> torch.Tensor:
    """x [M, K] -> y [M, sum N], one entry of each list a part; everything contiguous, x and weights of one dtype.

    order: int32 [K], pivots and then the rest, or None; basis [R, K - R] (without order [R, K]);
    coefficients [N, R]; bias [N] or None. Rows of basis and coefficients may be longer by zero columns.
    around: with an activation there are two parts, alike in N, and y is [M, N].
    """
    around = around or Around()
    outputs = tuple(c.shape[0] for c in coefficients)
    made = outputs[:1] if around.act else outputs
    y = x.new_empty(x.shape[0], sum(made))
    if y.numel() == 0:
        return y
    widths = tuple(triton.cdiv(b.shape[0], ALIGN) * ALIGN for b in basis)
    name = tuning.target()
    tile = _tile(x.shape[0], made, x.dtype, name, tuning.GEMM)
    scale = None if around.norm is None else x.new_empty(x.shape[0], dtype=torch.float32)
    z = _launch_basis(x, order, basis, widths, tile, name, around, scale)
    triton_coefficients.launch(z, scale, coefficients, bias, widths, tile, name, around, y)
    return y


def _launch_basis(
    x: torch.Tensor,
    order: list[torch.Tensor | None],
    basis: list[torch.Tensor],
    widths: tuple[int, ...],
    second: tuning.Tile,
    name: str,
    around: Around,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """z [splits, M, sum of widths]: in x's dtype, or partial sums in fp32; `second` is the tile that reads it.

    scale: [M], filled where there is a norm.
    """
    (m, k), size, columns = x.shape, sum(widths), tuple(b.shape[1] for b in basis)
    tile = _tile(m, widths, x.dtype, name, tuning.BASIS_GEMM)
    grid = (triton.cdiv(m, tile.m), sum(triton.cdiv(width, tile.n) for width in widths))
    splits = min(tuning.splits(grid[0] * grid[1], max(columns), tile, name), _most_splits(m, x.dtype, second))
    k_split = triton.cdiv(triton.cdiv(max(columns), tile.k), splits) * tile.k
    z = x.new_empty(splits, m, size, dtype=x.dtype if splits == 1 else torch.float32)
    pivoted = [o for o in order if o is not None]
    blocks = grid[1] + (0 if scale is None else tile.m)
    arguments = {
        "orders": tuple(o if o is not None else (pivoted or [x])[0] for o in order),
        "bases": tuple(basis),
        "ranks": tuple(b.shape[0] for b in basis),
        "widths": widths,
        "shifts": tuple(0 if o is None else b.shape[0] for o, b in zip(order, basis, strict=True)),
        "columns": columns,
        "PIVOTED": ("no", "some", "all")[bool(pivoted) + (len(pivoted) == len(order))],
        "NORM": scale is not None,
        "EARLY": tuning.overlaps(name),
        "BLOCK_ROW": triton.next_power_of_2(k),
        **tuning.blocks(tile),
    }
    tensors = (x, around.norm, scale, z)
    if m == 1:
        _basis_gemv[blocks, splits](*tensors, k, size, k_split, around.eps, **arguments)
    else:
        _basis_gemm[grid[0], blocks, splits](*tensors, m, k, size, k_split, around.eps, BLOCK_M=tile.m, **arguments)
    return z


def _tile(
    m: int, outputs: tuple[int, ...], dtype: torch.dtype, name: str, gemm: dict[str, tuple[tuning.Tile, ...]]
) -> tuning.Tile:
    return tuning.basis_gemv_tile(outputs, dtype, name) if m == 1 else tuning.linear_tile(m, dtype, name, gemm)


def _most_splits(m: int, dtype: torch.dtype, second: tuning.Tile) -> int:
    """Into how many parts K may be cut: a program of the second launch reads no more partial sums than weights."""
    return max(1, second.n * dtype.itemsize // (4 * min(m, second.m)))
