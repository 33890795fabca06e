"""The kernels of other designs that ours are timed against are right, so that the comparison is fair."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from pared.bench.gpu.triton_peers import gather_gemv
from pared.kernels import dispatch
from pared.tests.truth import assert_as_good

needs_interpreter = pytest.mark.skipif(not dispatch.interpreting(), reason="runs in tests/test_triton_interpret.py")


@needs_interpreter
@pytest.mark.parametrize("n, k", [(1, 1), (130, 257), (256, 33), (64, 4096)])
@pytest.mark.parametrize("threshold", [0.0, 0.7, 10.0])
def test_small_inputs_are_skipped(n: int, k: int, threshold: float) -> None:
    x, columns = torch.randn(1, k), torch.randn(k, n) * k**-0.5
    kept = x.where(x.abs() > threshold, 0.0)
    columns[kept[0] == 0] = torch.nan  # never read
    truth = kept.double() @ columns.nan_to_num().double()
    assert_as_good(gather_gemv(x, columns, threshold), kept @ columns.nan_to_num(), truth)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"contiguous x \[1, 4\]"):
        gather_gemv(torch.ones(2, 4), torch.ones(4, 3), 0.0)
    with pytest.raises(ValueError, match=r"strides \(1, 4\)"):
        gather_gemv(torch.ones(1, 4), torch.ones(3, 4).t(), 0.0)
