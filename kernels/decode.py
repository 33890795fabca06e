"""Attention of a decode step, with the rotation and the cache write ahead of it: one new token a sequence.

    q|k|v -> rotate q and k -> write k and v to the pools -> softmax(scale q k^T) v over the context

Paths:  GPU   two launches, over splits of the keys and to merge them; one where a sequence is not split
              (triton_decode.py)
        CPU   none: fused.rotary_cache and attention.paged_attention, which also take chunks of prompts
"""

from __future__ import annotations

import torch

from . import attention, fused, ops

Tensor = torch.Tensor


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
    kv_heads: int,
    head_dim: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    scale: float,
    window: int,
) -> Tensor | None:
    """Rows of q|k|v [S, (H + 2 KV) D], each the last token of its sequence -> [S, H, D]; None on a CPU.

    All as fused.rotary_cache has it; context_lens int32 [S] count the new token, so they
    are at least 1; block_tables, scale and window as in attention.paged_attention.
    """
    if not ops.takes_triton(qkv):
        return None
    fused.check_rotary("decode", qkv, cos, sin, k_pool, v_pool, slots, heads, kv_heads, head_dim, norms)
    sequences = len(qkv)
    if (
        context_lens.shape != (sequences,)
        or block_tables.dim() != 2
        or len(block_tables) != sequences
        or heads % kv_heads
        or not context_lens.dtype == block_tables.dtype == torch.int32
        or not (context_lens.is_contiguous() and block_tables.is_contiguous())
    ):
        raise ValueError(
            f"decode wants contiguous int32 context_lens [{sequences}] and block_tables [{sequences}, B], and heads a "
            f"multiple of {kv_heads}; got {tuple(context_lens.shape)} of {context_lens.dtype}, "
            f"{tuple(block_tables.shape)} of {block_tables.dtype} and {heads} heads"
        )
    tensors = (qkv, cos, sin, k_pool, v_pool, slots, context_lens, block_tables)
    return _DECODE(*tensors, heads, *(norms or (None, None)), eps, float(scale), window)


def reference(
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
    """`decode` in plain torch."""
    q = fused.rotary_cache_reference(qkv, cos, sin, k_pool, v_pool, slots, heads, q_norm, k_norm, eps)
    starts = torch.arange(len(qkv) + 1, dtype=torch.int32, device=qkv.device)
    return attention.reference(q, k_pool, v_pool, starts, context_lens, block_tables, 1, scale, window)


_DECODE = ops.register(
    "decode(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor slots,"
    " Tensor context_lens, Tensor block_tables, int heads, Tensor? q_norm, Tensor? k_norm, float eps, float scale,"
    " int window) -> Tensor",
    cpu=reference,
    gpu=lambda *args: ops.triton_kernels("decode").decode(*args),
    fake=lambda qkv, cos, sin, k_pool, v_pool, slots, context_lens, block_tables, heads, *_: qkv.new_empty(
        len(qkv), heads, k_pool.shape[3]
    ),
)
