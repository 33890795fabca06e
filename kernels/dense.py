"""dense: every weight stored as it is. The format that takes what no other takes, and the baseline of all.

    W [N=2, K=3] = | a b c |      role "weight": a b c d e f      row-major, the unit's own dtype
                   | d e f |      role "bias":   g h              only when the unit has one

    params {"transposed": true}   role "weight": a d b e c f      [K, N], as GPT-2's Conv1D keeps it on disk

Paths of `apply`, by the number of rows M:

    GPU   M = 1               Triton GEMV: multiply and add, no tensor cores (triton_dense.py)
          M <= GPU_ROWS       Triton GEMM: tensor cores, weights read once for all rows, split-K
          M above             cuBLAS: compute-bound, nothing of ours to gain until an epilogue is fused
    CPU   M <= linear_rows    native GEMV (native/library.py, measured by bench/cpu_linear.py)
          M above             F.linear, oneDNN's blocked GEMM

With what stands around it (`apply_around`) a linear on a GPU is still one launch, up to WHOLE_ROWS rows: the GEMM's K
is then not split. At M > 1 the norm's weight is multiplied into x ahead of 1 / rms, which is known last: fp16
has too little range for that, and has its norm first.

GPU_ROWS has not been measured on a GPU: 128 is where 128-row tiles still read every weight once.
Without a compiler or without Triton, F.linear runs at every M and is counted as a fall-back.

A wide y is not rounded to the dtype of x: kernels store their fp32 sums, on a CPU at every M. F.linear
can only widen what it has rounded; above GPU_ROWS that has to do, where none but an evaluation reads logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import around as around_linear
from . import ops
from .dispatch import fallback, interpreting
from .native import library
from .unit import Around, Packed, Prepared, Traffic, Unit

NAME = "dense"
VERSION = 1
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Rows up to which the Triton kernels run on a GPU. fp32 has no tensor cores at full precision.
GPU_ROWS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 16}

# Rows up to which they take what stands around a linear; above, a small launch costs each row little.
WHOLE_ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}


def fits(unit: Unit) -> str | None:
    """None when the unit is one linear module, else what keeps it out."""
    weight, bias = unit.tensors.get("weight"), unit.tensors.get("bias")
    others = sorted(unit.tensors.keys() - {"weight", "bias"})
    if weight is None or others:
        return f"dense stores a weight and perhaps a bias, the unit has {sorted(unit.tensors)}"
    dtypes = {tensor.dtype for tensor in unit.tensors.values()}
    if len(dtypes) > 1 or weight.dtype not in DTYPES:
        return f"dense takes one dtype of bfloat16, float16 and float32, the unit has {sorted(map(str, dtypes))}"
    shapes = list(unit.modules.values())
    if shapes != [tuple(weight.shape)]:
        return f"the weight is {tuple(weight.shape)}, the modules are {unit.modules}"
    if bias is not None and tuple(bias.shape) != weight.shape[:1]:
        return f"the bias is {tuple(bias.shape)}, the outputs are {weight.shape[0]}"
    return None


def encode(unit: Unit, transposed: bool = False) -> Packed:
    """The unit's tensors, contiguous; `transposed` stores the weight as [K, N]."""
    reason = fits(unit)
    if reason:
        raise ValueError(reason)
    tensors = {role: tensor.contiguous() for role, tensor in unit.tensors.items()}
    if transposed:
        tensors["weight"] = unit.tensors["weight"].t().contiguous()
    return Packed(NAME, VERSION, dict(unit.modules), tensors, {"transposed": True} if transposed else {})


def decode(packed: Packed) -> Unit:
    """The unit that was encoded, bit for bit."""
    return Unit(dict(packed.modules), {**packed.tensors, "weight": _weight(packed).contiguous()})


def weight(packed: Packed, path: str) -> torch.Tensor:
    """The matrix [N, K] that module `path` multiplies by."""
    return _weight(packed)


def reference(x: torch.Tensor, packed: Packed, path: str) -> torch.Tensor:
    """x [M, K] -> y [M, N] of module `path` in x.dtype: one fp32 matmul, one rounding."""
    y = x.float() @ _weight(packed).float().t()
    if "bias" in packed.tensors:
        y += packed.tensors["bias"].float()
    return y.to(x.dtype)


def prepare(packed: Packed, device: torch.device | str) -> Prepared:
    """weight [N, K] and bias [N] or None on `device`; nothing is copied that already lies right."""
    weight, bias = _weight(packed).to(device).contiguous(), packed.tensors.get("bias")
    outputs: dict[str, tuple[int, ...]] = {path: (n,) for path, (n, _) in packed.modules.items()}
    return Prepared(NAME, outputs, (weight, None if bias is None else bias.to(device)))


def stack(parts: list[tuple[Prepared, str]]) -> Prepared | None:
    """One weight for all outputs of `parts` in order, copied; None when input, dtype or bias differ."""
    weights, biases = zip(*(prepared.tensors for prepared, _ in parts), strict=True)
    if len({(w.shape[1], w.dtype, b is not None) for w, b in zip(weights, biases, strict=True)}) != 1:
        return None
    widths = tuple(n for prepared, path in parts for n in prepared.outputs[path])
    bias = None if biases[0] is None else torch.cat(biases)
    return Prepared(NAME, {parts[0][1]: widths}, (torch.cat(weights), bias))


