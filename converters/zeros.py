"""What zeros a matrix has, in words."""

from __future__ import annotations

import torch

PATTERNS = ((2, 4), (4, 8))


def describe(weight: torch.Tensor) -> str:
    """The pattern of a weight [N, K]: "2:4", "4:8", else how much of it is zero; "" for what any dense model has."""
    kept = weight != 0
    share = 1 - kept.sum().item() / max(1, kept.numel())
    for n, m in PATTERNS:
        if share >= 1 - n / m and violation(kept, n, m) is None:
            return f"{n}:{m}" if round(share, 3) == 1 - n / m else f"{n}:{m}, {_percent(share)}"
    return _percent(share)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} % zeros" if share >= 0.001 else ""


def violation(kept: torch.Tensor, n: int = 2, m: int = 4, least: int = 0) -> str | None:
    """The first aligned group of m inputs that keeps more than n, or fewer than `least`, in words; None if none does.

    kept: bool [N, K].
    """
    if kept.shape[-1] % m:
        return f"{kept.shape[-1]} columns, which are no groups of {m}"
    counts = kept.view(*kept.shape[:-1], -1, m).sum(-1)
    wrong = torch.nonzero((counts > n) | (counts < least))
    if not len(wrong):
        return None
    row, group = wrong[0].tolist()
    return f"{int(counts[row, group])} of {m} in row {row}, columns {group * m} to {group * m + m - 1}"
