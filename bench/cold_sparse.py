"""Sparse weights that no cache holds: random masks and values, each from a buffer of its own, laid out for a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .cpu_linear import Weights

if TYPE_CHECKING:
    import torch

    from ..kernels.unit import Packed, Prepared

COLUMNS = 256  # every so many hold exactly half of their weights, so that a row's start is known without reading
PATTERNS = 1 << 13  # of COLUMNS each, repeated
SPARSE = ("bitmap", "two_four")


class SparseWeights(Weights):
    """Dense weights, and such with half of their elements zero: in no pattern, or two of every four."""

    def __init__(self, buffer: torch.Tensor, generator: torch.Generator) -> None:
        super().__init__(buffer)
        count = buffer.numel() // 16  # words, of 16 values each
        self._masks = {form: Weights(_words(form, count, generator)) for form in SPARSE}

    def take_sparse(self, form: str, n: int, k: int) -> Prepared:
        """W [n, k] under the path "m", views of the buffers; k is a multiple of COLUMNS."""
        import torch

        from ..kernels import masked
        from ..kernels.unit import Prepared

        values = self.take(1, n * k // 2 + masked.SPARE)[0]
        starts = torch.arange(n) * (k // 2)
        per_word = masked.WORD // 2 if form == "two_four" else 0
        masks = self._masks[form].take(n, k // masked.WORD)
        return Prepared(form, {"m": (n,)}, (masks, values, starts, None), (n, k, per_word))


def rows_as_packed(prepared: Prepared, first: int, stop: int, path: str) -> Packed:
    """Rows first .. stop as a bitmap, whatever their form: for references and accounts."""
    import torch

    from ..kernels import bitmap
    from ..kernels.unit import Packed

    masks, values, _, _ = prepared.tensors
    assert masks is not None and values is not None
    k = prepared.ints[1]
    tensors = {"bits": masks[first:stop].view(torch.uint8), "values": values[first * k // 2 : stop * k // 2]}
    return Packed(bitmap.NAME, bitmap.VERSION, {path: (stop - first, k)}, tensors)


def _words(form: str, count: int, generator: torch.Generator) -> torch.Tensor:
    """int32 [count or a little more]: masks of half of every COLUMNS, or of two of every four."""
    import torch

    among = 4 if form == "two_four" else COLUMNS
    chance = torch.rand(PATTERNS, COLUMNS // among, among, generator=generator)
    kept = (chance.argsort(dim=2) < among // 2).view(PATTERNS, COLUMNS)
    words = torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little")).view(torch.int32).flatten()
    return words.repeat(-(-count // words.numel()))
