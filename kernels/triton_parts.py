"""What both launches of triton_basis.py share: which part a program works on, and how it reads weights.

A launch takes a tuple of pointers or sizes with an entry for each part.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(part, values):
    """values[part]."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(part == i, values[i], chosen)
    return chosen


@triton.jit
def before(part, sizes):
    """The sum of sizes[:part]."""
    total = 0
    for i in tl.static_range(len(sizes) - 1):
        total += tl.where(part > i, sizes[i], 0)
    return total


@triton.jit
def place(program, sizes, BLOCK: tl.constexpr):
    """(part, block of the part) of a program, where part i takes the next cdiv(sizes[i], BLOCK) programs."""
    part, first, end = 0, 0, 0
    for i in tl.static_range(len(sizes) - 1):
        end += tl.cdiv(sizes[i], BLOCK)
        part = tl.where(program >= end, i + 1, part)
        first = tl.where(program >= end, end, first)
    return part, program - first


@triton.jit
def stream(rows, start, valid, k, stop):
    """Weights [BLOCK_N, BLOCK_K] from column `start` on, zero from `stop` on, first to leave the cache."""
    mask = valid[:, None] & (start + k < stop)[None, :]
    return tl.load(rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
