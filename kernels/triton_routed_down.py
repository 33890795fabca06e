"""The last launch of routed_ffn: y = h down + bias + residual, over the places of the list that hold a neuron.

The list is cut into equal splits, so that the grid fills the machine however few are awake. Every split writes its sum
in fp32 and takes a ticket of its block of y; who takes the last one adds all of them, in the order of the splits. No
atomic touches a float: which program adds is a matter of luck, what it adds is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import tuning

if TYPE_CHECKING:
    from .triton_routed_ffn import Hidden

Tensor = torch.Tensor


@triton.jit
def _share(state_ptr, SPLITS: tl.constexpr, STEP: tl.constexpr):
    """[begin, stop) of the places that this program sums over, begin a multiple of STEP."""
    count = tl.load(state_ptr) // 8 * 8  # whole groups: so the compiler knows how rows of h are aligned
    share = tl.cdiv(tl.cdiv(count, SPLITS), STEP) * STEP
    begin = tl.program_id(2) * share
    return begin, min(begin + share, count)


@triton.jit
def _store(total, at, mask, n, N, bias_ptr, residual_ptr, y_ptr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr):
    """y at `at` [BLOCK_M, BLOCK_N] from its sums."""
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ADD:
        total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    total,
    m,
    n,
    M,
    N,
    bias_ptr,
    residual_ptr,
    partials_ptr,
    state_ptr,
    y_ptr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Rows m and columns n of y from this split's sums [BLOCK_M, BLOCK_N]: by the last split that gets here."""
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    if SPLITS == 1:
        _store(total, at, mask, n, N, bias_ptr, residual_ptr, y_ptr, HAS_BIAS, ADD)
    else:
        tl.store(partials_ptr + tl.program_id(2).to(tl.int64) * M * N + at, total, mask=mask)
        tl.debug_barrier()  # the ticket speaks for all threads
        block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(state_ptr + 1 + block, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            added = tl.zeros_like(total)
            for split in tl.static_range(SPLITS):  # past the first cache: other programs wrote them
                part = partials_ptr + tl.full([], split, tl.int64) * M * N + at
                added += tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")
            _store(added, at, mask, n, N, bias_ptr, residual_ptr, y_ptr, HAS_BIAS, ADD)


@triton.jit
def _down_gemv(
    h_ptr,
    down_ptr,
    bias_ptr,
    residual_ptr,
    list_ptr,
    state_ptr,
    partials_ptr,
    y_ptr,
    N,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    begin, stop = _share(state_ptr, SPLITS, 1)
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    neuron = tl.load(list_ptr + begin + k, mask=begin + k < stop, other=0)
    for start in range(begin, stop, BLOCK_K):
        inside = start + k < stop
        rows = down_ptr + neuron[:, None].to(tl.int64) * N + n[None, :]
        w = tl.load(rows, mask=inside[:, None] & (n < N)[None, :], other=0.0, eviction_policy="evict_first")
        h = tl.load(h_ptr + start + k, mask=inside, other=0.0).to(tl.float32)
        ahead = start + BLOCK_K + k
        neuron = tl.load(list_ptr + ahead, mask=ahead < stop, other=0)
        total += w.to(tl.float32) * h[:, None]
    y = tl.sum(total, axis=0)[None, :]
    given = (bias_ptr, residual_ptr, partials_ptr, state_ptr, y_ptr)
    _finish(y, tl.arange(0, 1), n, 1, N, *given, HAS_BIAS, ADD, SPLITS)


@triton.jit
def _down_gemm(
    h_ptr,
    down_ptr,
    bias_ptr,
    residual_ptr,
    list_ptr,
    state_ptr,
    partials_ptr,
    y_ptr,
    M,
    N,
    neurons,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    LISTED: tl.constexpr,
    EARLY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    begin, stop = _share(state_ptr, SPLITS, BLOCK_K)
    h_rows = h_ptr + m[:, None].to(tl.int64) * neurons + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, stop, BLOCK_K):
        inside = start + k < stop
        neuron = start + k
        if LISTED:
            neuron = tl.load(list_ptr + neuron, mask=inside, other=0)
        h = tl.load(h_rows + start, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        rows = down_ptr + neuron[:, None].to(tl.int64) * N + n[None, :]
        w = tl.load(rows, mask=inside[:, None] & (n < N)[None, :], other=0.0, eviction_policy="evict_first")
        total = tl.dot(h, w, total, input_precision="ieee")
    given = (bias_ptr, residual_ptr, partials_ptr, state_ptr, y_ptr)
    _finish(total, m, n, M, N, *given, HAS_BIAS, ADD, SPLITS)


def blocks(m: int, n: int, tile: tuning.Tile) -> int:
    """Blocks of y [m, n], each of which needs a ticket."""
    return triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)


def down(
    hidden: Hidden, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, tile: tuning.Tile
) -> None:
    """y [M, N] = h weight + bias + residual; weight [F, N], residual [M, N]; hidden as `wake` left it."""
    (m, n), (neurons, _), name = y.shape, weight.shape, tuning.target()
    splits = tuning.routed_splits(blocks(m, n, tile), neurons, tile, name)
    partials = y if splits == 1 else y.new_empty(splits, m, n, dtype=torch.float32)
    grid = (triton.cdiv(m, tile.m), triton.cdiv(n, tile.n), splits)
    tensors = (hidden.h, weight, bias, residual, hidden.listed, hidden.state, partials, y)
    arguments = {
        "HAS_BIAS": bias is not None,
        "ADD": residual is not None,
        "SPLITS": splits,
        **tuning.early(name),
        **tuning.blocks(tile),
    }
    if m == 1:
        _down_gemv[grid](*tensors, n, **arguments)
    else:
        _down_gemm[grid](*tensors, m, n, neurons, LISTED=hidden.listed is not None, BLOCK_M=tile.m, **arguments)
