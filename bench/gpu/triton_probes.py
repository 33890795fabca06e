"""Small Triton kernels that answer what no product kernel asks yet: how fast a GPU reads, starts, gathers and skips.

Each is the inner loop of a design in question, nothing more: no bias, no ragged edges but where a check needs them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

READ_BLOCK, READ_STEPS = 4096, 8
DELTAS = 8  # 4-bit column steps in one int32 word
ELL_ROWS = 512
TILE = 64  # inputs under one 64-bit piece of a bitmap, half of them kept


@triton.jit
def _read(x_ptr, out_ptr, count_ptr, n, COUNTED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    program = tl.program_id(0)
    if COUNTED:  # noqa: SIM102, as `and` would compile the load of a pointer that is not there
        if program >= tl.load(count_ptr):
            return
    at = program.to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(STEPS):
        here = at + step * BLOCK
        total += tl.load(x_ptr + here, mask=here < n, other=0.0, eviction_policy="evict_first")
    tl.store(out_ptr + program, tl.sum(total))


@triton.jit
def _step(x_ptr, y_ptr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.store(y_ptr + at, tl.load(x_ptr + at) + 1.0)


@triton.jit
def _ell(x_ptr, values_ptr, words_ptr, starts_ptr, out_ptr, N, WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    column = tl.load(starts_ptr + split * N + n)
    words = words_ptr + split * WORDS * N + n
    values = values_ptr + split * WORDS * 8 * N + n
    total = tl.zeros([BLOCK_N], tl.float32)
    for _ in range(WORDS):
        word = tl.load(words, eviction_policy="evict_first")
        for i in tl.static_range(8):
            column += (word >> (4 * i)) & 15
            value = tl.load(values + i * N, eviction_policy="evict_first")
            total += value.to(tl.float32) * tl.load(x_ptr + column).to(tl.float32)
        words += N
        values += 8 * N
    tl.store(out_ptr + split * N + n, total)


@triton.jit
def _expand(x_ptr, values_ptr, bits_ptr, y_ptr, K, GATHER: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, SIZE)
    kept = tl.arange(0, SIZE // 2)
    total = tl.zeros([ROWS, SIZE], tl.float32)
    for start in range(0, K, SIZE):
        values = tl.load(values_ptr + n[:, None].to(tl.int64) * (K // 2) + start // 2 + kept[None, :])
        word = tl.load(bits_ptr + n.to(tl.int64) * (K // SIZE) + start // SIZE)
        bits = ((word[:, None] >> k[None, :].to(tl.int64)) & 1).to(tl.int32)
        x = tl.load(x_ptr + start + k).to(tl.float32)
        if GATHER:
            position = tl.minimum(tl.maximum(tl.cumsum(bits, axis=1) - 1, 0), SIZE // 2 - 1)
            weights = tl.gather(values.to(tl.float32), position, axis=1)
        else:
            weights = tl.join(values, values).to(tl.float32).reshape(ROWS, SIZE)
        total += tl.where(bits > 0, weights, 0.0) * x[None, :]
    tl.store(y_ptr + n, tl.sum(total, axis=1))


def read(x: torch.Tensor, count: torch.Tensor | None = None, programs: int | None = None) -> torch.Tensor:
    """Sums of the pieces of x [n] fp32, contiguous; of the first `count` (int32 [1], on the device) alone if given.

    programs: the grid; all of x by default. Pieces beyond `count` are not written.
    """
    pieces = triton.cdiv(x.numel(), READ_BLOCK * READ_STEPS)
    out = x.new_empty(pieces)
    launch = {"COUNTED": count is not None, "BLOCK": READ_BLOCK, "STEPS": READ_STEPS, "num_warps": 8}
    _read[(programs or pieces,)](x, out, count, x.numel(), **launch)
    return out


def step(x: torch.Tensor, y: torch.Tensor, early: bool) -> None:
    """y = x + 1 for fp32 [n], n a multiple of 256. early: begin while the launch ahead runs, and wait inside."""
    _step[(x.numel() // 256,)](x, y, EARLY=early, BLOCK=256, **({"launch_pdl": True} if early else {}))


def ell(
    x: torch.Tensor, values: torch.Tensor, words: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, object]:
    """Partial sums fp32 [splits, N] of a matrix in row-lane ELL, and the compiled kernel.

    x [K]; values [nnz a row, N]; words int32 [nnz / DELTAS, N], the steps from column to column, the first of a split
    0; starts int32 [splits, N], each split's first column. N a multiple of ELL_ROWS.
    """
    splits, n = starts.shape
    out = x.new_empty(splits, n, dtype=torch.float32)
    launch = {"WORDS": len(words) // splits, "BLOCK_N": ELL_ROWS, "num_warps": 2}
    return out, _ell[(n // ELL_ROWS, splits)](x, values, words, starts, out, n, **launch)


def expand(x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, gather: bool = True) -> torch.Tensor:
    """y fp32 [N] of x [K] and a matrix whose rows keep half of every TILE inputs: values [N, K / 2], bits int64 [N,
    K / TILE]. gather=False reads and multiplies the same without putting values in their places: the time of the rest.
    """
    n, k = len(values), len(x)
    y = x.new_empty(n, dtype=torch.float32)
    _expand[(n // 16,)](x, values, bits, y, k, GATHER=gather, ROWS=16, SIZE=TILE, num_warps=4)
    return y
