"""Tiles of a dense weight, put together in registers from the GPU layouts of sparse_layout.py.

Each gives (tile [BLOCK_N, BLOCK_K] of rows n, zero beyond `rows` of them; its first column; the column where it ends).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sparse_layout import RUN

_RUN_BITS = tl.constexpr(RUN.bit_length() - 1)


@triton.jit
def two_four_tile(weights, n, rows, t, W, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Groups of one run of eight: tile t takes plane t % 8 of word block t // 8."""
    values_ptr, words_ptr = weights
    plane, first = t % 8, t // 8 * (BLOCK_K // 4)
    w = first + tl.arange(0, BLOCK_K // 4)
    mask = (n < rows)[:, None] & (w < W)[None, :]
    row = n[:, None].to(tl.int64) * W
    code = tl.load(words_ptr + row + w[None, :], mask=mask, other=0) >> (4 * plane)
    at = values_ptr + 16 * row + 2 * plane * W + w[None, :]
    one = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    two = tl.load(at + W, mask=mask, other=0.0, eviction_policy="evict_first")
    none = tl.zeros_like(one)
    at_1, at_2 = (code & 1) != 0, (code & 2) != 0
    then_2, then_3 = (code & 4) != 0, (code & 8) != 0
    k0 = tl.where(at_1 | at_2, none, one)
    k1 = tl.where(at_1, one, tl.where(then_2 | then_3, none, two))
    k2 = tl.where(at_2, one, tl.where(then_2, two, none))
    k3 = tl.where(then_3, two, none)
    tile = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), [BLOCK_N, BLOCK_K])
    start = 4 * (plane * W + first)
    return tile, start, 4 * (plane + 1) * W


@triton.jit
def _count(v):
    """Ones in each 64-bit word: a form that compilers know as one instruction."""
    v = v - ((v >> 1) & 0x5555555555555555)
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((v * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _next(ptr, start, j, byte, jump, BIT: tl.constexpr):
    """The value of bit BIT of each byte, as an integer, and the j of the one behind it."""
    kept = (byte >> BIT) & 1
    at = (j >> _RUN_BITS).to(start.dtype) * jump + (start + j)
    return tl.load(ptr + at, mask=kept != 0, other=0), j + kept


@triton.jit
def bitmap_tile(weights, n, rows, t, words, jump, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A thread has bytes of eight columns: it counts the ones ahead of a byte, then takes value after value."""
    values_ptr, bits_ptr, ahead_ptr, starts_ptr = weights
    BYTES: tl.constexpr = BLOCK_K // 8
    byte = t * BYTES + tl.arange(0, BYTES)
    shift = (8 * (byte % 8)).to(tl.uint64)[None, :]
    mask = (n < rows)[:, None] & (byte < 8 * words)[None, :]
    at = n[:, None].to(tl.int64) * words + (byte // 8)[None, :]
    word = tl.load(bits_ptr + at, mask=mask, other=0).to(tl.uint64)
    j = tl.load(ahead_ptr + at, mask=mask, other=0).to(tl.int32)
    j += _count(word & ((tl.full([1, BYTES], 1, tl.uint64) << shift) - 1))
    ones = (word >> shift).to(tl.int32) & 255
    DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    BITS: tl.constexpr = tl.int32 if tl.float32 == DTYPE else tl.int16
    ptr = values_ptr.to(tl.pointer_type(BITS))
    start = tl.load(starts_ptr + n, mask=n < rows, other=0)[:, None]
    k0, j = _next(ptr, start, j, ones, jump, 0)
    k1, j = _next(ptr, start, j, ones, jump, 1)
    k2, j = _next(ptr, start, j, ones, jump, 2)
    k3, j = _next(ptr, start, j, ones, jump, 3)
    k4, j = _next(ptr, start, j, ones, jump, 4)
    k5, j = _next(ptr, start, j, ones, jump, 5)
    k6, j = _next(ptr, start, j, ones, jump, 6)
    k7, j = _next(ptr, start, j, ones, jump, 7)
    even, odd = tl.join(tl.join(k0, k4), tl.join(k2, k6)), tl.join(tl.join(k1, k5), tl.join(k3, k7))
    # Integers up to here: the compiler for sm_90 breaks where what is reshaped goes into a tl.dot as it is.
    tile = tl.reshape(tl.join(even, odd), [BLOCK_N, BLOCK_K]).to(DTYPE, bitcast=True)
    return tile, t * BLOCK_K, (t + 1) * BLOCK_K