def apply(x: torch.Tensor, prepared: Prepared, path: str, wide: bool = False) -> torch.Tensor:
    """x [M, K] contiguous -> y [M, N], or all outputs that were stacked under `path`, side by side; fp32 if wide."""
    return _LINEAR(x, *prepared.tensors, wide)


def apply_around(x: torch.Tensor, prepared: Prepared, path: str, around: Around) -> torch.Tensor | None:
    """`apply` with what stands around it in one launch; None where separate steps have to do it."""
    if not ops.takes_triton(x) or x.shape[0] > WHOLE_ROWS[x.dtype]:
        return None
    if around.norm is not None and x.dtype == torch.float16 and x.shape[0] > 1:
        return None
    return _LINEAR_AROUND(x, *prepared.tensors, *around)


def slice(packed: Packed, path: str, dim: int, start: int, stop: int) -> Packed:
    """Outputs (dim 0) or inputs (dim 1) [start, stop) of module `path`; of input shards the first keeps the bias."""
    n, k = packed.modules[path]
    if dim not in (0, 1) or not 0 <= start < stop <= (n, k)[dim]:
        raise ValueError(f"{path} is [{n}, {k}]: dim {dim} has no [{start}, {stop})")
    weight = _weight(packed).narrow(dim, start, stop - start)
    tensors = {"weight": (weight.t() if _transposed(packed) else weight).contiguous()}
    if "bias" in packed.tensors and (dim == 0 or start == 0):
        bias = packed.tensors["bias"]
        tensors["bias"] = bias[start:stop].contiguous() if dim == 0 else bias
    return Packed(NAME, VERSION, {path: (weight.shape[0], weight.shape[1])}, tensors, packed.params)


def traffic(packed: Packed, m: int) -> Traffic:
    """Every weight and bias once, and two flops for each weight and row."""
    weights = packed.tensors["weight"].numel()
    return Traffic(sum(t.nbytes for t in packed.tensors.values()), 2 * m * weights)


def cases() -> list[Unit]:
    """One output, one input, ragged edges, a bias, every dtype."""
    generator = torch.Generator().manual_seed(0)

    def unit(n: int, k: int, dtype: torch.dtype) -> Unit:
        tensors = {"weight": (torch.randn(n, k, generator=generator) * k**-0.5).to(dtype)}
        if k != 64:
            tensors["bias"] = torch.randn(n, generator=generator).to(dtype)
        return Unit({"m": (n, k)}, tensors)

    shapes = [(1, 1), (33, 7), (1, 64), (96, 96), (130, 257)]
    return [unit(n, k, dtype) for n, k in shapes for dtype in DTYPES]


def _transposed(packed: Packed) -> bool:
    return bool(packed.params.get("transposed", False))


def _weight(packed: Packed) -> torch.Tensor:
    """The stored weight as [N, K], a view."""
    return packed.tensors["weight"].t() if _transposed(packed) else packed.tensors["weight"]


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype or not x.is_contiguous():
        raise ValueError(
            f"linear wants contiguous x [M, {weight.shape[1]}] of {weight.dtype}, "
            f"got {tuple(x.shape)} of {x.dtype} with strides {x.stride()}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"linear wants a bias [{weight.shape[0]}] of {weight.dtype}, got {tuple(bias.shape)} of {bias.dtype}"
        )


def _linear_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool = False) -> torch.Tensor:
    _check(x, weight, bias)
    native = library.load()
    if native is None:
        fallback("linear", library.why_not())
        return _torch_path(x, weight, bias, wide)
    rows = native.linear_rows(x.dtype, x.shape[1])
    if x.shape[0] > rows and not (wide and rows):
        return _torch_path(x, weight, bias, wide)
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32 if wide else x.dtype)
    native.linear(x, weight, bias, y)
    return y


def _linear_gpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool = False) -> torch.Tensor:
    _check(x, weight, bias)
    triton_dense = ops.triton_kernels("dense")
    if triton_dense is None:
        fallback("linear", "Triton is not installed")
    elif x.shape[0] <= GPU_ROWS[x.dtype] or interpreting():
        return triton_dense.linear(x, weight, bias, wide)
    return _torch_path(x, weight, bias, wide)


def _torch_path(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool) -> torch.Tensor:
    y = F.linear(x, weight, bias)
    return y.float() if wide else y


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool = False) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32 if wide else x.dtype)


_LINEAR = ops.register(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool wide=False) -> Tensor",
    cpu=_linear_cpu,
    gpu=_linear_gpu,
    fake=_linear_fake,
)


def _around_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *around: Any) -> torch.Tensor:
    return around_linear.reference(x, lambda normed: F.linear(normed, weight, bias), Around(*around))


def _around_gpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *around: Any) -> torch.Tensor:
    _check(x, weight, bias)
    around_linear.check("linear_around", x, weight.shape[0], Around(*around))
    return ops.triton_kernels("dense").linear(x, weight, bias, around=Around(*around))


_LINEAR_AROUND = ops.register(
    "linear_around(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, float eps, str? act, Tensor? residual)"
    " -> Tensor",
    cpu=_around_cpu,
    gpu=_around_gpu,
    fake=lambda x, weight, bias, *around: x.new_empty(x.shape[0], len(weight) // (2 if Around(*around).act else 1)),
)
