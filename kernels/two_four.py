"""two_four: of every four neighbours along K at most two are not zero; those two are stored with their positions.

    W [N=1, K=10] = | 0 a 0 b | c 0 0 0 | d 0 |     role "values":    a b c 0 d 0   [N, 2 ceil(K / 4)], the unit's dtype
                                                    role "positions": 0b0100_1101 0b0100   uint8 [N, ceil(K / 8)]
                                                    role "bias":      only when the unit has one

A group's positions are four bits, the first of its values' two in the lower half, the lower group of a byte in its
lower half. The first position is always below the second. Where fewer than two elements have a bit set (-0.0 and NaN
have one) the lowest free positions hold zeros, so that a weight has one form only. 56.25 % of dense bf16 at any data.

Paths of `apply`: see masked.py for the CPU, which takes two bits of every four as a bitmap whose words are all half
full. On a GPU (sparse_layout.py, none of it measured on one yet):

    M = 1                       each value picks one of its group's four inputs (triton_two_four.py)
    M <= EXPANDED_ROWS          tiles made dense in registers, for tensor cores (tuning.py)
    M above                     the whole weight made dense for one product of cuBLAS
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import FolderDamaged, WrongShape
from . import around as around_linear
from . import masked, ops, sparse_layout
from .dispatch import fallback
from .unit import Around, Packed, Prepared, Traffic, Unit

NAME = "two_four"
VERSION = 1
GROUP = 4
GPU_TENSORS = 3
"""Tensors of a unit that is laid out for a GPU; there are more for a CPU."""
_NONE = 0xFF


def _of_pairs(of_group: list[int]) -> np.ndarray:
    """A table for bytes from one for their halves; _NONE where a half has none."""
    pairs = [_NONE if _NONE in (low, high) else low | high << 4 for high in of_group for low in of_group]
    return np.array(pairs, dtype=np.uint8)


def _two_bits(bits: int) -> int:
    """A group's four bits with the lowest free ones added until two are set."""
    for bit in (1, 2, 4, 8):
        if bits.bit_count() < 2:
            bits |= bit
    return bits


_PAIRS = [(first, second) for second in range(GROUP) for first in range(second)]
_POSITIONS = {1 << first | 1 << second: first | second << 2 for first, second in _PAIRS}
_FILL = _of_pairs([_two_bits(bits) if bits.bit_count() <= 2 else _NONE for bits in range(16)])
_TO_POSITIONS = _of_pairs([_POSITIONS.get(mask, 0) for mask in range(16)])
_TO_MASK = _of_pairs([{code: mask for mask, code in _POSITIONS.items()}.get(code, 0) for code in range(16)])


def fits(unit: Unit) -> str | None:
    """None when the unit is one linear module with two of every four weights zero, else what keeps it out."""
    if reason := masked.fits(NAME, unit):
        return reason
    weight = unit.tensors["weight"]
    full = np.argwhere(_FILL[masked.to_bits(masked.kept(weight)).numpy()] == _NONE)
    if not len(full):
        return None
    row, byte = full[0].tolist()
    groups = (8 * byte, 8 * byte + GROUP)
    column = next(c for c in groups if masked.kept(weight[row : row + 1, c : c + GROUP]).sum() > 2)
    last = min(column + GROUP, weight.shape[1]) - 1
    return f"row {row}, columns {column} to {last}: more than two of these weights are not zero"


