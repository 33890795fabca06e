"""What bitmap and two_four share: a bit for every weight, set where it is kept, and the kept values in row order.

    W [N=1, K=6] = | a 0 0 b 0 c |      bits   uint8 [N, ceil(K / 8)]   0b00101001, lowest bit first
                                        values [3]                      a b c

On a CPU, and wherever no kernel of its own takes it, a format is laid out for VPEXPAND, which puts the next values
where a mask has ones:

    masks   int32 [N, ceil(K / 32)]     bit i of word j stands for column 32 j + i
    values  [kept + SPARE]              row after row; a kernel loads whole registers and so reads past the last one
    starts  int64 [N]                   where the values of a row begin
    ints    (N, K, per_word)            per_word: the bits of every word that lies within K, 0 where they differ

Paths on a CPU, by the number of rows M:

    M <= sparse_rows          native: expanded in registers or, for tiles, in the first-level cache (native/library.py)
          M above             SPREAD_BYTES of rows at a time are made dense, and F.linear multiplies with them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import FolderDamaged, WrongShape
from . import ops
from .around import reference
from .dense import WHOLE_ROWS
from .dispatch import fallback, triton_ready
from .native import library
from .unit import Around, Prepared, Traffic, Unit

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPARE = 32
"""Values behind the last: the most that a register takes, less those that are there."""

SPREAD_BYTES = 4 << 20
"""Of rows that are made dense at once for F.linear: they should stay in the second-level caches until they are read."""

WORD = 32
_COUNTS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def fits(name: str, unit: Unit) -> str | None:
    """None when the unit is one linear module of one dtype, else what keeps it out of the format `name`."""
    weight, bias = unit.tensors.get("weight"), unit.tensors.get("bias")
    if weight is None or unit.tensors.keys() - {"weight", "bias"}:
        return f"{name} stores a weight and perhaps a bias, the unit has {sorted(unit.tensors)}"
    dtypes = {tensor.dtype for tensor in unit.tensors.values()}
    if len(dtypes) > 1 or weight.dtype not in DTYPES:
        return f"{name} takes one dtype of bfloat16, float16 and float32, the unit has {sorted(map(str, dtypes))}"
    if list(unit.modules.values()) != [tuple(weight.shape)]:
        return f"the weight is {tuple(weight.shape)}, the modules are {unit.modules}"
    if bias is not None and tuple(bias.shape) != weight.shape[:1]:
        return f"the bias is {tuple(bias.shape)}, the outputs are {weight.shape[0]}"
    return None


def kept(weight: torch.Tensor) -> torch.Tensor:
    """bool [N, K]: where any bit of an element is set, so that -0.0 and NaN are kept."""
    return weight.contiguous().view(_integers(weight.dtype)) != 0


def _integers(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int16


def to_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool [N, K] -> uint8 [N, ceil(K / 8)], lowest bit first."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1, bitorder="little"))


def pick(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The elements of `weight` where `mask` is true, in row order; twice as fast as torch's own."""
    return torch.from_numpy(weight.view(_integers(weight.dtype)).numpy()[mask.numpy()]).view(weight.dtype)


