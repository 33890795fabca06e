"""int8: rows of 8-bit integers, each with a scale of its own. Half the bytes of bf16, at a small loss of quality.

    W [N=2, K=3] ~ | 0.1 * 3   0.1 * -7   0.1 * 127 |     role "scale":  0.1 0.02                fp32 [N]
                   | 0.02 * 5  0.02 * 127 0.02 * -1 |     role "weight": 3 -7 127 5 127 -1       int8 [N, K]
                                                          role "bias":   g h                     only when there is one

Storage is exact: what is lost is lost in `quantize`, the nearest multiples of max|row| / 127. Made for the head: it
is read once a token, and an error there touches one layer.

Paths of `apply`, by the number of rows M:

    GPU   M <= GPU_ROWS       Triton: weights widened in registers (triton_int8.py)
    CPU   M <= int8_rows      native
          M above             F.linear on the weights that the integers stand for, made anew each time

GPU_ROWS has not been measured on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import ops
from .dispatch import fallback, interpreting
from .native import bindings, library
from .unit import Around, Packed, Prepared, Traffic, Unit

NAME = "int8"
VERSION = 1
GPU_ROWS = 64
_LARGEST = 127


def quantize(unit: Unit) -> Unit:
    """A dense unit with its weight [N, K] as int8 rows and their scales."""
    weight = unit.tensors["weight"].float()
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    rounded = (weight / scale[:, None]).round().to(torch.int8)
    return Unit(dict(unit.modules), {**unit.tensors, "weight": rounded, "scale": scale})


def fits(unit: Unit) -> str | None:
    """None when the unit is one linear module of int8 rows, else what keeps it out."""
    weight, scale, bias = (unit.tensors.get(role) for role in ("weight", "scale", "bias"))
    if weight is None or scale is None or unit.tensors.keys() - {"weight", "scale", "bias"}:
        return f"int8 stores a weight, its scale and perhaps a bias, the unit has {sorted(unit.tensors)}"
    if weight.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
        return (
            f"int8 wants an int8 weight [N, K] and an fp32 scale [N], got {tuple(weight.shape)} of {weight.dtype} "
            f"and {tuple(scale.shape)} of {scale.dtype}"
        )
    if list(unit.modules.values()) != [tuple(weight.shape)]:
        return f"the weight is {tuple(weight.shape)}, the modules are {unit.modules}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"the bias is {tuple(bias.shape)}, the outputs are {weight.shape[0]}"
    return None


def encode(unit: Unit) -> Packed:
    """The unit's tensors, contiguous."""
    reason = fits(unit)
    if reason:
        raise ValueError(reason)
    return Packed(NAME, VERSION, dict(unit.modules), {role: t.contiguous() for role, t in unit.tensors.items()})


def decode(packed: Packed) -> Unit:
    """The unit that was encoded, bit for bit."""
    return Unit(dict(packed.modules), dict(packed.tensors))


def weight(packed: Packed, path: str) -> torch.Tensor:
    """The matrix [N, K] that module `path` multiplies by, fp32."""
    return packed.tensors["weight"].float() * packed.tensors["scale"][:, None]


def reference(x: torch.Tensor, packed: Packed, path: str) -> torch.Tensor:
    """x [M, K] -> y [M, N] of module `path` in x.dtype: one fp32 matmul, one rounding."""
    y = x.float() @ weight(packed, path).t()
    if "bias" in packed.tensors:
        y += packed.tensors["bias"].float()
    return y.to(x.dtype)


def prepare(packed: Packed, device: torch.device | str) -> Prepared:
    """weight int8 [N, K], scale fp32 [N] and bias fp32 [N] or None on `device`."""
    tensors, bias = packed.tensors, packed.tensors.get("bias")
    outputs: dict[str, tuple[int, ...]] = {path: (n,) for path, (n, _) in packed.modules.items()}
    bias = None if bias is None else bias.to(device, torch.float32)
    return Prepared(NAME, outputs, (tensors["weight"].to(device), tensors["scale"].to(device), bias))


def stack(parts: list[tuple[Prepared, str]]) -> Prepared | None:
    """One weight for all outputs of `parts` in order, copied; None when inputs or biases differ."""
    weights, scales, biases = zip(*(prepared.tensors for prepared, _ in parts), strict=True)
    if len({(w.shape[1], b is not None) for w, b in zip(weights, biases, strict=True)}) != 1:
        return None
    widths = tuple(n for prepared, path in parts for n in prepared.outputs[path])
    bias = None if biases[0] is None else torch.cat(biases)
    return Prepared(NAME, {parts[0][1]: widths}, (torch.cat(weights), torch.cat(scales), bias))


