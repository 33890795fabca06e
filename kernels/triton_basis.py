"""Triton kernels of the shared_basis format: y = C z + bias, z = B x or x[pivots] + T x[rest], in two launches.

Modules that read the same x (q|k|v, gate|up) run together: the first launch makes the z of every part, the
second the y of every part, side by side. Their weights stay tensors of their own, since a basis serves
several layers: a launch takes tuples of pointers and sizes, and a program picks its part by its id.

The launches are those of triton_dense.py otherwise: M = 1 multiplies and adds, tiles of rows go through tensor
cores. Pivoted parts gather x by `order`, from L1. Where the first grid would not fill the machine K is split;
z is then partial sums in fp32, which every program of the second launch adds in a fixed order and rounds once
while it reads them, so that there is no third launch and no atomic.

Where a launch can begin before the one ahead of it has ended (tuning.overlaps), the second does: it waits for z
with its first coefficients already on their way.

z is [splits, M, the widths of all parts], each width the rank rounded up to ALIGN; the first launch writes zeros
into what is beyond a rank, as rows of the basis and of the coefficients may end in zero columns (`prepare`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .shared_basis import ALIGN


@triton.jit
def _pick(part, values):
    """values[part]."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(part == i, values[i], chosen)
    return chosen


@triton.jit
def _before(part, sizes):
    """The sum of sizes[:part]."""
    total = 0
    for i in tl.static_range(len(sizes) - 1):
        total += tl.where(part > i, sizes[i], 0)
    return total


