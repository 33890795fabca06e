"""bitmap: a weight with zeros anywhere is stored as one bit for every element, and the others' values.

    W [N=2, K=10] = | a 0 0 b 0 0 0 0 c 0 |     role "bits":   0b00001001 0b00000001 0b00000000 0b00000010
                    | 0 0 0 0 0 0 0 0 0 d |                    uint8 [N, ceil(K / 8)], lowest bit first
                                                role "values": a b c d     row after row, the unit's own dtype
                                                role "bias":   g h         only when the unit has one

At 50 % zeros that is 56.25 % of dense bf16. An element is kept when any of its bits is set: -0.0 and NaN come back as
they were. N:M patterns other than 2:4 are bitmaps whose words hold equally many bits, which prepare finds out.

Paths of `apply`: see masked.py for the CPU. On a GPU (sparse_layout.py, none of it measured on one yet):

    M = 1                       rows that keep nearly equally many are walked in step, others by their bits
    M <= EXPANDED_ROWS          tiles made dense in registers, for tensor cores (tuning.py)
    M above                     the whole weight made dense for one product of cuBLAS
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import around as around_linear
from . import masked, ops, sparse_layout
from .dispatch import fallback
from .unit import Around, Packed, Prepared, Traffic, Unit

NAME = "bitmap"
VERSION = 1
GPU_TENSORS = 7
"""Tensors of a unit that is laid out for a GPU; there are fewer for a CPU."""


def fits(unit: Unit) -> str | None:
    """None when the unit is one linear module that becomes smaller, else what keeps it out."""
    if reason := masked.fits(NAME, unit):
        return reason
    weight = unit.tensors["weight"]
    zeros = weight.numel() - int(masked.kept(weight).count_nonzero())
    if -(-weight.shape[1] // 8) * weight.shape[0] < zeros * weight.element_size():
        return None
    return f"{zeros / max(1, weight.numel()):.1%} of its weights are zero, which saves less than a bit for each takes"


def encode(unit: Unit) -> Packed:
    """The bits of all weights and the values of those that are kept."""
    reason = fits(unit)
    if reason:
        raise ValueError(reason)
    weight, bias = unit.tensors["weight"].contiguous(), unit.tensors.get("bias")
    mask = masked.kept(weight)
    tensors = {"bits": masked.to_bits(mask), "values": masked.pick(weight, mask)}
    return Packed(NAME, VERSION, dict(unit.modules), tensors | ({} if bias is None else {"bias": bias.contiguous()}))


def decode(packed: Packed) -> Unit:
    """The unit that was encoded, bit for bit. WrongShape or FolderDamaged where bits and values do not meet."""
    (path, (n, k)), tensors = next(iter(packed.modules.items())), packed.tensors
    masked.check(path, tensors["bits"], tensors["values"], n, k)
    whole = {"weight": masked.dense(tensors["bits"], tensors["values"], k)}
    return Unit(dict(packed.modules), whole | {role: t for role, t in tensors.items() if role == "bias"})


def weight(packed: Packed, path: str) -> torch.Tensor:
    """The matrix [N, K] that module `path` multiplies by."""
    return decode(packed).tensors["weight"]


def reference(x: torch.Tensor, packed: Packed, path: str) -> torch.Tensor:
    """x [M, K] -> y [M, N] of module `path` in x.dtype: one fp32 matmul, one rounding."""
    y = x.float() @ weight(packed, path).float().t()
    if "bias" in packed.tensors:
        y += packed.tensors["bias"].float()
    return y.to(x.dtype)


def prepare(packed: Packed, device: torch.device | str) -> Prepared:
    """The tensors of masked.py for a CPU, of sparse_layout.py for a GPU, then bias or None; raises as `decode` does."""
    (path, (n, k)), tensors = next(iter(packed.modules.items())), packed.tensors
    masked.check(path, tensors["bits"], tensors["values"], n, k)
    if masked.for_triton(device):
        bits, values = masked.where_it_is_quick([tensors["bits"], tensors["values"]], device)
        return _of_gpu({path: (n,)}, sparse_layout.bitmap(bits, values, k), tensors.get("bias"), (n, k), device)
    return masked.lay_out(NAME, packed.modules, tensors["bits"], tensors["values"], tensors.get("bias"), device)


def stack(parts: list[tuple[Prepared, str]]) -> Prepared | None:
    """All outputs of `parts` in order, copied; None when inputs, dtypes, biases or ways to walk rows differ."""
    if len(parts[0][0].tensors) != GPU_TENSORS:
        return masked.stack(parts)
    laid = [_laid(prepared) for prepared, _ in parts]
    biases = [prepared.tensors[-1] for prepared, _ in parts]
    inputs = {prepared.ints[1] for prepared, _ in parts}
    if len(inputs) > 1 or len({(one.values.dtype, b is None) for one, b in zip(laid, biases, strict=True)}) > 1:
        return None
    joined = sparse_layout.side_by_side(laid)
    if joined is None:
        return None
    widths = tuple(n for prepared, path in parts for n in prepared.outputs[path])
    bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    return _of_gpu({parts[0][1]: widths}, joined, bias, (sum(widths), inputs.pop()), joined.values.device)


def apply(x: torch.Tensor, prepared: Prepared, path: str, wide: bool = False) -> torch.Tensor:
    """x [M, K] contiguous -> y [M, N], or all outputs that were stacked under `path`, side by side; fp32 if wide."""
    return _BITMAP_LINEAR(x, _read(prepared, len(x)), prepared.tensors[-1], prepared.ints, wide)


def apply_around(x: torch.Tensor, prepared: Prepared, path: str, around: Around) -> torch.Tensor | None:
    """`apply` with what stands around it in one launch; None where separate steps have to do it."""
    if not masked.takes_around(x, around):
        return None
    return _BITMAP_AROUND(x, _read(prepared, len(x)), prepared.tensors[-1], prepared.ints, *around)


def slice(packed: Packed, path: str, dim: int, start: int, stop: int) -> Packed:
    """Outputs (dim 0) or inputs (dim 1) [start, stop) of module `path`; of input shards the first keeps the bias.

    Values are picked, never spread out.
    """
    n, k = packed.modules[path]
    if dim not in (0, 1) or not 0 <= start < stop <= (n, k)[dim]:
        raise ValueError(f"{path} is [{n}, {k}]: dim {dim} has no [{start}, {stop})")
    bits, values, bias = (packed.tensors.get(role) for role in ("bits", "values", "bias"))
    assert bits is not None and values is not None
    if dim == 0:
        before, upto = (int(masked.counts(bits[:row]).sum(dtype="int64")) for row in (start, stop))
        tensors = {"bits": bits[start:stop].contiguous(), "values": values[before:upto].clone()}
    else:
        mask = masked.from_bits(bits, k)
        within = torch.zeros(k, dtype=torch.bool)
        within[start:stop] = True
        tensors = {"bits": masked.to_bits(mask[:, start:stop]), "values": values[within.expand(n, k)[mask]]}
    if bias is not None and (dim == 0 or start == 0):
        tensors["bias"] = bias[start:stop].contiguous() if dim == 0 else bias
    return Packed(NAME, VERSION, {path: (stop - start, k) if dim == 0 else (n, stop - start)}, tensors)


def traffic(packed: Packed, m: int) -> Traffic:
    """Everything that `prepare` lays out for a CPU once, and two flops for each value and row.

    A GPU reads 62.5 % of dense for one token where rows are walked in step, not 56.25 %.
    """
    n, k = next(iter(packed.modules.values()))
    return masked.traffic(n, k, packed.tensors["values"], packed.tensors.get("bias"), m)


def cases() -> list[Unit]:
    """One output, ragged edges, a bias, empty and full rows, equally full words, every dtype."""
    generator = torch.Generator().manual_seed(0)

    def unit(n: int, k: int, dtype: torch.dtype) -> Unit:
        dense = torch.randn(n, k, generator=generator) * k**-0.5
        if k == 96:
            dense *= torch.tensor([0, 1, 1, 0, 0, 0, 1, 1]).repeat(k // 8)
        else:
            dense[torch.rand(n, k, generator=generator) < 0.5] = 0
            dense[n // 2 : n // 2 + n // 3], dense[: n // 16] = 0, 1
        tensors = {"weight": dense.to(dtype)}
        if k != 64:
            tensors["bias"] = torch.randn(n, generator=generator).to(dtype)
        return Unit({"m": (n, k)}, tensors)

    shapes = [(1, 40), (33, 7), (3, 64), (96, 96), (130, 257)]
    return [unit(n, k, dtype) for n, k in shapes for dtype in masked.DTYPES]


def _of_gpu(
    outputs: dict[str, tuple[int, ...]],
    laid: sparse_layout.Bitmap,
    bias: torch.Tensor | None,
    shape: tuple[int, int],
    device: torch.device | str,
) -> Prepared:
    there = tuple(None if tensor is None else tensor.to(device) for tensor in (*laid[:-1], bias))
    return Prepared(NAME, outputs, there, (*shape, laid.jump))


def _laid(prepared: Prepared) -> sparse_layout.Bitmap:
    tensors: Any = prepared.tensors
    values, bits, ahead, starts, steps, columns, _bias = tensors
    return sparse_layout.Bitmap(values, bits, ahead, starts, steps, columns, prepared.ints[2])


def _read(prepared: Prepared, rows: int) -> list[torch.Tensor | None]:
    """The tensors that a product of so many rows reads: on a GPU three where rows are walked in step, else four."""
    *laid, _ = prepared.tensors
    if len(prepared.tensors) != GPU_TENSORS:
        return laid
    values, bits, ahead, starts, steps, columns = laid
    return [values, steps, columns] if rows == 1 and steps is not None else [values, bits, ahead, starts]


def _bitmap_cpu(
    x: torch.Tensor, laid: Sequence[torch.Tensor], bias: torch.Tensor | None, sizes: Sequence[int], wide: bool
) -> torch.Tensor:
    return masked.on_cpu("bitmap_linear", x, laid, bias, sizes, wide)


def _bitmap_gpu(
    x: torch.Tensor, laid: Sequence[torch.Tensor], bias: torch.Tensor | None, sizes: Sequence[int], wide: bool
) -> torch.Tensor:
    kernels = ops.triton_kernels("bitmap")
    if kernels is None:
        fallback("bitmap_linear", "Triton is not installed")
        return masked.torch_path(x, laid, bias, sizes, wide)
    masked.check_input("bitmap_linear", x, sizes[1], laid[0].dtype)
    return kernels.bitmap_linear(x, laid, bias, sizes, wide)


_BITMAP_LINEAR = ops.register(
    "bitmap_linear(Tensor x, Tensor[] laid, Tensor? bias, int[] sizes, bool wide) -> Tensor",
    cpu=_bitmap_cpu,
    gpu=_bitmap_gpu,
    fake=masked.fake,
)


def _around_gpu(
    x: torch.Tensor, laid: Sequence[torch.Tensor], bias: torch.Tensor | None, sizes: Sequence[int], *around: Any
) -> torch.Tensor:
    masked.check_input("bitmap_linear_around", x, sizes[1], laid[0].dtype)
    around_linear.check("bitmap_linear_around", x, sizes[0], Around(*around))
    return ops.triton_kernels("bitmap").bitmap_linear(x, laid, bias, sizes, around=Around(*around))


_BITMAP_AROUND = ops.register(
    "bitmap_linear_around(Tensor x, Tensor[] laid, Tensor? bias, int[] sizes, Tensor? norm, float eps, str? act, "
    "Tensor? residual) -> Tensor",
    cpu=masked.around_on_cpu,
    gpu=_around_gpu,
    fake=masked.around_fake,
)
