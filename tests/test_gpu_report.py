"""The GPU report, walked through on a CPU: every stage to its end, what a cut leaves, and what targets make of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pared.bench import gpu_report
from pared.bench.gpu import layers, markdown, targets
from pared.bench.gpu.measuring import measure_sets
from pared.bench.gpu.report import Part, Report
from pared.bench.gpu.setting import setting
from pared.kernels import dense, formats

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ["sh", str(ROOT / "bench" / "gpu_report.sh")]
BARE = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PYTHON": sys.executable}


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The report as a machine without pared runs it: from the checkout alone."""
    return subprocess.run([*SCRIPT, *arguments], cwd="/", env=BARE, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole dry run."""
    out = tmp_path_factory.mktemp("report")
    done = bare("--dry", "--out", str(out), "--commit", "0123abc")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def data(dry: Path) -> dict:
    return json.loads((dry / "gpu_report.json").read_text())


def test_a_dry_run_ends_every_stage(data: dict) -> None:
    assert {name: stage["state"] for name, stage in data["stages"].items()} == dict.fromkeys(gpu_report.STAGES, "done")
    assert data["environment"]["torch"] == torch.__version__
    for name, stage in data["stages"].items():
        assert stage["rows"] or name == "tests"
        assert stage["commit"] == "0123abc"
        assert not [row for row in stage["rows"] if "failed" in row], name
    assert data["stages"]["tests"]["counts"].keys() == {"skipped" if not torch.cuda.is_available() else "passed"}


def test_nothing_of_a_dry_run_passes_for_a_measurement(dry: Path, data: dict) -> None:
    assert data["dry"] is True
    assert all(stage["dry"] and all(row["dry"] for row in stage["rows"]) for stage in data["stages"].values())
    text = (dry / "gpu_report.md").read_text()
    assert text.startswith("# GPU report (DRY RUN")
    assert all(f"## {name} (dry)" in text for name in data["stages"])
    assert str(ROOT) not in text + json.dumps(data)
    assert {row["state"] for row in targets.judge(data)} == {"not measured"}
    refused = bare("--dry")
    assert refused.returncode == 2
    assert "never writes to bench/results" in refused.stderr


def test_every_format_has_times_bytes_and_checks(data: dict) -> None:
    for stage in ("kernels", "sweep"):
        rows = data["stages"][stage]["rows"]
        assert {row["format"] for row in rows} == {"torch", *(module.NAME for module in formats.LINEAR)}
        for row in rows:
            assert row["error_rms"]["ours"] <= row["error_rms"]["torch"] + 1e-4
            assert row["bytes"] > 0
            low, middle, high = row["ratio"]
            assert 0 < low <= middle <= high
    assert {row["m"] for row in data["stages"]["sweep"]["rows"]} == set(setting(dry=True).rows)


def test_models_decode_dense_and_pivoted_in_both_modes(data: dict) -> None:
    for model in ("llama-3-8b", "llama-2-7b"):
        stage = data["stages"][f"decode-{model}"]
        rows = {(row["form"], row["mode"]): row for row in stage["rows"]}
        forms = ("dense", "pivoted 20 %", "pivoted 50 %")
        if model == "llama-3-8b":
            forms += ("2:4", "half zero")
        assert rows.keys() == {(form, mode) for form in forms for mode in ("eager", "recorded")}
        sizes = [rows[form, "eager"]["bytes_per_token"] for form in forms[:3]]
        assert sizes == sorted(sizes, reverse=True)
        assert all(stage[form]["check"]["decode_to_prefill"] <= stage[form]["check"]["allowed"] for form in forms)
    assert len(data["stages"]["peers"]["rows"]) == 2


def test_peers_multiply_the_same_sets(data: dict) -> None:
    stage = data["stages"]["peer-kernels"]
    assert stage["cusparselt"] == "absent" or torch.cuda.is_available()
    sides = {layers.TORCH, layers.TWICE, layers.GATHER, "dense"}
    sets = {row["set"] for row in stage["rows"]}
    assert len(sets) == 4
    assert {(row["set"], row["side"]) for row in stage["rows"]} == {(name, side) for name in sets for side in sides}
    for name in sets:
        size = {row["side"]: row["bytes"] for row in stage["rows"] if row["set"] == name}
        assert size[layers.GATHER] == size["dense"] / 2 and size[layers.TWICE] < size["dense"]


def test_the_budgets_together_stay_below_nine_minutes() -> None:
    assert sum(stage.seconds for stage in gpu_report.STAGES.values()) < 540
    questions = [stage for stage in gpu_report.STAGES.values() if stage.module == "questions"]
    assert len(questions) == 5
    assert all(stage.seconds <= 45 for stage in questions)


def test_being_killed_loses_only_the_stage_that_ran(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "pared.bench.gpu_report", "--dry", "--out", str(tmp_path)]
    process = subprocess.Popen([*command, "--stages", "cublas,decode-llama-2-7b"], stdout=subprocess.DEVNULL)
    file, stages = tmp_path / "gpu_report.json", {}
    until = time.monotonic() + 120
    while "decode-llama-2-7b" not in stages and time.monotonic() < until:
        time.sleep(0.02)
        stages = json.loads(file.read_text())["stages"] if file.exists() else {}
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    after = json.loads(file.read_text())["stages"]
    assert after["cublas"] == stages["cublas"]
    assert after["cublas"]["state"] == "done"
    assert len(after["cublas"]["rows"]) == 4
    assert after["decode-llama-2-7b"]["state"] == "running"
    assert "## cublas (dry)" in (tmp_path / "gpu_report.md").read_text()


def test_a_stage_over_its_budget_is_cut_and_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gpu_report.run_all(["cublas"], tmp_path, dry=True, commit="a", keep=False).data["stages"]["cublas"]
    short = {"sweep": gpu_report.Stage(0.01, "kernels", "sweep")}
    monkeypatch.setattr(gpu_report, "STAGES", short)
    stages = gpu_report.run_all(["sweep"], tmp_path, dry=True, commit="b", keep=True).data["stages"]
    assert stages["cublas"] == first
    assert stages["sweep"]["state"] == "cut"
    stages = gpu_report.run_all(["sweep"], tmp_path, dry=True, commit="b", keep=False).data["stages"]
    assert list(stages) == ["sweep"]


def test_a_stage_that_raises_leaves_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "torch.py").write_text("raise ImportError('no torch today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "first"))
    stage = gpu_report.run_all(["bubble"], tmp_path, dry=True, commit="a", keep=False).data["stages"]["bubble"]
    assert stage["state"] == "failed"
    assert "no torch today" in stage["error"]


def test_no_time_for_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = dense.apply
    monkeypatch.setattr(dense, "apply", lambda x, prepared, path: honest(x, prepared, path) * 1.01)
    sides = layers.sides_of((layers.TORCH,), (dense,))
    rows = {row["side"]: row for row in measure_sets([[layers.lone(64, 64)]], 1, sides, setting(True), 1.0)}
    assert "our error is" in rows["dense"]["failed"]
    assert "time_us" not in rows["dense"]
    assert "time_us" in rows[layers.TORCH]


def test_a_peer_that_is_wrong_has_no_time_either(monkeypatch: pytest.MonkeyPatch) -> None:
    make, peer = layers.PEERS[layers.GATHER]
    assert peer.inputs == 0.5

    def wrong(x: torch.Tensor, row: list) -> layers.Call:
        assert (x == 0).sum() == x.numel() / 2
        return lambda: layers.F.linear(x, row[0].tensors["weight"]) * 1.01

    monkeypatch.setitem(layers.PEERS, "wrong", (make, layers.Peer(wrong, inputs=0.5)))
    (row,) = measure_sets([[layers.lone(64, 64)]], 1, layers.sides_of(("wrong",)), setting(True), 1.0)
    assert "our error is" in row["failed"] and "time_us" not in row


def test_a_baseline_is_never_refused_for_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS may add partial sums in 16 bits: that is how far from the truth torch is, and what it is timed with."""
    honest = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: honest(x, w, b) * 1.01)
    sides = layers.sides_of((layers.TORCH,), (dense,))
    rows = {row["side"]: row for row in measure_sets([[layers.lone(64, 64)]], 1, sides, setting(True), 1.0)}
    assert "time_us" in rows[layers.TORCH]
    assert rows[layers.TORCH]["error_rms"]["ours"] > 1e-3
    assert "time_us" in rows["dense"]


