"""The house rule of errors: against truth ours may not exceed torch's own in the same dtype, but for a tiny epsilon."""

from __future__ import annotations

import torch

EPSILON = 1e-5
"""Relative to the largest value: another order of summation."""


def rms_error(result: torch.Tensor, own: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(root mean square error of `result`, its bound: that of `own`); not a number counts as infinite."""
    ours, torchs = ((y.double() - truth.double()).square().mean().sqrt().item() for y in (result, own))
    return _finite(ours), torchs + slack(truth)


def error(result: torch.Tensor, own: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(error, bound) where `result` is nearest to breaking the rule, or breaks it: fp32 element by element.

    bf16 and fp16 by the largest and the root mean square error, since one element of `own` may be lucky.
    """
    if truth.numel() == 0:
        return 0.0, 0.0
    off, allowed = ((y.double() - truth.double()).abs().nan_to_num(nan=torch.inf).flatten() for y in (result, own))
    bound = slack(truth)
    if result.dtype == torch.float32:
        worst = (off - allowed).argmax()
        return off[worst].item(), allowed[worst].item() + bound
    largest = off.max().item(), allowed.max().item() + bound
    return max(largest, rms_error(result, own, truth), key=lambda pair: pair[0] / pair[1])


def slack(truth: torch.Tensor) -> float:
    """What EPSILON allows beside values like these."""
    return EPSILON * max(1.0, truth.abs().max().item())


def _finite(value: float) -> float:
    return value if value == value else float("inf")