def from_bits(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 [N, ceil(columns / 8)] -> bool [N, columns]."""
    unpacked = np.unpackbits(bits.cpu().numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(unpacked.view(np.bool_)).to(bits.device)


def counts(bits: torch.Tensor) -> np.ndarray:
    """uint8 [...] -> how many bits each byte has, uint8."""
    return np.asarray(_COUNTS[bits.cpu().numpy()])


def dense(bits: torch.Tensor, values: torch.Tensor, columns: int) -> torch.Tensor:
    """W [N, columns]: `values` in row order where `bits` has ones, else zero."""
    weight = values.new_zeros(bits.shape[0], columns)
    return weight.masked_scatter_(from_bits(bits, columns), values)


def check(path: str, bits: torch.Tensor, values: torch.Tensor, n: int, k: int) -> None:
    """WrongShape or FolderDamaged unless every value belongs to a bit within [n, k]; shapes alone on meta tensors."""
    if (bits.dtype, tuple(bits.shape)) != (torch.uint8, (n, -(-k // 8))) or values.dtype not in DTYPES:
        raise WrongShape(
            f"{path} [{n}, {k}] wants bits [{n}, {-(-k // 8)}] of uint8 and values of bf16, fp16 or fp32, "
            f"got {tuple(bits.shape)} of {bits.dtype} and {values.dtype}; convert the model again"
        )
    if bits.is_meta or values.is_meta:
        return
    marked = int(counts(bits).sum(dtype=np.int64))
    if values.shape != (marked,):
        raise WrongShape(
            f"{path}: {marked} weights are marked as kept, but its values are {tuple(values.shape)}; "
            f"convert the model again"
        )
    if k % 8 and bool((bits[:, -1] >> k % 8).any()):
        raise FolderDamaged(f"{path}: a weight behind column {k} is marked as kept; convert the model again")


def lay_out(
    name: str,
    modules: dict[str, tuple[int, int]],
    bits: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    device: torch.device | str,
) -> Prepared:
    """The CPU's layout of checked bits and values, then `bias` [N] or None; on meta tensors per_word is not known."""
    (path, (n, k)), words = next(iter(modules.items())), -(-bits.shape[1] // 4)
    spare = values.new_zeros(SPARE)
    masks = F.pad(bits, (0, 4 * words - bits.shape[1])).view(torch.int32)
    starts, per_word = torch.empty(n, dtype=torch.int64, device=bits.device), 0
    if not bits.is_meta and torch.device(device).type != "meta":
        each = counts(masks.view(torch.uint8)).reshape(n, words, 4).sum(axis=2, dtype=np.uint8)
        ends = each.sum(axis=1, dtype=np.int64).cumsum()
        starts = torch.from_numpy(np.concatenate(([0], ends[:-1])))
        per_word = _common(each[:, : k // WORD])
    tensors = (masks, torch.cat([values, spare]), starts, bias)
    there = tuple(None if tensor is None else tensor.to(device) for tensor in tensors)
    return Prepared(name, {path: (n,)}, there, (n, k, per_word))


def _common(each: np.ndarray) -> int:
    """The number that all of `each` are, else 0."""
    return int(each[0, 0]) if each.size and (each == each[0, 0]).all() else 0


def stack(parts: list[tuple[Prepared, str]]) -> Prepared | None:
    """The CPU's layout of all outputs of `parts` in order, copied; None when inputs, dtypes or biases differ."""
    laid: list[Any] = [prepared.tensors for prepared, _ in parts]
    masks, values, starts, biases = zip(*laid, strict=True)
    _, inputs, per_word = zip(*(prepared.ints for prepared, _ in parts), strict=True)
    if len({(k, v.dtype, b is None) for k, v, b in zip(inputs, values, biases, strict=True)}) != 1:
        return None
    ends = np.cumsum([0, *(len(v) - SPARE for v in values)]).tolist()
    tensors = (
        torch.cat(masks),
        torch.cat([*(v[:-SPARE] for v in values), values[0][-SPARE:]]),
        torch.cat([start + end for start, end in zip(starts, ends, strict=False)]),
        None if biases[0] is None else torch.cat(biases),
    )
    widths = tuple(n for prepared, path in parts for n in prepared.outputs[path])
    ints = (sum(widths), inputs[0], per_word[0] if len(set(per_word)) == 1 else 0)
    return Prepared(parts[0][0].format, {parts[0][1]: widths}, tensors, ints)


def traffic(n: int, k: int, values: torch.Tensor, bias: torch.Tensor | None, m: int) -> Traffic:
    """Masks, starts, values and bias once, and two flops for each value and row."""
    laid = n * (4 * -(-k // WORD) + 8) + (values.numel() + SPARE) * values.element_size()
    return Traffic(laid + (0 if bias is None else bias.nbytes), 2 * m * values.numel())


def torch_path(
    x: torch.Tensor, laid: Sequence[torch.Tensor], bias: torch.Tensor | None, sizes: Sequence[int], wide: bool
) -> torch.Tensor:
    """x [M, K] times the CPU's layout in plain torch, by way of the whole weight: for where no kernel runs."""
    masks, values, _ = laid
    whole = dense(masks.view(torch.uint8), values[:-SPARE], WORD * masks.shape[1])
    y = F.linear(x, whole[:, : sizes[1]], bias)
    return y.float() if wide else y


def on_cpu(
    op: str,
    x: torch.Tensor,
    laid: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    sizes: Sequence[int],
    wide: bool,
) -> torch.Tensor:
    """x [M, K] times the CPU's layout by the path of choice."""
    masks, values, starts = laid
    n, k, per_word = sizes
    check_input(op, x, k, values.dtype)
    native = library.load()
    if native is None:
        fallback(op, library.why_not())
        return torch_path(x, laid, bias, sizes, wide)
    y = x.new_empty(x.shape[0], n, dtype=torch.float32 if wide else x.dtype)
    rows = native.sparse_rows(x.dtype)
    if x.shape[0] <= rows or (wide and rows):
        native.sparse_linear(x, masks, values, starts, bias, per_word, y)
        return y
    part = x.new_empty(min(n, _rows_at_once(values.element_size() * k)), k)
    for first in range(0, n, len(part)):
        weight = part[: n - first]
        native.spread(masks, values, starts, first, weight)
        y[:, first : first + len(part)] = F.linear(x, weight, None if bias is None else bias[first : first + len(part)])
    return y


def _rows_at_once(row_bytes: int) -> int:
    return max(1, SPREAD_BYTES // max(1, row_bytes))


def for_triton(device: torch.device | str) -> bool:
    """Whether a unit for `device` is laid out as the Triton kernels take it; CPU's layout on meta tensors."""
    return torch.device(device).type != "meta" and triton_ready(device)


def where_it_is_quick(tensors: list[torch.Tensor], device: torch.device | str) -> list[torch.Tensor]:
    """`tensors` on the GPU that they are laid out for, where there is one."""
    return [tensor.to(device) for tensor in tensors] if torch.cuda.is_available() else tensors


def takes_around(x: torch.Tensor, around: Around) -> bool:
    """Whether the Triton kernels take x with what stands around: at M > 1 fp16 lacks the range for a norm's weight."""
    if not ops.takes_triton(x) or x.shape[0] > WHOLE_ROWS[x.dtype]:
        return False
    return around.norm is None or x.dtype != torch.float16 or x.shape[0] == 1


def around_on_cpu(
    x: torch.Tensor, laid: Sequence[torch.Tensor], bias: torch.Tensor | None, sizes: Sequence[int], *around: Any
) -> torch.Tensor:
    """x [M, K] times the CPU's layout, with what stands around it, step by step."""
    return reference(x, lambda normed: torch_path(normed, laid, bias, sizes, False), Around(*around))


def around_fake(
    x: torch.Tensor, laid: Sequence[torch.Tensor], bias: torch.Tensor | None, sizes: Sequence[int], *around: Any
) -> torch.Tensor:
    """y [M, N], or [M, N / 2] of an activation, for any layout."""
    return x.new_empty(x.shape[0], sizes[0] // (2 if Around(*around).act else 1))


def check_input(op: str, x: torch.Tensor, columns: int, dtype: torch.dtype) -> None:
    """ValueError unless x is contiguous [M, columns] of `dtype`."""
    if x.dim() != 2 or x.shape[1] != columns or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(
            f"{op} wants contiguous x [M, {columns}] of {dtype}, "
            f"got {tuple(x.shape)} of {x.dtype} with strides {x.stride()}"
        )


def fake(
    x: torch.Tensor, laid: Sequence[torch.Tensor], bias: torch.Tensor | None, sizes: Sequence[int], wide: bool
) -> torch.Tensor:
    """y [M, N] for any layout: the first of `sizes` is N."""
    return x.new_empty(x.shape[0], sizes[0], dtype=torch.float32 if wide else x.dtype)
