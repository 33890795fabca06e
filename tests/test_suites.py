"""The pytest-benchmark suites: not part of the tests, complete over formats and rows, and no time without its facts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pared.bench.cpu_formats import ROWS
from pared.bench.gpu.layers import format_sides
from pared.kernels import formats
from pared.kernels.native import library

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

ROOT = Path(__file__).resolve().parents[1]


def suites(*options: str) -> str:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/suites", *options]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # else it times none
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_format_is_collected_at_every_number_of_rows() -> None:
    collected = suites("--collect-only")
    for module in formats.LINEAR:
        for side in format_sides(module):
            assert all(f"test_linear[{side.name}-{m}]" in collected for m in ROWS)
    assert collected.count("test_generate[") == collected.count("test_embed[") == 4


@pytest.mark.skipif(library.load() is None, reason="the suites measure native kernels")
def test_a_case_is_checked_and_says_what_its_time_means(tmp_path: Path) -> None:
    suites("-k", "test_linear and pivoted and 50 and -1]", f"--benchmark-json={tmp_path / 'out.json'}")
    (row,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    facts = row["extra_info"]
    assert facts["format"] == "shared_basis pivoted 50 %"
    assert facts["bytes"] < 0.6 * 2 * facts["n"] * facts["k"]
    assert facts["error_rms"]["ours"] <= facts["error_rms"]["torch"] + 1e-4
    assert facts["gb_per_s"] == pytest.approx(facts["bytes"] / facts["time_us"][1] / 1e3)
    assert facts["best_dense"] in ("dense", "F.linear")
    assert len(facts["ratio"]) == 3
    assert facts["percent_of_ceiling"] > 0
