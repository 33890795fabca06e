"""Triton kernels of a decode step's attention: one new token a sequence, its rotation and cache write included.

A sequence's keys are cut into splits, so that one long sequence fills the machine too. A program takes one split of
one key head for all G = H / KV query heads that share it, and reads every key once. It rotates its queries itself; the
new key and value come out of q|k|v and not out of the pools, which the program of the last split writes.

A split leaves the normalised values of its keys and the logarithm of its softmax sum; a second, small kernel weighs
the splits against each other. Both grids depend on shapes alone, so that a captured launch stays right while contexts
grow: how many keys a split takes is told by the context, and splits that are left without any leave a weight of zero.
With one split the first kernel writes what the second would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .triton_fused import rotate

Tensor = torch.Tensor


@triton.jit
def _span(position, window, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys [begin, stop) of this split, of all that a query at `position` sees."""
    lowest = 0
    if window > 0:
        lowest = max(position - window + 1, 0)
    keys = tl.cdiv(tl.cdiv(position + 1 - lowest, SPLITS), BLOCK_N) * BLOCK_N
    begin = lowest + tl.program_id(2) * keys
    return begin, min(begin + keys, position + 1)


@triton.jit
def _new_token(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    heads,
    kv_heads,
    eps,
    own_head,
    inside,
    group,
    d,
    NORMED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotated queries [BLOCK_M, D] of this key head, and its rotated key and its value [1, D], out of q|k|v."""
    sequence, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = qkv_ptr + sequence * (heads + 2 * kv_heads) * HEAD_DIM
    turn = (cos_ptr + sequence * HALF, sin_ptr + sequence * HALF)
    q_at = token + (kv_head * GROUP + group)[:, None] * HEAD_DIM
    q = rotate(q_at, own_head, d[None, :], *turn, q_norm_ptr, eps, NORMED, HEAD_DIM, HALF)
    k_at = token + (heads + kv_head) * HEAD_DIM
    k = rotate(k_at, inside, d[None, :], *turn, k_norm_ptr, eps, NORMED, HEAD_DIM, HALF)
    v = tl.load(k_at + kv_heads * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    return q.to(qkv_ptr.dtype.element_ty), k.to(qkv_ptr.dtype.element_ty), v


@triton.jit
def _attended(largest, weight_sum, total, q, k, v, visible, scale, GROUP: tl.constexpr):
    """The running softmax after BLOCK_N more keys: largest score, sum of weights, and sum of values [BLOCK_M, D]."""
    if GROUP == 1:
        scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[None, :] * scale
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(visible[None, :], scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.exp(scores - larger[:, None])
    shrink = tl.exp(largest - larger)
    if GROUP == 1:
        seen = tl.sum(tl.trans(weights) * v.to(tl.float32), axis=0)[None, :]
        total = total * shrink[:, None] + seen
    else:
        # Rounded to the values' dtype for tensor cores, and summed as rounded: they still add up to one.
        rounded = weights.to(v.dtype)
        weights = rounded.to(tl.float32)
        total = tl.dot(rounded, v, total * shrink[:, None], input_precision="ieee")
    return larger, weight_sum * shrink + tl.sum(weights, axis=1), total


@triton.jit
def _attend_split(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_pool_ptr,
    v_pool_ptr,
    slots_ptr,
    context_lens_ptr,
    block_tables_ptr,
    part_ptr,
    weight_ptr,
    table_width,
    heads,
    kv_heads,
    eps,
    scale,
    window,
    NORMED: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    own_head, inside = (group < GROUP)[:, None], (d < HEAD_DIM)[None, :]
    head = sequence * heads + kv_head * GROUP + group
    position = tl.load(context_lens_ptr + sequence) - 1
    begin, stop = _span(position, window, SPLITS, BLOCK_N)
    if begin >= stop:
        tl.store(weight_ptr + head * SPLITS + split, float("-inf"), mask=group < GROUP)
        return

    read = (qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, heads, kv_heads, eps)
    q, new_k, new_v = _new_token(*read, own_head, inside, group, d, NORMED, GROUP, HEAD_DIM, HALF)
    if stop > position:
        slot = (tl.load(slots_ptr + sequence) * kv_heads + kv_head) * HEAD_DIM + d[None, :]
        tl.store(k_pool_ptr + slot, new_k, mask=inside)
        tl.store(v_pool_ptr + slot, new_v, mask=inside)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(begin, stop, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        old = ((key < stop) & (key < position))[:, None] & inside
        block = tl.load(block_tables_ptr + sequence * table_width + key // PAGE, mask=key < stop, other=0)
        at = ((block.to(tl.int64) * PAGE + key % PAGE) * kv_heads + kv_head)[:, None] * HEAD_DIM + d[None, :]
        k = tl.where((key == position)[:, None], new_k, tl.load(k_pool_ptr + at, mask=old, other=0.0))
        v = tl.where((key == position)[:, None], new_v, tl.load(v_pool_ptr + at, mask=old, other=0.0))
        largest, weight_sum, total = _attended(largest, weight_sum, total, q, k, v, key < stop, scale, GROUP)
    at = (head * SPLITS + split)[:, None] * HEAD_DIM + d[None, :]
    y = total / weight_sum[:, None]
    tl.store(part_ptr + at, y.to(part_ptr.dtype.element_ty), mask=own_head & inside)
    tl.store(weight_ptr + head * SPLITS + split, largest + tl.log(weight_sum), mask=group < GROUP)


@triton.jit
def _merge(part_ptr, weight_ptr, out_ptr, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of one sequence: the mean of its splits, each by the sum of its weights."""
    head = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    logarithm = tl.load(weight_ptr + head * SPLITS + split)
    weight = tl.exp(logarithm - tl.max(logarithm, axis=0))
    mask = (weight > 0)[:, None] & (d < HEAD_DIM)[None, :]
    part = tl.load(part_ptr + (head * SPLITS + split)[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    y = tl.sum(part * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out_ptr + head * HEAD_DIM + d, y.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def decode(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scale: float,
    window: int,
) -> Tensor:
    """See attention.decode."""
    (_, page, kv_heads, head_dim), (sequences, table_width) = k_pool.shape, block_tables.shape
    out = qkv.new_empty(sequences, heads, head_dim)
    if out.numel() == 0:
        return out
    name, block_d = tuning.target(), max(16, triton.next_power_of_2(head_dim))
    tile = tuning.decode_tile(heads // kv_heads, name)
    splits = tuning.decode_splits(sequences * kv_heads, table_width * page, tile, name)
    part = out if splits == 1 else out.new_empty(sequences, heads, splits, head_dim, dtype=torch.float32)
    weight = out.new_empty(sequences, heads, splits, dtype=torch.float32)
    read = (qkv, cos, sin, q_norm, k_norm, k_pool, v_pool, slots, context_lens, block_tables)
    _attend_split[(sequences, kv_heads, splits)](
        *(*read, part, weight, table_width, heads, kv_heads, eps, scale, window),
        NORMED=q_norm is not None,
        GROUP=heads // kv_heads,
        PAGE=page,
        HEAD_DIM=head_dim,
        HALF=cos.shape[1],
        SPLITS=splits,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_D=block_d,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        _merge[(sequences * heads,)](part, weight, out, SPLITS=splits, HEAD_DIM=head_dim, BLOCK_D=block_d)
    return out
