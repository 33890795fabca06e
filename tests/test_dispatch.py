"""No slower path in silence, and threads that fit the machine's quota."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from pared.errors import FallbackRefused
from pared.kernels import dispatch
from pared.kernels.native import library


@pytest.fixture(autouse=True)
def fresh_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FALLBACKS", type(dispatch.FALLBACKS)())


def test_a_fallback_is_counted_each_time_and_warned_of_once() -> None:
    with pytest.warns(dispatch.SlowerPath, match="linear runs on plain torch: no compiler"):
        dispatch.fallback("linear", "no compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.fallback("linear", "no compiler")
    with pytest.warns(dispatch.SlowerPath, match="attention"):
        dispatch.fallback("attention", "no compiler")
    assert dispatch.FALLBACKS == {("linear", "no compiler"): 2, ("attention", "no compiler"): 1}


def test_strict_refuses_and_ends_with_its_block() -> None:
    with dispatch.strict():
        with pytest.raises(FallbackRefused, match="linear: no compiler"):
            dispatch.fallback("linear", "no compiler")
        with dispatch.strict(False), pytest.warns(dispatch.SlowerPath):
            dispatch.fallback("linear", "no compiler")
    dispatch.fallback("linear", "no compiler")
    assert dispatch.FALLBACKS["linear", "no compiler"] == 2


def test_describe_names_the_path_of_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    native = [path for _, path, _ in dispatch.describe("cpu", torch.bfloat16)]
    assert native == ["native"] * 3
    assert {path for _, path, _ in dispatch.describe("cpu", torch.float64)} == {"torch"}
    monkeypatch.setattr(library, "_outcome", lambda: (None, "no compiler"))
    assert dispatch.describe("cpu", torch.bfloat16) == [
        (op, "torch", "no compiler") for op in ("linear", "attention", "fused")
    ]


def test_importing_it_brings_neither_torch_nor_triton() -> None:
    code = "import sys, pared.kernels.dispatch; print({'torch', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "files, wanted",
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ],
)
def test_cpus_of_a_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], wanted: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert dispatch.cpus(tmp_path) == wanted


def test_threads_that_the_user_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def after(**environ: str) -> dict[str, str]:
        monkeypatch.setattr(dispatch.os, "environ", environ)
        dispatch.set_threads()
        return environ

    assert after(OMP_NUM_THREADS="7") == {"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": dispatch.SPINS}
    assert after(GOMP_SPINCOUNT="5") == {"OMP_NUM_THREADS": str(dispatch.cpus()), "GOMP_SPINCOUNT": "5"}
    assert "GOMP_SPINCOUNT" not in after(OMP_WAIT_POLICY="active")


def test_the_library_sets_threads_before_torch_is_loaded() -> None:
    """Not the command line alone: libgomp's own spinning starves threads that share a CPU."""
    code = "import os, pared; pared.SamplingParams; print(os.environ['GOMP_SPINCOUNT'])"
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    found = subprocess.run([sys.executable, "-P", "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == dispatch.SPINS
