"""The small steps between the matrices, each as one kernel: norms, rotation with the cache write, activations.

Every step computes in fp32 and rounds once, at the store. x is bf16, fp16 or fp32; norm weights and
rotary tables are fp32. The reference beside each step is its definition, and also its fall-back.

    GPU   triton_fused.py         CPU   native/library.py         neither: the reference, counted
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import ops
from .dispatch import fallback
from .native import bindings, library
from .native.bindings import Library

Tensor = torch.Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""The activations by their name in a checkpoint's config: the definition of each, on fp32."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [M, D], rows may lie apart -> x / sqrt(mean(x^2) + eps) * weight [D], contiguous."""
    check_norm("rms_norm", x, weight)
    return _RMS_NORM(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [M, D] contiguous -> (rms_norm(s), s) with s = x + residual, rounded to their dtype."""
    check_norm("add_rms_norm", x, weight)
    _check_sum("add_rms_norm", x, residual)
    return _ADD_RMS_NORM(x, residual, weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm_reference(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [M, D] contiguous -> (x - mean) / sqrt(variance + eps) * weight [D] + bias [D]."""
    check_norm("layer_norm", x, weight, bias)
    if not x.is_contiguous():
        raise ValueError(f"layer_norm wants contiguous x, got {tuple(x.shape)} with strides {x.stride()}")
    return _LAYER_NORM(x, weight, bias, eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` in plain torch."""
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual [M, D] contiguous -> (layer_norm(s), s) with s = x + residual, rounded to their dtype."""
    check_norm("add_layer_norm", x, weight, bias)
    _check_sum("add_layer_norm", x, residual)
    return _ADD_LAYER_NORM(x, residual, weight, bias, eps)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain torch."""
    total = (x.float() + residual.float()).to(x.dtype)
    return layer_norm_reference(total, weight, bias, eps), total


def rotary_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate q and k, write k and v to their pools, and return q [T, H, D] contiguous.

    norms: fp32 weights [D] of RMSNorms with `eps` that each head of q and each of k passes first, as Qwen3's do.

    qkv [T, (H + 2 KV) D] contiguous; cos, sin fp32 [T, R / 2]: the first R of D dims are rotated,
    dim i with dim i + R / 2, as Hugging Face does (R = 0: none); pools [blocks, page, KV, D];
    slots int64 [T] = block * page + offset, unique but for rows that nobody reads.
    """
    check_rotary("rotary_cache", qkv, cos, sin, k_pool, v_pool, slots, heads, kv_heads, head_dim, norms)
    return _ROTARY_CACHE(qkv, cos, sin, k_pool, v_pool, slots, heads, *(norms or (None, None)), eps)


def rotary_cache_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`rotary_cache` in plain torch."""
    kv_heads, head_dim = k_pool.shape[2:]
    q, k, v = qkv.view(qkv.shape[0], heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    k_pool.view(-1, kv_heads, head_dim)[slots] = _rotate(k, cos, sin, k_norm, eps)
    v_pool.view(-1, kv_heads, head_dim)[slots] = v
    return _rotate(q, cos, sin, q_norm, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    half = cos.shape[1]
    wide = x.float()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm
    a, b, rest = wide.split([half, half, x.shape[2] - 2 * half], dim=2)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s, rest], dim=2).to(x.dtype)


def concat(parts: list[Tensor]) -> Tensor:
    """Contiguous tensors [M, N_i] of one dtype side by side: [M, sum N]."""
    alike = {(part.dim(), part.shape[:1], part.dtype) for part in parts}
    if not 0 < len(parts) <= bindings.MOST_PARTS or len(alike) > 1 or not all(p.is_contiguous() for p in parts):
        raise ValueError(
            f"concat wants 1 to {bindings.MOST_PARTS} contiguous tensors [M, N] of one dtype and M, got "
            + "; ".join(f"{tuple(part.shape)} of {part.dtype} with strides {part.stride()}" for part in parts)
        )
    return _CONCAT(parts)


def concat_reference(parts: list[Tensor]) -> Tensor:
    """`concat` in plain torch."""
    return torch.cat(parts, dim=1)


def gated_act(gate_up: Tensor, kind: str) -> Tensor:
    """gate_up [M, 2 F] contiguous = gate | up -> act(gate) * up [M, F]; kind: one of ACTIVATIONS."""
    _check_act("gated_act", gate_up, kind)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gated_act wants [M, 2 F], got {tuple(gate_up.shape)}")
    return _GATED_ACT(gate_up, kind)


def gated_act_reference(gate_up: Tensor, kind: str) -> Tensor:
    """`gated_act` in plain torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (ACTIVATIONS[kind](gate) * up).to(gate_up.dtype)


def act(x: Tensor, kind: str) -> Tensor:
    """act(x) for contiguous x of any shape; kind: one of ACTIVATIONS."""
    _check_act("act", x, kind)
    return _ACT(x, kind)


def act_reference(x: Tensor, kind: str) -> Tensor:
    """`act` in plain torch."""
    return ACTIVATIONS[kind](x.float()).to(x.dtype)


def check_rotary(
    op: str,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    norms: tuple[Tensor, Tensor] | None,
) -> None:
    """ValueError where these are not what `rotary_cache` takes."""
    tokens, half = qkv.shape[0], cos.shape[-1]
    blocks = k_pool.shape[:2]
    tensors = (qkv, cos, sin, k_pool, v_pool, slots)
    shapes: list[tuple[int, ...]] = [(tokens, (heads + 2 * kv_heads) * head_dim), (tokens, half), (tokens, half)]
    shapes += [(*blocks, kv_heads, head_dim), (*blocks, kv_heads, head_dim), (tokens,)]
    dtypes = [qkv.dtype, torch.float32, torch.float32, qkv.dtype, qkv.dtype, torch.int64]
    if (
        [tensor.shape for tensor in tensors] != shapes
        or [tensor.dtype for tensor in tensors] != dtypes
        or qkv.dtype not in bindings.DTYPES
        or not all(map(torch.Tensor.is_contiguous, tensors))
    ):
        names = ("qkv", "cos", "sin", "k_pool", "v_pool", "slots")
        rows = zip(names, tensors, shapes, dtypes, strict=True)
        raise ValueError(
            f"{op} wants contiguous tensors: "
            + "; ".join(f"{name} {s} of {d}, got {tuple(t.shape)} of {t.dtype}" for name, t, s, d in rows)
        )
    if 2 * half > head_dim:
        raise ValueError(f"{op} cannot rotate {2 * half} of {head_dim} dims")
    for norm in norms or ():
        if norm.shape != (head_dim,) or norm.dtype != torch.float32 or not norm.is_contiguous():
            raise ValueError(f"{op} wants fp32 norm weights [{head_dim}], got {tuple(norm.shape)} of {norm.dtype}")


def check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    dtypes_fit = x.dtype in bindings.DTYPES and weight.dtype == torch.float32
    if not dtypes_fit or x.dim() != 2 or x.stride(1) != 1 or weight.shape != x.shape[1:]:
        raise ValueError(
            f"{op} wants x [M, D] of bf16, fp16 or fp32 with dense rows and an fp32 weight [D], got x "
            f"{tuple(x.shape)} of {x.dtype} with strides {x.stride()} and a weight {tuple(weight.shape)} "
            f"of {weight.dtype}"
        )
    if bias is not None and (bias.shape, bias.dtype) != (weight.shape, weight.dtype):
        raise ValueError(f"{op} wants a bias like its weight, got {tuple(bias.shape)} of {bias.dtype}")


def _check_sum(op: str, x: Tensor, residual: Tensor) -> None:
    if not (x.is_contiguous() and residual.is_contiguous()) or (x.shape, x.dtype) != (residual.shape, residual.dtype):
        raise ValueError(
            f"{op} wants two contiguous tensors alike, got {tuple(x.shape)} {x.dtype} with strides {x.stride()}"
            f" and {tuple(residual.shape)} {residual.dtype} with strides {residual.stride()}"
        )


def _check_act(op: str, x: Tensor, kind: str) -> None:
    if kind not in ACTIVATIONS or x.dtype not in bindings.DTYPES or not x.is_contiguous():
        raise ValueError(
            f"{op} knows {', '.join(ACTIVATIONS)} on contiguous bf16, fp16 and fp32, "
            f"got {kind!r} on {x.dtype} with strides {x.stride()}"
        )


def _native_rms_norm(native: Library, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    native.rms_norm(x, weight, eps, out)
    return out


def _native_add_rms_norm(
    native: Library, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    native.add_rms_norm(x, residual, weight, eps, out, total)
    return out, total


def _native_layer_norm(native: Library, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    out = torch.empty_like(x)
    native.layer_norm(x, weight, bias, eps, out)
    return out


def _native_add_layer_norm(
    native: Library, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    native.add_layer_norm(x, residual, weight, bias, eps, out, total)
    return out, total


def _native_rotary_cache(
    native: Library,
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
    q = qkv.new_empty(qkv.shape[0], heads, k_pool.shape[3])
    norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
    native.rotary_cache(qkv, cos, sin, k_pool, v_pool, slots, heads, norms, eps, q)
    return q


def _native_concat(native: Library, parts: list[Tensor]) -> Tensor:
    out = parts[0].new_empty(parts[0].shape[0], sum(part.shape[1] for part in parts))
    native.concat(parts, out)
    return out


def _native_gated_act(native: Library, gate_up: Tensor, kind: str) -> Tensor:
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    native.gated_act(gate_up, kind, out)
    return out


def _native_act(native: Library, x: Tensor, kind: str) -> Tensor:
    out = torch.empty_like(x)
    native.act(x, kind, out)
    return out


def _register(
    schema: str, reference: Callable[..., Any], native: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """One op whose GPU kernel is the launcher of the same name in triton_fused.py."""
    name = schema.partition("(")[0]

    def cpu(*args: Any) -> Any:
        kernels = library.load()
        if kernels is None:
            fallback(name, library.why_not())
            return reference(*args)
        return native(kernels, *args)

    def gpu(*args: Any) -> Any:
        kernels = ops.triton_kernels("fused")
        if kernels is None:
            fallback(name, "Triton is not installed")
            return reference(*args)
        return getattr(kernels, name)(*args)

    return ops.register(schema, cpu=cpu, gpu=gpu, fake=fake)


_RMS_NORM = _register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    rms_norm_reference,
    _native_rms_norm,
    lambda x, weight, eps: x.new_empty(x.shape),
)
_ADD_RMS_NORM = _register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    add_rms_norm_reference,
    _native_add_rms_norm,
    lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
)
_LAYER_NORM = _register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    layer_norm_reference,
    _native_layer_norm,
    lambda x, weight, bias, eps: torch.empty_like(x),
)
_ADD_LAYER_NORM = _register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    add_layer_norm_reference,
    _native_add_layer_norm,
    lambda x, residual, weight, bias, eps: (torch.empty_like(x), torch.empty_like(x)),
)
_ROTARY_CACHE = _register(
    "rotary_cache(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor slots, int heads,"
    " Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor",
    rotary_cache_reference,
    _native_rotary_cache,
    lambda qkv, cos, sin, k_pool, v_pool, slots, heads, *_: qkv.new_empty(qkv.shape[0], heads, k_pool.shape[3]),
)
_CONCAT = _register(
    "concat(Tensor[] parts) -> Tensor",
    concat_reference,
    _native_concat,
    lambda parts: parts[0].new_empty(parts[0].shape[0], sum(part.shape[1] for part in parts)),
)
_GATED_ACT = _register(
    "gated_act(Tensor gate_up, str kind) -> Tensor",
    gated_act_reference,
    _native_gated_act,
    lambda gate_up, kind: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
)
_ACT = _register("act(Tensor x, str kind) -> Tensor", act_reference, _native_act, lambda x, kind: torch.empty_like(x))
