"""Triton kernels of the small steps of fused.py: one program for a row, a head or a block of elements.

All compute in fp32 and cast at the store. Launchers trust fused.py, which checks shapes and dtypes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dispatch import interpreting

Tensor = torch.Tensor

ACT_BLOCK = 16384 if interpreting() else 1024


@triton.jit
def _rms_norm(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, D, stride_xm, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xm + d, mask=d < D, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * D + d, total, mask=d < D)
        x = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
    tl.store(y_ptr + row * D + d, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _layer_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    D,
    eps,
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * D + d, total, mask=d < D)
        x = total.to(tl.float32)
    centred = tl.where(d < D, x - tl.sum(x, axis=0) / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    y = centred * scale * tl.load(weight_ptr + d, mask=d < D, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + d, mask=d < D, other=0.0)
    tl.store(y_ptr + row * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def rotate(
    head_ptr,
    mask,
    d,
    cos_ptr,
    sin_ptr,
    norm_ptr,
    eps,
    NORMED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """Dims d [1, BLOCK] of heads [rows, 1] or of one head, normed and turned by one token's angles: fp32 [rows, BLOCK].

    Dim i turns with dim i + HALF: (a, b) -> (a cos - b sin, b cos + a sin).
    """
    rotated, inside = d < 2 * HALF, mask & (d < HEAD_DIM)
    other = tl.where(d < HALF, d + HALF, d - HALF)
    x = tl.load(head_ptr + d, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(head_ptr + other, mask=inside & rotated, other=0.0).to(tl.float32)
    if NORMED:
        scale = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps))[:, None]
        x *= scale * tl.load(norm_ptr + d, mask=d < HEAD_DIM, other=0.0)
        partner *= scale * tl.load(norm_ptr + other, mask=rotated, other=0.0)
    angle = tl.where(d < HALF, d, d - HALF)
    cos = tl.load(cos_ptr + angle, mask=rotated, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=rotated, other=0.0)
    return x * cos + partner * tl.where(d < HALF, -sin, sin)


@triton.jit
def _rotary_cache(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    k_pool_ptr,
    v_pool_ptr,
    slots_ptr,
    q_ptr,
    q_norm_ptr,
    k_norm_ptr,
    heads,
    kv_heads,
    eps,
    NORMED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK)[None, :]
    inside = d < HEAD_DIM
    source = qkv_ptr + (token * (heads + 2 * kv_heads) + head) * HEAD_DIM
    slot = tl.load(slots_ptr + token) * kv_heads
    if head >= heads + kv_heads:
        x = tl.load(source + d, mask=inside, other=0.0)
        tl.store(v_pool_ptr + (slot + head - heads - kv_heads) * HEAD_DIM + d, x, mask=inside)
    else:
        turn = (cos_ptr + token * HALF, sin_ptr + token * HALF)
        norm_ptr = q_norm_ptr if head < heads else k_norm_ptr
        y = rotate(source, inside, d, *turn, norm_ptr, eps, NORMED, HEAD_DIM, HALF).to(q_ptr.dtype.element_ty)
        if head < heads:
            tl.store(q_ptr + (token * heads + head) * HEAD_DIM + d, y, mask=inside)
        else:
            tl.store(k_pool_ptr + (slot + head - heads) * HEAD_DIM + d, y, mask=inside)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """act(x) for fp32 x. 0.5 (1 + tanh(u)) is written as sigmoid(2 u), the same function."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "relu":
        return tl.maximum(x, 0.0)
    else:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _act(x_ptr, y_ptr, size, F, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    # In gate | up of F columns each, element i of row r has its gate at 2 F r + i and its up F further.
    gate = at + (at // F) * F if GATED else at
    y = activate(tl.load(x_ptr + gate, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        y *= tl.load(x_ptr + gate + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See fused.rms_norm."""
    y = x.new_empty(x.shape)
    if y.numel():
        _launch_rms_norm(x, None, weight, y, None, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See fused.add_rms_norm."""
    y, total = torch.empty_like(x), torch.empty_like(x)
    if y.numel():
        _launch_rms_norm(x, residual, weight, y, total, eps)
    return y, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """See fused.layer_norm."""
    y = torch.empty_like(x)
    if y.numel():
        _launch_layer_norm(x, None, weight, bias, y, None, eps)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See fused.add_layer_norm."""
    y, total = torch.empty_like(x), torch.empty_like(x)
    if y.numel():
        _launch_layer_norm(x, residual, weight, bias, y, total, eps)
    return y, total


def rotary_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """See fused.rotary_cache."""
    kv_heads, head_dim = k_pool.shape[2:]
    q = qkv.new_empty(qkv.shape[0], heads, head_dim)
    if q.numel():
        sizes = {"HEAD_DIM": head_dim, "HALF": cos.shape[1], "BLOCK": triton.next_power_of_2(head_dim)}
        grid = (qkv.shape[0], heads + 2 * kv_heads)
        norms = {"NORMED": q_norm is not None}
        tensors = (qkv, cos, sin, k_pool, v_pool, slots, q, q_norm, k_norm)
        _rotary_cache[grid](*tensors, heads, kv_heads, eps, **norms, **sizes, num_warps=1)
    return q


def concat(parts: list[Tensor]) -> Tensor:
    """See fused.concat; a copy that torch makes as well as anyone."""
    return torch.cat(parts, dim=1)


def gated_act(gate_up: Tensor, kind: str) -> Tensor:
    """See fused.gated_act."""
    y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    if y.numel():
        grid = (triton.cdiv(y.numel(), ACT_BLOCK),)
        _act[grid](gate_up, y, y.numel(), y.shape[1], KIND=kind, GATED=True, BLOCK=ACT_BLOCK)
    return y


def act(x: Tensor, kind: str) -> Tensor:
    """See fused.act."""
    y = torch.empty_like(x)
    if y.numel():
        grid = (triton.cdiv(y.numel(), ACT_BLOCK),)
        _act[grid](x, y, y.numel(), y.numel(), KIND=kind, GATED=False, BLOCK=ACT_BLOCK)
    return y


def _launch_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, total: Tensor | None, eps: float
) -> None:
    m, d = x.shape
    block = triton.next_power_of_2(d)
    add = residual is not None
    _rms_norm[(m,)](x, residual, weight, y, total, d, x.stride(0), eps, ADD=add, BLOCK=block, num_warps=_warps(block))


def _launch_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    eps: float,
) -> None:
    m, d = x.shape
    block = triton.next_power_of_2(d)
    flags = {"ADD": residual is not None, "HAS_BIAS": bias is not None}
    _layer_norm[(m,)](x, residual, weight, bias, y, total, d, eps, **flags, BLOCK=block, num_warps=_warps(block))


def _warps(block: int) -> int:
    """Warps for a row of `block` elements: eight elements a thread, four to sixteen warps above one row of a warp."""
    return min(max(block // 256, 1), 16)
