"""Triton kernel of paged attention: decode rows and prefill chunks of one batch in one launch.

A program takes one key head of one sequence and BLOCK_M of its rows. Rows count queries times the
G = H / KV heads that share the key head (row = query * G + head), so that a decode step of a grouped
model still fills tensor cores and reads every key once. Keys come in steps of BLOCK_N through the
block table, and the softmax runs online in fp32: the largest score so far, the sum and the weighted
values are rescaled when a larger score comes. Steps that the causal edge or the window hide are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning

Tensor = torch.Tensor


@triton.jit
def _attend(
    q_ptr,
    k_pool_ptr,
    v_pool_ptr,
    query_starts_ptr,
    context_lens_ptr,
    block_tables_ptr,
    out_ptr,
    table_width,
    heads,
    kv_heads,
    scale,
    window,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_starts_ptr + sequence)
    queries = tl.load(query_starts_ptr + sequence + 1) - start
    context = tl.load(context_lens_ptr + sequence)
    first_row = tl.program_id(2) * BLOCK_M
    if first_row >= queries * GROUP:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    query, d = row // GROUP, tl.arange(0, BLOCK_D)
    position = context - queries + query
    live = (query < queries)[:, None] & (d < HEAD_DIM)[None, :]
    at = ((start + query).to(tl.int64) * heads + kv_head * GROUP + row % GROUP)[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + at, mask=live, other=0.0)

    first_position = context - queries + first_row // GROUP
    last_position = min(context - queries + (first_row + BLOCK_M - 1) // GROUP, context - 1)
    lowest = 0
    if window > 0:
        lowest = max(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(lowest, last_position + 1, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        there = key < context
        block = tl.load(block_tables_ptr + sequence * table_width + key // PAGE, mask=there, other=0)
        slot = (block.to(tl.int64) * PAGE + key % PAGE) * kv_heads + kv_head
        k_at = slot[None, :] * HEAD_DIM + d[:, None]
        k = tl.load(k_pool_ptr + k_at, mask=there[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        visible = key[None, :] <= position[:, None]
        if window > 0:
            visible = visible & (position[:, None] - key[None, :] < window)
        scores = tl.where(visible, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has seen no key yet keeps -inf: measured from 0 its terms are exp(-inf) = 0 and not NaN.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        # Rounded to the values' dtype for tensor cores, and summed as rounded: they still add up to one.
        weights = tl.exp(scores - base[:, None]).to(v_pool_ptr.dtype.element_ty)
        shrink = tl.exp(largest - base)
        v_at = slot[:, None] * HEAD_DIM + d[None, :]
        v = tl.load(v_pool_ptr + v_at, mask=there[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        weight_sum = weight_sum * shrink + tl.sum(weights.to(tl.float32), axis=1)
        total = tl.dot(weights, v, total * shrink[:, None], input_precision="ieee")
        largest = larger
    y = total / tl.where(weight_sum > 0, weight_sum, 1.0)[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=live)


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_query: int,
    scale: float,
    window: int,
) -> Tensor:
    """See attention.paged_attention."""
    (_, heads, head_dim), (_, page, kv_heads, _) = q.shape, k_pool.shape
    sequences, table_width = block_tables.shape
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    group = heads // kv_heads
    tiles = tuning.ATTENTION.get(tuning.target(), tuning.ATTENTION["default"])
    tile = tuning.pick(tiles, max_query * group)
    shape = {"GROUP": group, "PAGE": page, "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}
    launch = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "num_warps": tile.warps, "num_stages": tile.stages}
    _attend[(sequences, kv_heads, triton.cdiv(max_query * group, tile.m))](
        q,
        k_pool,
        v_pool,
        query_starts,
        context_lens,
        block_tables,
        out,
        table_width,
        heads,
        kv_heads,
        scale,
        window,
        **shape,
        **launch,
    )
    return out
