"""Causal attention over a paged KV cache: decode, chunked prefill, and both in one batch.

    pools [blocks, page, KV, D]; key j of sequence s lies at k_pool[block_tables[s, j // page], j % page]
    query rows query_starts[s] : query_starts[s + 1] are the last of the context_lens[s] keys of s

    sequence of 6 keys, 2 query rows, window 3        key    0 1 2 3 4 5
                                                   query 4   . . x x x .
                                                   query 5   . . . x x x

Paths:  GPU   one Triton kernel (triton_attention.py)
        CPU   native; but sequences of SDPA_FROM_ROWS query rows and more, in bf16 and fp16, go one by one
              through torch's blocked `scaled_dot_product_attention` on gathered keys
Without either the reference runs, counted. Softmax and sums are fp32 everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import ops
from .dispatch import fallback
from .native import bindings, library

Tensor = torch.Tensor

SDPA_FROM_ROWS = {torch.bfloat16: 64, torch.float16: 64}
"""Measured on two cores with AVX512-BF16: in half precision torch took 0.5 to 0.9 of the native time from
64 rows on and 1.0 to 3 times below; in fp32 (9 heads of 64, 32 of 128) native won up to 512 rows of 512 keys."""


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
    """softmax(scale q k^T) v for q [T, H, D] -> [T, H, D] in q.dtype; H is a multiple of KV.

    query_starts int32 [S + 1], context_lens int32 [S], block_tables int32 [S, B]; this chunk's keys
    are already in the pools. max_query: no sequence has more query rows. Causal; window > 0 shows
    key j to query i only when i - window < j <= i.
    """
    _check(q, k_pool, v_pool, query_starts, context_lens, block_tables)
    return _PAGED_ATTENTION(
        q, k_pool, v_pool, query_starts, context_lens, block_tables, max_query, float(scale), window
    )


def reference(
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
    """`paged_attention` in plain torch: one sequence after the other, all in fp32."""
    out = torch.zeros_like(q)
    starts = query_starts.tolist()
    for s, context in enumerate(context_lens.tolist()):
        rows = q[starts[s] : starts[s + 1]].float()
        k, v = (_gather(pool, block_tables[s], context).float() for pool in (k_pool, v_pool))
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", rows, k.repeat_interleave(group, dim=1)) * scale
        scores = scores.masked_fill(~_visible(rows.shape[0], context, window, q.device), float("-inf"))
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(group, dim=1))
        out[starts[s] : starts[s + 1]] = y.to(q.dtype)
    return out


def _gather(pool: Tensor, table: Tensor, context: int) -> Tensor:
    """The first `context` keys or values of one sequence [context, KV, D], copied from its pages."""
    blocks = -(-context // pool.shape[1])
    return pool[table[:blocks].long()].flatten(0, 1)[:context]


def _visible(rows: int, context: int, window: int, device: torch.device) -> Tensor:
    """bool [rows, context]: which keys the last `rows` positions of `context` may see."""
    distance = torch.arange(context - rows, context, device=device)[:, None] - torch.arange(context, device=device)
    return (distance >= 0) & (distance < window) if window else distance >= 0


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """One sequence through torch: q [rows, H, D], k and v [context, KV, D] -> [rows, H, D]."""
    rows, context = q.shape[0], k.shape[0]
    square = rows == context and not 0 < window < context
    y = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=None if square else _visible(rows, context, window, q.device),
        is_causal=square,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y[0].transpose(0, 1)


def _attention_cpu(
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
    native = library.load()
    if native is None:
        fallback("paged_attention", library.why_not())
        return reference(q, k_pool, v_pool, query_starts, context_lens, block_tables, max_query, scale, window)
    out = torch.empty_like(q)
    threshold = SDPA_FROM_ROWS.get(q.dtype, max_query + 1)
    if max_query < threshold:
        native.paged_attention(q, k_pool, v_pool, query_starts, context_lens, block_tables, scale, window, out)
        return out
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    long = [s for s in range(len(contexts)) if starts[s + 1] - starts[s] >= threshold]
    for s in long:
        rows = slice(starts[s], starts[s + 1])
        k, v = (_gather(pool, block_tables[s], contexts[s]) for pool in (k_pool, v_pool))
        out[rows] = _sdpa(q[rows], k, v, scale, window)
    for first, last in zip([0, *(s + 1 for s in long)], [*long, len(contexts)], strict=True):
        if first < last:  # the short sequences between two long ones; their rows are absolute
            short = query_starts[first : last + 1], context_lens[first:last], block_tables[first:last]
            native.paged_attention(q, k_pool, v_pool, *short, scale, window, out)
    return out


def _attention_gpu(
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
    kernels = ops.triton_kernels("attention")
    if kernels is None:
        fallback("paged_attention", "Triton is not installed")
        return reference(q, k_pool, v_pool, query_starts, context_lens, block_tables, max_query, scale, window)
    return kernels.paged_attention(
        q, k_pool, v_pool, query_starts, context_lens, block_tables, max_query, scale, window
    )


def _check(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, query_starts: Tensor, context_lens: Tensor, block_tables: Tensor
) -> None:
    _, heads, head_dim = q.shape
    pool = k_pool.shape
    sequences = len(context_lens)
    tensors = (q, k_pool, v_pool, query_starts, context_lens, block_tables)
    if (
        v_pool.shape != pool
        or pool[3] != head_dim
        or heads % pool[2]
        or len(query_starts) != sequences + 1
        or len(block_tables) != sequences
        or not q.dtype == k_pool.dtype == v_pool.dtype
        or q.dtype not in bindings.DTYPES
        or not query_starts.dtype == context_lens.dtype == block_tables.dtype == torch.int32
        or not all(map(torch.Tensor.is_contiguous, tensors))
    ):
        names = ("q", "k_pool", "v_pool", "query_starts", "context_lens", "block_tables")
        got = "; ".join(
            f"{name} {tuple(t.shape)} of {t.dtype}{'' if t.is_contiguous() else f' with strides {t.stride()}'}"
            for name, t in zip(names, tensors, strict=True)
        )
        raise ValueError(
            "paged_attention wants contiguous q [T, H, D] and pools [blocks, page, KV, D] of one dtype (bf16, "
            "fp16, fp32), H a multiple of KV, and int32 query_starts [S + 1], context_lens [S], block_tables [S, B]; "
            f"got {got}"
        )


_PAGED_ATTENTION = ops.register(
    "paged_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor query_starts, Tensor context_lens,"
    " Tensor block_tables, int max_query, float scale, int window) -> Tensor",
    cpu=_attention_cpu,
    gpu=_attention_gpu,
    fake=lambda q, *_: torch.empty_like(q),
)