def encode(unit: Unit) -> Packed:
    """Two values of every four and their positions."""
    reason = fits(unit)
    if reason:
        raise ValueError(reason)
    weight, bias = unit.tensors["weight"], unit.tensors.get("bias")
    (n, k), groups = weight.shape, -(-weight.shape[1] // GROUP)
    bits = _FILL[masked.to_bits(masked.kept(weight)).numpy()]
    if groups % 2:
        bits[:, -1] &= 0x0F
    mask = masked.from_bits(torch.from_numpy(bits), GROUP * groups)
    tensors = {
        "values": masked.pick(F.pad(weight, (0, GROUP * groups - k)).contiguous(), mask).view(n, 2 * groups),
        "positions": torch.from_numpy(_TO_POSITIONS[bits]),
    }
    return Packed(NAME, VERSION, dict(unit.modules), tensors | ({} if bias is None else {"bias": bias.contiguous()}))


def decode(packed: Packed) -> Unit:
    """The unit that was encoded, bit for bit. WrongShape or FolderDamaged where positions and values do not meet."""
    k, bits, values = next(iter(packed.modules.values()))[1], _bits(packed), packed.tensors["values"]
    whole = masked.dense(bits, values.flatten(), 2 * values.shape[1])[:, :k]
    others = {role: t for role, t in packed.tensors.items() if role == "bias"}
    return Unit(dict(packed.modules), {"weight": whole.contiguous(), **others})


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
    values, positions, bias = tensors["values"], tensors["positions"], tensors.get("bias")
    bits = torch.empty_like(positions) if positions.is_meta else _bits(packed)
    if not masked.for_triton(device):
        return masked.lay_out(NAME, packed.modules, bits, values.flatten(), bias, device)
    values, positions = masked.where_it_is_quick([values, positions], device)
    laid = sparse_layout.two_four(values, positions, k)
    there = (*(tensor.to(device) for tensor in laid), None if bias is None else bias.to(device))
    return Prepared(NAME, {path: (n,)}, there, (n, k))


def stack(parts: list[tuple[Prepared, str]]) -> Prepared | None:
    """All outputs of `parts` in order, copied; None when inputs, dtypes or biases differ."""
    if len(parts[0][0].tensors) != GPU_TENSORS:
        return masked.stack(parts)
    values, words, biases = zip(*(prepared.tensors for prepared, _ in parts), strict=True)
    inputs = {prepared.ints[1] for prepared, _ in parts}
    if len(inputs) > 1 or len({(v.dtype, b is None) for v, b in zip(values, biases, strict=True)}) > 1:
        return None
    widths = tuple(n for prepared, path in parts for n in prepared.outputs[path])
    bias = None if biases[0] is None else torch.cat(biases)
    joined = (torch.cat(values), torch.cat(words), bias)
    return Prepared(NAME, {parts[0][1]: widths}, joined, (sum(widths), *inputs))


def apply(x: torch.Tensor, prepared: Prepared, path: str, wide: bool = False) -> torch.Tensor:
    """x [M, K] contiguous -> y [M, N], or all outputs that were stacked under `path`, side by side; fp32 if wide."""
    *laid, bias = prepared.tensors
    return _TWO_FOUR_LINEAR(x, laid, bias, prepared.ints, wide)


def apply_around(x: torch.Tensor, prepared: Prepared, path: str, around: Around) -> torch.Tensor | None:
    """`apply` with what stands around it in one launch; None where separate steps have to do it."""
    if not masked.takes_around(x, around):
        return None
    *laid, bias = prepared.tensors
    return _TWO_FOUR_AROUND(x, laid, bias, prepared.ints, *around)


def slice(packed: Packed, path: str, dim: int, start: int, stop: int) -> Packed:
    """Outputs (dim 0) or inputs (dim 1) [start, stop) of module `path`; of input shards the first keeps the bias.

    Inputs can be cut between groups only: ValueError elsewhere.
    """
    n, k = packed.modules[path]
    if dim not in (0, 1) or not 0 <= start < stop <= (n, k)[dim]:
        raise ValueError(f"{path} is [{n}, {k}]: dim {dim} has no [{start}, {stop})")
    values, positions, bias = (packed.tensors.get(role) for role in ("values", "positions", "bias"))
    assert values is not None and positions is not None
    if dim == 0:
        shape, values, positions = (stop - start, k), values[start:stop], positions[start:stop]
    elif start % GROUP or (stop % GROUP and stop != k):
        raise ValueError(f"{path} is cut at multiples of {GROUP} inputs alone, not at [{start}, {stop})")
    else:
        first, last = start // GROUP, -(-stop // GROUP)
        shape, values = (n, stop - start), values[:, 2 * first : 2 * last]
        halves = torch.stack([positions & 15, positions >> 4], dim=2).flatten(1)[:, first:last]
        halves = F.pad(halves, (0, (last - first) % 2)).view(n, -1, 2)
        positions = halves[..., 0] | halves[..., 1] << 4
    tensors = {"values": values.contiguous(), "positions": positions.contiguous()}
    if bias is not None and (dim == 0 or start == 0):
        tensors["bias"] = bias[start:stop].contiguous() if dim == 0 else bias
    return Packed(NAME, VERSION, {path: shape}, tensors)


def traffic(packed: Packed, m: int) -> Traffic:
    """Everything that `prepare` lays out for a CPU once, and two flops for each value and row.

    A GPU reads 8 bytes a row less.
    """
    n, k = next(iter(packed.modules.values()))
    return masked.traffic(n, k, packed.tensors["values"], packed.tensors.get("bias"), m)


def cases() -> list[Unit]:
    """One output, one input, a cut-off group, a bias, empty and half empty groups, every dtype."""
    generator = torch.Generator().manual_seed(0)

    def unit(n: int, k: int, dtype: torch.dtype) -> Unit:
        order = torch.rand(n, -(-k // GROUP), GROUP, generator=generator).argsort(dim=2).flatten(1)[:, :k]
        dense = torch.randn(n, k, generator=generator) * k**-0.5
        dense[order > 1] = 0
        if n > 2:
            dense[n // 2, ::3], dense[0] = 0, 0
        tensors = {"weight": dense.to(dtype)}
        if k != 64:
            tensors["bias"] = torch.randn(n, generator=generator).to(dtype)
        return Unit({"m": (n, k)}, tensors)

    shapes = [(1, 1), (33, 9), (3, 64), (96, 96), (130, 257)]
    return [unit(n, k, dtype) for n, k in shapes for dtype in masked.DTYPES]


def _bits(packed: Packed) -> torch.Tensor:
    """A bit for each stored value, as bitmap has them, uint8 [N, ceil(K / 8)]; checked."""
    path, (n, k) = next(iter(packed.modules.items()))
    values, positions, groups = packed.tensors["values"], packed.tensors["positions"], -(-k // GROUP)
    wanted = (n, 2 * groups), (n, -(-groups // 2))
    found = tuple(values.shape), tuple(positions.shape)
    if found != wanted or positions.dtype != torch.uint8 or values.dtype not in masked.DTYPES:
        raise WrongShape(
            f"{path} [{n}, {k}] wants values {list(wanted[0])} of bf16, fp16 or fp32 and positions {list(wanted[1])} "
            f"of uint8, got {found[0]} of {values.dtype} and {found[1]} of {positions.dtype}; convert the model again"
        )
    bits = torch.from_numpy(_TO_MASK[positions.cpu().numpy()])
    full = np.full(bits.shape[1], GROUP)  # bits of each byte
    full[-1] -= groups % 2 * 2
    wrong = np.argwhere(masked.counts(bits) != full)
    if len(wrong):
        row, byte = wrong[0].tolist()
        raise FolderDamaged(
            f"{path}: row {row}, columns {8 * byte} to {8 * byte + 7}: byte {positions[row, byte]:#x} names no two "
            f"positions of every four; convert the model again"
        )
    behind = masked.dense(bits[:, -1:], values[:, -full[-1] :].flatten(), 8)[:, (k - 1) % 8 + 1 :]
    if masked.kept(behind).any():
        raise FolderDamaged(f"{path}: there is a weight behind column {k}; convert the model again")
    return bits.to(positions.device)


def _two_four_cpu(
    x: torch.Tensor, laid: Sequence[torch.Tensor], bias: torch.Tensor | None, sizes: Sequence[int], wide: bool
) -> torch.Tensor:
    return masked.on_cpu("two_four_linear", x, laid, bias, sizes, wide)


def _two_four_gpu(
    x: torch.Tensor, laid: Sequence[torch.Tensor], bias: torch.Tensor | None, sizes: Sequence[int], wide: bool
) -> torch.Tensor:
    kernels = ops.triton_kernels("two_four")
    if kernels is None:
        fallback("two_four_linear", "Triton is not installed")
        return masked.torch_path(x, laid, bias, sizes, wide)
    masked.check_input("two_four_linear", x, sizes[1], laid[0].dtype)
    return kernels.two_four_linear(x, *laid, bias, wide)


_TWO_FOUR_LINEAR = ops.register(
    "two_four_linear(Tensor x, Tensor[] laid, Tensor? bias, int[] sizes, bool wide) -> Tensor",
    cpu=_two_four_cpu,
    gpu=_two_four_gpu,
    fake=masked.fake,
)


def _around_gpu(
    x: torch.Tensor, laid: Sequence[torch.Tensor], bias: torch.Tensor | None, sizes: Sequence[int], *around: Any
) -> torch.Tensor:
    masked.check_input("two_four_linear_around", x, sizes[1], laid[0].dtype)
    around_linear.check("two_four_linear_around", x, sizes[0], Around(*around))
    return ops.triton_kernels("two_four").two_four_linear(x, *laid, bias, around=Around(*around))


_TWO_FOUR_AROUND = ops.register(
    "two_four_linear_around(Tensor x, Tensor[] laid, Tensor? bias, int[] sizes, Tensor? norm, float eps, str? act, "
    "Tensor? residual) -> Tensor",
    cpu=masked.around_on_cpu,
    gpu=_around_gpu,
    fake=masked.around_fake,
)