def test_a_format_that_no_form_fits_is_named() -> None:
    nobody = SimpleNamespace(NAME="nobody", fits=lambda unit: "no")
    with pytest.raises(LookupError, match="nobody"):
        layers.format_sides(nobody)
    assert all(layers.format_sides(module) for module in formats.LINEAR)


def test_a_new_format_appears_in_the_forms_that_it_fits() -> None:
    """Sparse formats will find these: half of every four inputs, and half of every row."""

    def halves(unit: object) -> str | None:
        weight = unit.tensors.get("weight")
        return None if weight is not None and (weight.view(-1, 4) != 0).sum(1).eq(2).all() else "not 2:4"

    sides = layers.format_sides(SimpleNamespace(NAME="two_four", fits=halves))
    assert [side.name for side in sides] == ["two_four 2:4"]
    row = layers.FORMS["half zero"](layers.lone(6, 32), torch.device("cpu"), torch.float32).tensors["weight"]
    assert (row != 0).sum(1).tolist() == [16] * 6


def report_of(tmp_path: Path, state: str, *rows: dict) -> dict:
    report = Report(tmp_path / "report.json")
    report.begin(dry=False, names=["sweep"], keep=False)
    report.open("sweep", 60, "abc")
    part = Part(report, "sweep")
    for row in rows:
        part.row(**row)
    report.close("sweep", state, 1.0)
    return Report(tmp_path / "report.json").data