def apply(x: torch.Tensor, prepared: Prepared, path: str, wide: bool = False) -> torch.Tensor:
    """x [M, K] contiguous -> y [M, N], or all outputs that were stacked under `path`, side by side; fp32 if wide."""
    return _INT8_LINEAR(x, *prepared.tensors, wide)


def apply_around(x: torch.Tensor, prepared: Prepared, path: str, around: Around) -> torch.Tensor | None:
    """None: a head has its norm ahead, of few rows, and nothing behind."""
    return None


def slice(packed: Packed, path: str, dim: int, start: int, stop: int) -> Packed:
    """Outputs (dim 0) or inputs (dim 1) [start, stop) of module `path`; of input shards the first keeps the bias."""
    n, k = packed.modules[path]
    if dim not in (0, 1) or not 0 <= start < stop <= (n, k)[dim]:
        raise ValueError(f"{path} is [{n}, {k}]: dim {dim} has no [{start}, {stop})")
    part = packed.tensors["weight"].narrow(dim, start, stop - start).contiguous()
    others = {role: t for role, t in packed.tensors.items() if role == "scale" or (role == "bias" and dim * start == 0)}
    if dim == 0:
        others = {role: t[start:stop].contiguous() for role, t in others.items()}
    return Packed(NAME, VERSION, {path: (part.shape[0], part.shape[1])}, {"weight": part, **others})


def traffic(packed: Packed, m: int) -> Traffic:
    """Every weight, scale and fp32 bias once, and two flops for each weight and row."""
    weights = packed.tensors["weight"].numel()
    rows = sum(4 * tensor.numel() for role, tensor in packed.tensors.items() if role != "weight")
    return Traffic(weights + rows, 2 * m * weights)


def cases() -> list[Unit]:
    """One output, one input, ragged edges, a bias, a row of zeros."""
    generator = torch.Generator().manual_seed(0)

    def unit(n: int, k: int) -> Unit:
        dense = torch.randn(n, k, generator=generator) * k**-0.5
        dense[n // 2] = 0
        tensors = {"weight": dense} if k == 64 else {"weight": dense, "bias": torch.randn(n, generator=generator)}
        return quantize(Unit({"m": (n, k)}, tensors))

    return [unit(n, k) for n, k in ((1, 1), (33, 7), (3, 64), (96, 96), (130, 257))]


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype not in bindings.DTYPES or not x.is_contiguous():
        raise ValueError(
            f"int8_linear wants contiguous x [M, {weight.shape[1]}] of bf16, fp16 or fp32, "
            f"got {tuple(x.shape)} of {x.dtype} with strides {x.stride()}"
        )


def _int8_cpu(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, wide: bool
) -> torch.Tensor:
    _check(x, weight)
    native = library.load()
    if native is None:
        fallback("int8_linear", library.why_not())
    elif x.shape[0] <= native.int8_rows():
        y = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32 if wide else x.dtype)
        native.linear(x, weight, bias, y, scale)
        return y
    return _torch_path(x, weight, scale, bias, wide)


def _int8_gpu(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, wide: bool
) -> torch.Tensor:
    _check(x, weight)
    kernels = ops.triton_kernels("int8")
    if kernels is None:
        fallback("int8_linear", "Triton is not installed")
    elif x.shape[0] <= GPU_ROWS or interpreting():
        return kernels.int8_linear(x, weight, scale, bias, wide)
    return _torch_path(x, weight, scale, bias, wide)


def _torch_path(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, wide: bool
) -> torch.Tensor:
    """In fp32, where the product of integer and scale is not rounded; scales go last."""
    y = F.linear(x.float(), weight.float()) * scale
    y = y if bias is None else y + bias
    return y if wide else y.to(x.dtype)


_INT8_LINEAR = ops.register(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool wide) -> Tensor",
    cpu=_int8_cpu,
    gpu=_int8_gpu,
    fake=lambda x, weight, scale, bias, wide: x.new_empty(
        x.shape[0], weight.shape[0], dtype=torch.float32 if wide else x.dtype
    ),
)
