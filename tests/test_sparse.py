"""Sparse weights on a CPU: the native kernels of bitmap and two_four at every level that this CPU has, and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from pared.kernels import bitmap, masked, two_four
from pared.kernels.native import library
from pared.kernels.unit import Unit
from pared.tests.test_native import dtype, level, poisoned, random

NATIVE = library.load()
native = pytest.mark.skipif(NATIVE is None, reason=f"nothing to test here: {library.why_not()}")

SHAPES = [(1, 1), (1, 40), (5, 33), (16, 64), (33, 70), (130, 515), (300, 1100)]
PATTERNS = ("half", "4:8", "2:4", "rows")


def weight_of(pattern: str, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Random weights with zeros: half of them, N of every M, or whole rows and none of the others."""
    dense, chance = random(n, k, dtype=torch.float32), torch.rand(n, -(-k // 8) * 8, generator=torch.manual_seed(1))
    if pattern == "rows":
        dense[::3] = 0
    elif pattern == "half":
        dense[chance[:, :k] < 0.5] = 0
    else:
        of = int(pattern[-1])
        dense[chance.view(n, -1, of).argsort(dim=2).flatten(1)[:, :k] >= of // 2] = 0
    return dense.to(dtype)


def laid_out(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    bits, values = masked.to_bits(masked.kept(weight)), weight[masked.kept(weight)]
    prepared = masked.lay_out("", {"m": tuple(weight.shape)}, bits, values, None, "cpu")
    return *prepared.tensors[:3], prepared.ints[2]


@native
@level
@dtype
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_sparse_linear_gives_the_bits_of_a_dense_one(level: str, dtype: torch.dtype, pattern: str) -> None:
    at = NATIVE.at(level)
    for n, k in SHAPES:
        w = weight_of(pattern, n, k, dtype)
        masks, values, starts, per_word = laid_out(w)
        for m in (1, 2, 3, 7, 17, 66):
            x, bias = random(m, k, dtype=dtype, seed=2), random(n, dtype=dtype, seed=3)
            for shift, to in ((bias, dtype), (None, dtype), (bias.float(), torch.float32)):
                found, wanted = poisoned(m, n, dtype=to), poisoned(m, n, dtype=to)
                at.sparse_linear(x, masks, values, starts, shift, per_word, found)
                at.linear(x, w, shift, wanted)
                assert torch.equal(found, wanted), (n, k, m)
