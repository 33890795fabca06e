"""What the kernel laboratory runs: a unit of any format at any shape, and the small steps between the matrices.

A format needs an entry in SAMPLES only where a random linear layer is not what it stores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ..converters.low_rank import rank
from ..errors import BadParameter
from ..kernels import attention, bitmap, decode, dense, formats, fused, int8, routed_ffn, shared_basis, two_four
from ..kernels.unit import Around, Prepared, Unit

PATH = "m"
"""The one module that every sample serves."""

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""[N outputs, K inputs] of Llama-3-8B: q|k|v, o, gate|up, down."""
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN = 32, 8, 128, 4096, 14336
ROWS = (1, 8, 64)
CONTEXT, PAGE = 512, 16
GATED, RESIDUAL = AROUNDS = ("norm, gated", "residual")
"""What may stand around a linear: a norm ahead of gate | up and their product behind, or a sum behind."""
KEPT_OUT = 0.2
"""Share of the weights that the samples of shared_basis leave out: the paper's first row."""


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers scaled for K = shape[-1] inputs, a block of 2^20 again and again: quick at any size."""
    count = torch.Size(shape).numel()
    block = torch.randn(min(count, 1 << 20), generator=torch.Generator().manual_seed(0)) * shape[-1] ** -0.5
    return block.to(dtype).repeat(-(-count // block.numel()))[:count].view(shape)


def linear(n: int, k: int, dtype: torch.dtype) -> Unit:
    """A linear layer of random weights."""
    return Unit({PATH: (n, k)}, {"weight": random((n, k), dtype)})


def factored(n: int, k: int, dtype: torch.dtype) -> Unit:
    """A basis of a group of one."""
    r = rank(KEPT_OUT, n, k, 1)
    return Unit({PATH: (n, k)}, {"basis": random((r, k), dtype), f"coefficients.{PATH}": random((n, r), dtype)})


def pivoted(n: int, k: int, dtype: torch.dtype) -> Unit:
    """The same as `shared_basis.pivot` would leave it, its pivots spread evenly."""
    r = rank(KEPT_OUT, n, k, 1)
    tensors = {"basis": random((r, k - r), dtype), f"coefficients.{PATH}": random((n, r), dtype)}
    return Unit({PATH: (n, k)}, tensors | {"pivots": (torch.arange(r) * k // r).int()})


def two_of_four(n: int, k: int, dtype: torch.dtype) -> Unit:
    """A linear layer with the two smaller of every four weights zero. K a multiple of 4."""
    weight = random((n, k), dtype)
    groups = weight.view(-1, 4)[: 1 << 18]
    dropped = groups.abs().float().topk(2, dim=1, largest=False).indices
    mask = torch.ones_like(groups, dtype=torch.bool).scatter_(1, dropped, False).flatten()
    kept = mask.repeat(-(-weight.numel() // len(mask)))[: weight.numel()].view(n, k)
    return Unit({PATH: (n, k)}, {"weight": weight.where(kept, 0)})


def half_zero(n: int, k: int, dtype: torch.dtype, even: bool = True) -> Unit:
    """A linear layer with half of its weights zero: half of every row, or of some rows none."""
    weight = random((n, k), dtype)
    rows = min(n, 256)
    kept = torch.rand(rows, k, generator=torch.Generator().manual_seed(1)).argsort(dim=1) < k // 2
    kept = kept.repeat(-(-n // rows), 1)[:n]
    if not even:
        kept[n // 2 :: 8] = True
    return Unit({PATH: (n, k)}, {"weight": weight.where(kept, 0)})


def ffn(n: int, k: int, dtype: torch.dtype) -> Unit:
    """A gated FFN of n neurons over k inputs, its router as likely to wake a group as not. n a multiple of 8."""
    size = next(size for size in reversed(routed_ffn.GROUP_SIZES) if n % size == 0)
    tensors = {"gate": random((n, k), dtype), "up": random((n, k), dtype), "down": random((k, n), dtype)}
    params = {"group_size": size, "tau": 0.5, "activation": "silu"}
    return Unit({PATH: (k, k)}, tensors | {"router": random((n // size, k), torch.float32)}, params)


SAMPLES: dict[str, dict[str, Callable[[int, int, torch.dtype], Unit]]] = {
    dense.NAME: {"": linear},
    shared_basis.NAME: {"factored": factored, "pivoted": pivoted},
    two_four.NAME: {"": two_of_four},
    bitmap.NAME: {"odd rows": partial(half_zero, even=False), "even rows": half_zero},
    int8.NAME: {"": lambda n, k, dtype: int8.quantize(linear(n, k, dtype))},
    routed_ffn.NAME: {"": ffn},
}
"""Format -> form -> how to make a unit [n, k] of a dtype that serves PATH."""


def chosen(name: str | None) -> tuple[ModuleType, ...]:
    """The format called `name`, or all whose samples are linear layers. Raises BadParameter."""
    try:
        return formats.LINEAR if name is None else (formats.by_name(name),)
    except KeyError as error:
        raise BadParameter(error.args[0]) from error


def units(module: ModuleType, n: int, k: int, dtype: torch.dtype) -> dict[str, Unit]:
    """Units [n, k] of the format in each of its forms. Raises BadParameter where it does not take them."""
    made = {form: make(n, k, dtype) for form, make in SAMPLES.get(module.NAME, {"": linear}).items()}
    for unit in made.values():
        reason = module.fits(unit)
        if reason:
            raise BadParameter(f"{module.NAME} takes no sample [{n}, {k}] of {dtype}: {reason} (see bench/samples.py)")
    return made


def applying(module: ModuleType, prepared: Prepared, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """`apply` of a sample on x [M, K], as a call without arguments."""
    return lambda: module.apply(x, prepared, PATH)


def around(kind: str, x: torch.Tensor, n: int) -> Around:
    """What stands around a sample of n outputs on x [M, K], of one kind of AROUNDS."""
    m, k = x.shape
    if kind == GATED:
        return Around((random((k,), torch.float32).abs() * k**0.5).to(x.device), 1e-5, "silu")
    return Around(residual=(random((m, n), x.dtype) * n**0.5).to(x.device))


def gated(module: ModuleType, prepared: Prepared) -> Prepared | None:
    """The sample twice, as gate and as up; None where the format does not stack them."""
    stacked: Prepared | None = module.stack([(prepared, PATH)] * 2)
    return stacked


def arounds(module: ModuleType, prepared: Prepared, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor | None]]:
    """`apply_around` of a sample on x [M, K] as calls without arguments, by kind; gated only where it stacks."""
    (n,) = prepared.outputs[PATH]
    forms = {GATED: gated(module, prepared), RESIDUAL: prepared}

    def call(laid_out: Prepared, kind: str) -> Callable[[], torch.Tensor | None]:
        given = around(kind, x, n)
        return lambda: module.apply_around(x, laid_out, PATH, given)

    return {kind: call(laid_out, kind) for kind, laid_out in forms.items() if laid_out}


def title(module: ModuleType, form: str) -> str:
    """Format and form in two words."""
    return f"{module.NAME} {form}".rstrip()


def steps(rows: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Any]]:
    """Every op that no format owns, at Llama-3-8B's sizes on `rows` sequences that decode one token each."""

    def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    blocks = CONTEXT // PAGE
    pool, q = made(blocks, PAGE, KV_HEADS, HEAD_DIM), made(rows, HEADS, HEAD_DIM)
    starts = torch.arange(rows + 1, dtype=torch.int32).to(device)
    context = torch.full((rows,), CONTEXT, dtype=torch.int32).to(device)
    tables = torch.arange(blocks, dtype=torch.int32).repeat(rows, 1).to(device)
    slots = torch.arange(rows).to(device)
    x, norm, table = made(rows, HIDDEN), made(HIDDEN, dtype=torch.float32), made(rows, HEAD_DIM // 2).float()
    qkv, half = made(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM), made(rows, FFN)
    return {
        "paged_attention": lambda: attention.paged_attention(q, pool, pool, starts, context, tables, 1, 0.1, 0),
        "decode": lambda: decode.decode(
            *(qkv, table, table, pool, pool.clone(), slots, context, tables),
            *(HEADS, KV_HEADS, HEAD_DIM, None, 0.0, 0.1, 0),
        ),
        "rotary_cache": lambda: fused.rotary_cache(
            qkv, table, table, pool, pool.clone(), slots, HEADS, KV_HEADS, HEAD_DIM
        ),
        "rms_norm": lambda: fused.rms_norm(x, norm, 1e-5),
        "add_rms_norm": lambda: fused.add_rms_norm(x, x.clone(), norm, 1e-5),
        "layer_norm": lambda: fused.layer_norm(x, norm, norm, 1e-5),
        "add_layer_norm": lambda: fused.add_layer_norm(x, x.clone(), norm, norm, 1e-5),
        "gated_act": lambda: fused.gated_act(made(rows, 2 * FFN), "silu"),
        "act": lambda: fused.act(half, "gelu"),
        "concat": lambda: fused.concat([x, half]),
    }
