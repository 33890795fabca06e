"""How a GPU holds sparse weights, from the bytes on disk: plain torch, at load.

two_four, a row of K inputs in W = ceil(K / 32) words:

    words   int32 [N, W]        word w has four bits for each of the groups w, W + w, 2 W + w, .. 7 W + w: the position
                                of the first value, and that of the second less one, both 0 to 2
    values  [N, 16, W]          first and second value of group w, of group W + w, and so on

So a thread that takes neighbouring words takes neighbouring values, 16 bytes at once, and a run of groups is a run
of inputs. 56.25 % of dense in 16 bits, as on disk.

bitmap:

    bits    int64 [N, ceil(K / 64)]   bit i of word j stands for column 64 j + i
    ahead   int16 or int32 [N, ceil(K / 64)]   values of the row ahead of each word: 0.8 % of dense
    values  value j of row n lies at starts[n] + j + (j // RUN) * jump
    starts  int32 [N], int64 where there are 2^31 values and more

Where rows keep nearly equally many, a row is also walked without counting bits (row-lane ELL, triton_bitmap.py).
Values then lie run by run: the first RUN of every row, the next RUN of every row; short rows end in
zeros. Beside them:

    steps   int32 [units, N]    4 bits for each of 8 values: columns from the one before. 12.5 % of dense at half
    columns int32 [checks, N]   the column that value j of a row counts from, every CHECK values

A gap above 15 columns is bridged by a zero that is stored. Of 16-bit weights that keep half, one token then reads
63 to 65 % of dense bytes, several read 58 to 59 %, and all that lies in memory is 71 to 73 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

WORD, GROUP, PLANES = 32, 4, 16
BITS, RUN, UNIT, CHECK, FARTHEST = 64, 32, 8, 128, 15
MOST_PADDING = 0.02
"""Of zeros among the values of an ELL: rows that differ more, or have longer gaps, are walked by their bits."""


def two_four(values: torch.Tensor, positions: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """values [N, 16, W] and words int32 [N, W] of two_four's values [N, 2 ceil(K / 4)] and positions, as on disk."""
    n, width = len(values), -(-k // WORD)
    nibbles = torch.stack([positions & 15, positions >> 4], dim=2).flatten(1)[:, : values.shape[1] // 2]
    nibbles = F.pad(nibbles, (0, 8 * width - nibbles.shape[1]), value=0b0100).view(n, 8, width).to(torch.int64)
    codes = nibbles - 0b0100  # the second position is 1 to 3
    words = _signed((codes << 4 * torch.arange(8, device=values.device)[:, None]).sum(1))
    values = F.pad(values, (0, PLANES * width - values.shape[1])).view(n, 8, width, 2)
    return values.transpose(2, 3).reshape(n, PLANES, width), words


def two_four_dense(values: torch.Tensor, words: torch.Tensor, k: int) -> torch.Tensor:
    """The weight [N, K] again."""
    n, _, width = values.shape
    codes = (words[:, None].long() >> 4 * torch.arange(8)[:, None]) & 15
    pairs = values.view(n, 8, 2, width)
    whole = values.new_zeros(n, 8, width, GROUP)
    for which, position in enumerate((codes & 3, (codes >> 2) + 1)):
        kept = pairs[:, :, which, :, None]
        whole = torch.where((torch.arange(GROUP) == position[..., None]) & (masked_bits(kept) != 0), kept, whole)
    return whole.view(n, -1)[:, :k].contiguous()


def masked_bits(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns of values, as integers."""
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)


class Bitmap(NamedTuple):
    """bitmap's tensors on a GPU; steps and columns are None where rows differ too much. jump: see above."""

    values: torch.Tensor
    bits: torch.Tensor
    ahead: torch.Tensor
    starts: torch.Tensor
    steps: torch.Tensor | None
    columns: torch.Tensor | None
    jump: int


def bitmap(bits: torch.Tensor, values: torch.Tensor, k: int) -> Bitmap:
    """bitmap's layout of bits uint8 [N, ceil(K / 8)] and values [kept] in row order, as on disk."""
    n, on = len(bits), values.device
    mask = _mask(bits)[:, :k]
    bridged = mask | bridges(mask)
    counts = bridged.sum(1)
    longest = -(-int(counts.max()) // RUN) * RUN
    if n * longest > (1 + MOST_PADDING) * values.numel() + n * RUN:
        return _by_bits(mask, values)
    places = torch.arange(longest, device=on) < counts[:, None]
    columns = torch.zeros(n, longest, dtype=torch.int32, device=on)
    columns[places] = bridged.nonzero()[:, 1].int()
    columns = columns.cummax(1).values
    laid = values.new_zeros(n, longest)
    laid[places] = values.new_zeros(int(counts.sum())).masked_scatter_(mask[bridged], values)
    steps = columns.diff(dim=1, prepend=columns.new_zeros(n, 1)).view(n, -1, UNIT).long()
    return Bitmap(
        values=laid.view(n, -1, RUN).transpose(0, 1).reshape(-1),
        **_walked(bridged),
        starts=_places(RUN * torch.arange(n, device=on), laid.numel()),
        steps=_signed((steps << 4 * torch.arange(UNIT, device=on)).sum(2)).t().contiguous(),
        columns=F.pad(columns, (1, 0))[:, :-1:CHECK].t().contiguous(),
        jump=RUN * (n - 1),
    )


def side_by_side(parts: list[Bitmap]) -> Bitmap | None:
    """All rows of `parts` in order, copied; None when some alone are walked in step."""
    bits, ahead = torch.cat([p.bits for p in parts]), torch.cat([p.ahead for p in parts])
    n, steps, columns = len(bits), [p.steps for p in parts], [p.columns for p in parts]
    if all(s is None for s in steps):
        values, ends = torch.cat([p.values for p in parts]), [0]
        for part in parts:
            ends.append(ends[-1] + part.values.numel())
        starts = torch.cat([p.starts.long() + end for p, end in zip(parts, ends, strict=False)])
        return Bitmap(values, bits, ahead, _places(starts, values.numel()), None, None, 0)
    if any(s is None for s in steps):
        return None
    runs = [p.values.view(-1, len(p.bits), RUN) for p in parts]
    values = torch.cat(_alike(runs), dim=1).view(-1)
    starts = _places(RUN * torch.arange(n, device=values.device), values.numel())
    step, column = (torch.cat(_alike(tensors), dim=1) for tensors in (steps, columns))
    return Bitmap(values, bits, ahead, starts, step, column, RUN * (n - 1))


def _alike(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Tensors as long as the longest, zeros behind."""
    there = [tensor for tensor in tensors if tensor is not None]
    longest = max(map(len, there))
    return [torch.cat([t, t.new_zeros(longest - len(t), *t.shape[1:])]) for t in there]


def bridges(mask: torch.Tensor) -> torch.Tensor:
    """bool [N, K]: zeros that are stored so that no step is above FARTHEST; the first step is from column 0."""
    column = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
    last = torch.where(mask, column, 0).cummax(1).values
    far = column - last
    return (far > 0) & (far % FARTHEST == 0) & (column < last[:, -1:])


def _by_bits(mask: torch.Tensor, values: torch.Tensor) -> Bitmap:
    ends = mask.sum(1).cumsum(0)
    starts = _places(F.pad(ends, (1, 0))[:-1], values.numel())
    return Bitmap(values.clone(), **_walked(mask), starts=starts, steps=None, columns=None, jump=0)


def _walked(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The bits of mask, and the values ahead of each word."""
    n, words = len(mask), -(-mask.shape[1] // BITS)
    padded = F.pad(mask, (0, BITS * words - mask.shape[1])).view(n, words, 8, 8)
    each = padded.flatten(2).sum(2)
    ahead = F.pad(each.cumsum(1), (1, 0))[:, :-1]
    narrow = torch.int16 if mask.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    octets = (padded.byte() << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(3, dtype=torch.uint8)
    return {"bits": octets.view(torch.int64).view(n, words), "ahead": ahead.to(narrow)}


def _mask(bits: torch.Tensor) -> torch.Tensor:
    """uint8 [N, bytes] -> bool [N, 8 bytes], lowest bit first."""
    return ((bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1).bool().flatten(1)


def bitmap_dense(laid: Bitmap, k: int) -> torch.Tensor:
    """The weight [N, K] again, by the bits."""
    n = len(laid.bits)
    mask = _mask(laid.bits.view(torch.uint8))
    j = mask.cumsum(1) - 1
    at = laid.starts[:, None] + j + j.div(RUN, rounding_mode="floor") * laid.jump
    whole = torch.where(mask, masked_bits(laid.values)[at.clamp(min=0)], 0).view(laid.values.dtype)
    return whole.view(n, -1)[:, :k].contiguous()


def ell_dense(laid: Bitmap, k: int) -> torch.Tensor:
    """The weight [N, K] again, by the steps."""
    assert laid.steps is not None and laid.columns is not None
    n = laid.steps.shape[1]
    steps = (laid.steps.t().long()[..., None] >> (4 * torch.arange(UNIT))) & 15
    columns = steps.flatten(1).cumsum(1)
    assert torch.equal(F.pad(columns, (1, 0))[:, :-1:CHECK].t().int(), laid.columns)
    values = laid.values.view(-1, n, RUN).transpose(0, 1).reshape(n, -1)
    kept = masked_bits(values) != 0
    whole = values.new_zeros(n, k)
    row = torch.arange(n)[:, None].expand_as(columns)
    whole[row[kept], columns[kept]] = values[kept]
    return whole


def _places(starts: torch.Tensor, values: int) -> torch.Tensor:
    return starts if values >= 1 << 31 else starts.int()


def _signed(words: torch.Tensor) -> torch.Tensor:
    """int64 below 2^32 -> int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
