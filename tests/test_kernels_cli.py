"""The kernel laboratory: it tells what runs, what breaks a limit, what is wrong, and times only what is right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from pared.bench import contract, cpu_linear, inventory, samples, truth
from pared.cli import app
from pared.errors import BadParameter, KernelError
from pared.kernels import dense, formats
from pared.tests.truth import assert_as_good

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(inventory, "ROWS", {"cpu": (1, 2, 200)})


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["kernels", *arguments])


def wrong_dense(**changed: object) -> types.ModuleType:
    """The dense format with functions of its own, under another name."""
    module = types.ModuleType("wrong")
    module.__dict__.update({**vars(dense), "NAME": "wrong", "cases": lambda: dense.cases()[3:6], **changed})
    return module


def known(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType) -> None:
    monkeypatch.setattr(formats, "FORMATS", (module,))
    monkeypatch.setattr(formats, "LINEAR", (module,))


def test_list_tells_what_each_op_runs_here() -> None:
    result = run("list", "--json")
    assert result.exit_code == 0, result.output
    ops = {op["op"]: op for op in json.loads(result.stdout)}
    assert "dense" in ops["linear"]["formats"]
    assert "shared_basis" in ops["basis_linear"]["formats"]
    assert ops["linear"]["here"] == [{"from_m": 1, "path": "native"}, {"from_m": 200, "path": "torch"}]
    on_gpus = {name for name, op in ops.items() if not op["here"]}
    assert all(ops[name]["why"] == inventory.GPU_ALONE for name in on_gpus)
    assert {"paged_attention", "rotary_cache", "gated_act"} <= {name for name, op in ops.items() if op["here"]}
    assert ops["rms_norm"]["native"] and not ops["rms_norm"]["formats"]
    if importlib.util.find_spec("triton"):
        arounds = {f"{form}linear_around" for form in ("", "basis_", "bitmap_", "two_four_")} | {"routed_ffn_around"}
        assert on_gpus == arounds | {"decode"}
        assert ops["linear_around"]["formats"] == ["dense"]
        assert ops["decode"]["triton"] == ["_attend_split", "_merge"]
        assert ops["basis_linear"]["triton"][:2] == ["_basis_gemv", "_coefficients_gemv"]
        assert ops["paged_attention"]["triton"] == ["_attend"]


def test_list_prints_a_table() -> None:
    printed = run("list", "--dtype", "float32").stdout
    assert "basis_linear" in printed and "float32" in printed


@needs_triton
def test_compile_shows_what_every_launch_takes() -> None:
    result = run("compile", "--target", "sm_90", "--format", "dense", "--shape", "512x1024", "--rows", "1,2", "--json")
    assert result.exit_code == 0, result.output
    gemv, gemm, partials, *around = json.loads(result.stdout)
    assert [(one["what"], one["kernel"], one["rows"]) for one in around] == [
        (f"dense, {kind}", kernel, [m]) for kind in samples.AROUNDS for kernel, m in (("_gemv", 1), ("_gemm", 2))
    ]
    assert [kernel["kernel"] for kernel in (gemv, gemm, partials)] == ["_gemv", "_gemm", "_sum_partials"]
    assert (gemv["rows"], gemm["rows"], gemv["shapes"]) == ([1], [2], ["512x1024"])
    assert gemv["wide_loads"] >= 4 and gemv["narrow_loads"] == 0 == gemv["spills"]
    assert 0.25 < gemv["bytes_an_instruction"] < 1 and gemv["registers"] <= 80
    assert gemm["shared_bytes"] > 0


@needs_triton
def test_compile_pads_as_a_gpu_would() -> None:
    """Rank 163 of the sample: rows of coefficients end at a multiple of 16, and load 16 bytes at once."""
    result = run(
        "compile", "--target", "sm_90", "--format", "shared_basis", "--shape", "256x1000", "--rows", "1", "--json"
    )
    _, coefficients = json.loads(result.stdout)[:2]
    assert coefficients["kernel"] == "_coefficients_gemv"
    assert coefficients["wide_loads"] >= 8


@needs_triton
def test_compile_marks_what_breaks_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from pared.bench import compile_only

    monkeypatch.setitem(compile_only.SHARED_MEMORY, "sm_90", 16)
    result = run("compile", "--target", "sm_90", "--format", "dense", "--shape", "512x512", "--rows", "1")
    assert result.exit_code == 1
    assert "3 wrong" in result.stdout and "sm_90 has 16" in result.stdout


@needs_triton
def test_compile_tells_what_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.compiler.errors import CompilationError

    def broken(*_: object, around: object = None) -> None:
        if around is not None:
            return
        raise CompilationError("x = y", types.SimpleNamespace(lineno=1, col_offset=0), "y has no type")

    monkeypatch.setattr("pared.kernels.triton_dense.linear", broken)
    result = run("compile", "--target", "sm_90", "--format", "dense", "--shape", "512x512", "--rows", "1", "--json")
    assert result.exit_code == 1
    (line,) = json.loads(result.stdout)
    assert line["kernel"] is None and line["broken"] == ["does not compile: y has no type"]


def test_a_format_without_a_gpu_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    alone = {"apply": lambda x, prepared, *_: x @ prepared.tensors[0].t(), "apply_around": lambda *_: None}
    known(monkeypatch, wrong_dense(**alone))
    result = run("compile", "--target", "sm_90", "--format", "wrong", "--shape", "64x64", "--rows", "1", "--json")
    assert [line["kernel"] for line in json.loads(result.stdout)] == [None]


def test_check_passes_here_on_both_paths() -> None:
    result = run("check", "dense", "--rows", "1,130", "--json")
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)
    assert {one["path"] for one in checks if one["what"] == "apply"} == {"native", "torch"}
    assert {one["what"] for one in checks} == {"storage", "apply", "stack of 3", "slice 0", "slice 1"}
    assert all(one["passed"] and one["error"] <= one["bound"] for one in checks)


@needs_triton
def test_check_takes_the_triton_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-P", "-m", "pared.cli", "kernels", "check", "dense", "--rows", "2", "--json"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)
    assert {one["path"] for one in checks if one["what"] == "apply"} == {"triton"}
    assert not any("bfloat16" in one["case"] for one in checks)


@pytest.mark.parametrize("module", formats.LINEAR, ids=lambda module: module.NAME)
def test_every_format_has_a_sample_of_any_shape_that_is_right(module: types.ModuleType) -> None:
    for unit in samples.units(module, 48, 160, torch.float32).values():
        packed = module.encode(unit)
        x = contract.inputs(unit, 3)
        prepared = module.prepare(packed, "cpu")
        _, *results = contract.applied(module, prepared, [(packed, samples.PATH)], x, "cpu")
        error, bound = truth.error(*results)
        assert error <= bound


@pytest.mark.parametrize(
    "changed, what",
    [
        ({"decode": lambda packed: dense.decode(dense.encode(dense.cases()[0]))}, "storage"),
        ({"apply": lambda x, *_: dense.apply(x, *_) * 1.01}, "apply"),
        ({"apply": lambda x, *_: torch.empty_like(dense.apply(x, *_))}, "apply"),
        ({"stack": lambda parts: dense.prepare(dense.encode(dense.cases()[0]), "cpu")}, "stack of 3"),
        ({"slice": lambda packed, path, dim, i, j: dense.slice(packed, path, dim, 0, j - i)}, "slice 0"),
        ({"fits": lambda unit: "never"}, "storage"),
    ],
)
def test_check_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, changed: dict, what: str) -> None:
    known(monkeypatch, wrong_dense(**changed))
    result = run("check", "--rows", "3", "--json")
    assert result.exit_code == 1
    assert what in {one["what"] for one in json.loads(result.stdout) if not one["passed"]}
    printed = run("check", "--rows", "3").stdout
    assert "WRONG" in printed or "Error" in printed or "never" in printed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("off", [0.0, 1e-7, 1e-3, 1.0, float("nan")])
def test_the_rule_is_the_one_of_the_tests(dtype: torch.dtype, off: float) -> None:
    exact = torch.linspace(-2, 2, 50)
    own = exact.to(dtype)
    result = own.clone()
    result[7] += off
    error, bound = truth.error(result, own, exact)
    try:
        assert_as_good(result, own, exact)
    except AssertionError:
        assert not error <= bound
    else:
        assert error <= bound


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "CEILING_BYTES", 1 << 22)
    monkeypatch.setattr(cpu_linear, "last_level_cache", lambda: 1 << 18)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    "format, dense_sides",
    [("dense", {"F.linear"}), ("shared_basis", {"F.linear", "dense"})],
    ids=["dense", "shared_basis"],
)
def test_bench_times_what_is_right(tmp_path: Path, format: str, dense_sides: set[str]) -> None:
    out = tmp_path / "out.json"
    result = run("bench", format, "--shape", "64x128", "--rows", "1,2", "--rounds", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "GB/s" in result.stdout
    cases = json.loads(out.read_text())["cases"]
    module = formats.by_name(format)
    units = samples.units(module, 64, 128, torch.bfloat16)
    expected = [(samples.title(module, form), m) for form in units for m in (1, 2)]
    assert [(case["format"], case["m"]) for case in cases] == expected
    for case in cases:
        packed = module.encode(units[case["format"].removeprefix(format).strip()])
        assert case["bytes"] == module.traffic(packed, case["m"]).weight_bytes
        assert case["best_dense"] in dense_sides
        assert len(case["ratio"]) == len(case["time_us"]) == 3
        assert case["gb_per_s"] == pytest.approx(case["bytes"] / case["time_us"][1] / 1e3)


@pytest.mark.usefixtures("little_memory")
def test_bench_times_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, wrong_dense(apply=lambda x, *_: dense.apply(x, *_) * 1.01))
    result = run("bench", "--shape", "64x128", "--rows", "1", "--rounds", "1")
    assert isinstance(result.exception, KernelError) and "the bound" in str(result.exception)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("check", "nope"), "known: dense"),
        (("compile", "--target", "sm_90", "--shape", "4x"), "--shape is NxK"),
        (("check", "--rows", "0"), "--rows are numbers"),
        (("bench", "--dtype", "int8"), "--dtype is one of"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, BadParameter) and message in str(result.exception)


@needs_triton
def test_an_unknown_target_is_named() -> None:
    result = run("compile", "--target", "sm_9", "--format", "dense")
    assert isinstance(result.exception, BadParameter) and "sm_100" in str(result.exception)


def test_case_names_tell_cases_of_one_format_apart() -> None:
    names = [contract.case_name(unit) for unit in dense.cases()]
    assert len(set(names)) == len(names)
