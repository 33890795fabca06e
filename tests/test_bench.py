"""The CPU bench at toy sizes: what it refuses, what it rotates, what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pared.bench import cpu_linear, record
from pared.errors import KernelError


def test_a_run_measures_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_linear, "CASES", [(48, 64, 1), (33, 20, 5), (16, 16, 200)])
    monkeypatch.setattr(cpu_linear, "CEILING_BYTES", 1 << 20)
    monkeypatch.setattr(cpu_linear, "CALL_BYTES", 1 << 14)
    monkeypatch.setattr(cpu_linear, "free_memory", lambda: 1 << 22)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    result = cpu_linear.measure(torch.bfloat16, rounds=3)
    written = json.loads(record.write("toy", result).read_text())
    assert [(c["n"], c["k"], c["m"], c["path"]) for c in written["cases"]] == [
        (48, 64, 1, "native"),
        (33, 20, 5, "native"),
        (16, 16, 200, "torch"),
    ]
    assert written["rotated_bytes"] == 1 << 20
    assert written["ceiling_gb_per_s"] == max(rates[1] for rates in written["reads_gb_per_s"].values())
    for case in written["cases"]:
        assert case["bytes"] == case["n"] * case["k"] * 2
        assert case["percent_of_ceiling"] == pytest.approx(100 * case["gb_per_s"] / written["ceiling_gb_per_s"])
        assert case["ratio"] == sorted(case["ratio"])
    assert len(list(cpu_linear.rows(result))) == 3
    assert str(Path.home()) not in json.dumps(written["environment"])


def test_no_time_for_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 64), torch.randn(8, 64)
    cpu_linear.check(x, weight)
    right = cpu_linear._ours
    monkeypatch.setattr(cpu_linear, "_ours", lambda x, w: lambda: [y * 1.01 for y in right(x, w)()])
    with pytest.raises(KernelError, match=r"x \(2, 64\), W \(8, 64\): our error is"):
        cpu_linear.check(x, weight)


def test_weights_rotate_through_the_whole_buffer() -> None:
    weights = cpu_linear.Weights(torch.arange(100.0))
    starts = [weights.take(4, 10)[0, 0].item() for _ in range(5)]
    assert starts == [0, 40, 0, 40, 0]


def test_quartiles_and_paired_ratios() -> None:
    assert record.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == [2.0, 3.0, 4.0]
    assert record.quartiles([7.0]) == [7.0, 7.0, 7.0]
    assert record.ratios([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == [0.75, 1.0, 1.5]


def test_the_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "480M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert cpu_linear.last_level_cache(tmp_path) == 480 << 20
    assert cpu_linear.last_level_cache(tmp_path / "none") == 32 << 20