@triton.jit
def _place(program, sizes, BLOCK: tl.constexpr):
    """(part, block of the part) of a program, where part i takes the next cdiv(sizes[i], BLOCK) programs."""
    part, first, end = 0, 0, 0
    for i in tl.static_range(len(sizes) - 1):
        end += tl.cdiv(sizes[i], BLOCK)
        part = tl.where(program >= end, i + 1, part)
        first = tl.where(program >= end, end, first)
    return part, program - first


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
def _stream(rows, start, valid, k, stop):
    """Weights [BLOCK_N, BLOCK_K] from column `start` on, zero from `stop` on, first to leave the cache."""
    mask = valid[:, None] & (start + k < stop)[None, :]
    return tl.load(rows + start, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _basis_gemv(
    x_ptr,
    z_ptr,
    K,
    z_size,
    k_split,
    orders,
    bases,
    ranks,
    widths,
    shifts,
    columns,
    PIVOTED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    part, block = _place(tl.program_id(0), widths, BLOCK_N)
    split = tl.program_id(1)
    rank, width, shift, stride = _pick(part, ranks), _pick(part, widths), _pick(part, shifts), _pick(part, columns)
    order = _pick(part, orders)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rest = order + shift + k
    rows = _pick(part, bases) + n[:, None].to(tl.int64) * stride + k[None, :]
    begin = split * k_split
    stop = min(begin + k_split, stride)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    w = _stream(rows, begin, n < rank, k, stop)
    for start in range(begin, stop, BLOCK_K):
        ahead = _stream(rows, start + BLOCK_K, n < rank, k, stop)
        inside = start + k < K - shift
        source = _source(rest + start, start + k, inside, shift > 0, PIVOTED)
        x = tl.load(x_ptr + source, mask=inside, other=0.0)
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
        w = ahead
    z = tl.sum(total, axis=1)
    if PIVOTED != "no":
        own = (n < shift) & (split == 0)
        pivot = tl.load(order + n, mask=own, other=0)
        z += tl.load(x_ptr + pivot, mask=own, other=0.0).to(tl.float32)
    tl.store(z_ptr + split * z_size + _before(part, widths) + n, z.to(z_ptr.dtype.element_ty), mask=n < width)


@triton.jit
def _basis_gemm(
    x_ptr,
    z_ptr,
    M,
    K,
    z_size,
    k_split,
    orders,
    bases,
    ranks,
    widths,
    shifts,
    columns,
    PIVOTED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part, block = _place(tl.program_id(1), widths, BLOCK_N)
    split = tl.program_id(2)
    rank, width, shift, stride = _pick(part, ranks), _pick(part, widths), _pick(part, shifts), _pick(part, columns)
    order = _pick(part, orders)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + m[:, None].to(tl.int64) * K
    rest = order + shift + k
    rows = _pick(part, bases) + n[None, :].to(tl.int64) * stride + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(split * k_split, min(split * k_split + k_split, stride), BLOCK_K):
        mask = (n < rank)[None, :] & (start + k < stride)[:, None]
        w = tl.load(rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
        inside = start + k < K - shift
        source = _source(rest + start, start + k, inside, shift > 0, PIVOTED)
        x = tl.load(x_rows + source[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    if PIVOTED != "no":
        own = (n < shift) & (split == 0)
        pivot = tl.load(order + n, mask=own, other=0)
        total += tl.load(x_rows + pivot[None, :], mask=(m < M)[:, None] & own[None, :], other=0.0).to(tl.float32)
    row = (split.to(tl.int64) * M + m) * z_size + _before(part, widths)
    mask = (m < M)[:, None] & (n < width)[None, :]
    tl.store(z_ptr + row[:, None] + n[None, :], total.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _coefficients_gemv(
    z_ptr,
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
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part, block = _place(tl.program_id(0), outputs, BLOCK_N)
    size, stride, c_ptr = _pick(part, outputs), _pick(part, columns), _pick(part, coefficients)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = c_ptr + n[:, None].to(tl.int64) * stride + k[None, :]
    z_row = z_ptr + _before(part, widths) + k
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    w = _stream(rows, 0, n < size, k, stride)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for start in range(0, stride, BLOCK_K):
        ahead = _stream(rows, start + BLOCK_K, n < size, k, stride)
        z = _sum_splits(z_row + start, z_size, start + k < stride, SPLITS).to(c_ptr.dtype.element_ty)
        total += w.to(tl.float32) * z.to(tl.float32)[None, :]
        w = ahead
    y = tl.sum(total, axis=1)
    if BIASED:
        y += tl.load(_pick(part, biases) + n, mask=n < _pick(part, biased), other=0.0).to(tl.float32)
    tl.store(y_ptr + _before(part, outputs) + n, y.to(y_ptr.dtype.element_ty), mask=n < size)


@triton.jit
def _coefficients_gemm(
    z_ptr,
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
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part, block = _place(tl.program_id(1), outputs, BLOCK_N)
    size, stride, c_ptr = _pick(part, outputs), _pick(part, columns), _pick(part, coefficients)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    z_rows = z_ptr + _before(part, widths) + m[:, None].to(tl.int64) * z_size + k[None, :]
    rows = c_ptr + n[None, :].to(tl.int64) * stride + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for start in range(0, stride, BLOCK_K):
        inside = start + k < stride
        w = tl.load(rows + start, mask=(n < size)[None, :] & inside[:, None], other=0.0, eviction_policy="evict_first")
        z = _sum_splits(z_rows + start, M * z_size, (m < M)[:, None] & inside[None, :], SPLITS)
        total = tl.dot(z.to(c_ptr.dtype.element_ty), w, total, input_precision="ieee")
    if BIASED:
        bias = tl.load(_pick(part, biases) + n, mask=n < _pick(part, biased), other=0.0)
        total += bias.to(tl.float32)[None, :]
    y_rows = y_ptr + m[:, None].to(tl.int64) * y_size + _before(part, outputs)
    mask = (m < M)[:, None] & (n < size)[None, :]
    tl.store(y_rows + n[None, :], total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits(z, size, mask, SPLITS: tl.constexpr):
    """z as the first launch left it, or the sum of its partial sums in their order."""
    total = tl.load(z, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(z + split * size, mask=mask, other=0.0)
    return total


def basis_linear(
    x: torch.Tensor,
    order: list[torch.Tensor | None],
    basis: list[torch.Tensor],
    coefficients: list[torch.Tensor],
    bias: list[torch.Tensor | None],
) -> torch.Tensor:
    """x [M, K] -> y [M, sum N], one entry of each list a part; everything contiguous, x and weights of one dtype.

    order: int32 [K], pivots and then the rest, or None; basis [R, K - R] (without order [R, K]);
    coefficients [N, R]; bias [N] or None. Rows of basis and coefficients may be longer by zero columns.
    """
    y = x.new_empty(x.shape[0], sum(c.shape[0] for c in coefficients))
    if y.numel() == 0:
        return y
    widths = tuple(triton.cdiv(b.shape[0], ALIGN) * ALIGN for b in basis)
    name = tuning.target()
    tile = _tile(x.shape[0], tuple(c.shape[0] for c in coefficients), x.dtype, name, tuning.GEMM)
    z = _launch_basis(x, order, basis, widths, tile, name)
    _launch_coefficients(z, coefficients, bias, widths, tile, name, y)
    return y


def _launch_basis(
    x: torch.Tensor,
    order: list[torch.Tensor | None],
    basis: list[torch.Tensor],
    widths: tuple[int, ...],
    second: tuning.Tile,
    name: str,
) -> torch.Tensor:
    """z [splits, M, sum of widths]: in x's dtype, or partial sums in fp32; `second` is the tile that reads it."""
    (m, k), size, columns = x.shape, sum(widths), tuple(b.shape[1] for b in basis)
    tile = _tile(m, widths, x.dtype, name, tuning.BASIS_GEMM)
    grid = (triton.cdiv(m, tile.m), sum(triton.cdiv(width, tile.n) for width in widths))
    splits = min(tuning.splits(grid[0] * grid[1], max(columns), tile, name), _most_splits(m, x.dtype, second))
    k_split = triton.cdiv(triton.cdiv(max(columns), tile.k), splits) * tile.k
    z = x.new_empty(splits, m, size, dtype=x.dtype if splits == 1 else torch.float32)
    pivoted = [o for o in order if o is not None]
    arguments = {
        "orders": tuple(o if o is not None else (pivoted or [x])[0] for o in order),
        "bases": tuple(basis),
        "ranks": tuple(b.shape[0] for b in basis),
        "widths": widths,
        "shifts": tuple(0 if o is None else b.shape[0] for o, b in zip(order, basis, strict=True)),
        "columns": columns,
        "PIVOTED": ("no", "some", "all")[bool(pivoted) + (len(pivoted) == len(order))],
        "EARLY": tuning.overlaps(name),
        **_launch(tile),
    }
    if m == 1:
        _basis_gemv[grid[1], splits](x, z, k, size, k_split, **arguments)
    else:
        _basis_gemm[(*grid, splits)](x, z, m, k, size, k_split, BLOCK_M=tile.m, **arguments)
    return z


def _launch_coefficients(
    z: torch.Tensor,
    coefficients: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    widths: tuple[int, ...],
    tile: tuning.Tile,
    name: str,
    y: torch.Tensor,
) -> None:
    """y [M, sum N] from z."""
    splits, m, size = z.shape
    outputs, early = tuple(c.shape[0] for c in coefficients), tuning.overlaps(name)
    grid = (triton.cdiv(m, tile.m), sum(triton.cdiv(n, tile.n) for n in outputs))
    arguments = {
        "coefficients": tuple(coefficients),
        "biases": tuple(c if b is None else b for c, b in zip(coefficients, bias, strict=True)),
        "biased": tuple(0 if b is None else len(b) for b in bias),
        "outputs": outputs,
        "widths": widths,
        "columns": tuple(c.shape[1] for c in coefficients),
        "SPLITS": splits,
        "BIASED": any(b is not None for b in bias),
        "EARLY": early,
        **_launch(tile),
        **({"launch_pdl": True} if early else {}),
    }
    if m == 1:
        _coefficients_gemv[(grid[1],)](z, y, size, **arguments)
    else:
        _coefficients_gemm[grid](z, y, m, y.shape[1], size, BLOCK_M=tile.m, **arguments)


def _launch(tile: tuning.Tile) -> dict[str, int]:
    return {"BLOCK_N": tile.n, "BLOCK_K": tile.k, "num_warps": tile.warps, "num_stages": tile.stages}


def _tile(
    m: int, outputs: tuple[int, ...], dtype: torch.dtype, name: str, gemm: dict[str, tuple[tuning.Tile, ...]]
) -> tuning.Tile:
    return tuning.basis_gemv_tile(outputs, dtype, name) if m == 1 else tuning.linear_tile(m, dtype, name, gemm)


def _most_splits(m: int, dtype: torch.dtype, second: tuning.Tile) -> int:
    """Into how many parts K may be cut: a program of the second launch reads no more partial sums than weights."""
    return max(1, second.n * dtype.itemsize // (4 * min(m, second.m)))
