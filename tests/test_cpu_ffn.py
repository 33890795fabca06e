"""The bench of routed FFNs, on a layer that is small: every side is checked, timed, and says what it read."""

from __future__ import annotations

import pytest
import torch

from pared.bench import cpu_cases, cpu_ffn
from pared.errors import KernelError
from pared.kernels import dispatch, routed_ffn
from pared.kernels.native import library

pytestmark = pytest.mark.skipif(
    library.load() is None or dispatch.interpreting(), reason="the bench measures native kernels"
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ffn, "HIDDEN", 128)
    monkeypatch.setattr(cpu_ffn, "CONFIGS", {"small": {"intermediate_size": 256}})
    monkeypatch.setattr(cpu_ffn, "rotated_bytes", lambda: 1 << 21)


def test_every_side_says_what_it_read(small: None) -> None:
    result = cpu_ffn.measure("small", torch.bfloat16, (1, 3), 3)
    assert [(case["m"], case["side"]) for case in result["cases"]] == [(m, s) for m in (1, 3) for s in cpu_ffn.SIDES]
    whole, router = 3 * 256 * 128 * 2, 8 * 128 * 4
    for case in result["cases"]:
        most = whole + (router if "routed" in case["side"] else 0)
        assert 0 < case["bytes"] <= most
        assert case["bytes_promise"] == pytest.approx(whole / case["bytes"])
        if case["side"] in (cpu_ffn.DENSE, cpu_ffn.TORCH, "routed, 100 % awake"):
            assert case["bytes"] == most
    assert len(list(cpu_cases.lines(result))) == len(result["cases"])


def test_a_wrong_result_is_no_time(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = routed_ffn.apply
    monkeypatch.setattr(routed_ffn, "apply", lambda *given, **named: honest(*given, **named) * 1.05)
    with pytest.raises(KernelError, match="M = 1: our error"):
        cpu_ffn.measure("small", torch.bfloat16, (1,), 1)