def test_targets_are_reached_missed_or_not_measured(tmp_path: Path) -> None:
    pivoted = {"format": "shared_basis", "side": "shared_basis pivoted 20 %", "model": "llama-2-7b", "m": 1}
    rows = [
        {**pivoted, "ratio": [1.2, 1.3, 1.4], "ratio_to_torch": [1.2, 1.3, 1.4], "time_us": [1.0, 1.0, 1.0]},
        {**pivoted, "side": "shared_basis pivoted 50 %", "ratio": [1.0, 1.1, 1.2], "ratio_to_torch": [0.8, 0.9, 1.0]},
    ]
    data = report_of(tmp_path, "done", *rows)
    judged = {(row["id"], row["what"]): row for row in targets.judge(data)}
    state = {key[0] + " " + key[1]: row["state"] for key, row in judged.items()}
    assert state["P2a pivoted layer against best dense, 20 %, Llama-2-7B"] == "reached"
    assert state["P2a pivoted layer against best dense, 50 %, Llama-2-7B"] == "not"
    assert state["P8 worst ratio to cuBLAS, M = 1 to 64"] == "not"
    assert state["P0b dense Llama-3-8B decode, share of ceiling / bytes"] == "not measured"
    failed = {**pivoted, "m": 2, "failed": "KernelError"}
    for data in (report_of(tmp_path, "cut", *rows), report_of(tmp_path, "done", *rows, failed)):
        state = {row["what"]: row["state"] for row in targets.judge(data)}
        assert state["worst ratio to cuBLAS, M = 1 to 64"] == "not measured"
        assert state["pivoted layer against best dense, 20 %, Llama-2-7B"] == "reached"
    assert "| P2a | pivoted layer against best dense, 50 %, Llama-2-7B | 1.75 | 1.1 | not |" in markdown.render(data)


def test_the_probes_compile_without_spills_and_read_16_bytes_at_once() -> None:
    from pared.bench.compile_only import SHARED_MEMORY, TARGETS, compile_only, report
    from pared.bench.gpu import triton_peers, triton_probes
    from pared.bench.gpu.questions import integer_ops

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for name in TARGETS:
        early = name in ("sm_90", "sm_100")
        with compile_only(name) as compiled:
            triton_probes.read(meta(1 << 28, dtype=torch.float32), meta(1, dtype=torch.int32), 64)
            triton_probes.step(meta(33792, dtype=torch.float32), meta(33792, dtype=torch.float32), early)
            words, starts = meta(256, 4096, dtype=torch.int32), meta(32, 4096, dtype=torch.int32)
            _, kernel = triton_probes.ell(meta(4096), meta(2048, 4096), words, starts)
            triton_probes.expand(meta(4096), meta(11008, 2048), meta(11008, 64, dtype=torch.int64))
            triton_peers.gather_gemv(meta(1, 4096), meta(4096, 28672), 0.1)
        reports = [report(each) for each in compiled]
        assert [each.name for each in reports[4:]] == ["_gather", "_sum_partials"]
        assert all(r.spills == 0 and r.scratch == 0 and r.shared <= SHARED_MEMORY[name] for r in reports)
        assert reports[0].wide_loads >= 8 and reports[4].wide_loads >= 4 and reports[4].narrow_loads <= 4
        if name.startswith("sm"):
            assert 1 < integer_ops(kernel) < 20
