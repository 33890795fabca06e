"""The house error rule, and memory that cannot pass for a result; shared by the kernel tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

EPSILON = 1e-5


def assert_as_good(result: torch.Tensor, own: torch.Tensor, truth: torch.Tensor, rounds_inside: bool = False) -> None:
    """`result` is as near to `truth` (fp64, or fp32 for half results) as `own`, which torch made in the same dtype.

    fp32 element by element; bf16 and fp16 by the largest and the root mean square error, since one element
    of `own` may be lucky. EPSILON, relative to the largest value, allows another order of summation.
    rounds_inside: both round values inside (softmax weights) to the half dtype, each to its own side, so that
    which has the larger largest error is luck: half a unit in the last place may lie between them.
    """
    assert result.shape == truth.shape
    assert result.dtype == own.dtype
    assert torch.isfinite(result).all()
    if truth.numel() == 0:
        return
    error, allowed = (result.double() - truth.double()).abs(), (own.double() - truth.double()).abs()
    largest = truth.abs().max().item()
    slack = EPSILON * max(1.0, largest)
    if result.dtype == torch.float32:
        assert (error <= allowed + slack).all(), f"off by {(error - allowed).max().item()} more than torch"
        return
    luck = torch.finfo(result.dtype).eps / 2 * largest if rounds_inside else 0.0
    assert error.max() <= allowed.max() + slack + luck
    assert error.square().mean().sqrt() <= allowed.square().mean().sqrt() + slack


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within this block fresh memory holds NaN, so that an element which no kernel wrote is found."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
