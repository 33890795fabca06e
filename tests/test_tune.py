"""The search for launch sizes: what is dropped and why, who wins, and that the table it writes is the table read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from pared.bench import compile_only, one_format, tune
from pared.bench.compiled import launched
from pared.bench.paths import GpuLaunchers
from pared.bench.samples import AROUNDS
from pared.bench.truth import rms_error
from pared.bench.tuning_source import with_entry
from pared.bench.workloads import Attention, DecodeStep, FormatOnRows, Ground, Workload
from pared.errors import KernelError
from pared.kernels import ops, tuning
from pared.kernels.tuning import Tile

SMALL = Tile(1, 4, 256, warps=2, stages=1)
SPILLS = Tile(1, 16, 2048, warps=1, stages=1)
SOURCE = tune.TABLE.read_text(encoding="utf-8")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tune", *arguments])
        tune.main()
        return capsys.readouterr().out

    return run


def executed(source: str) -> dict[str, object]:
    """The names that this text of kernels/tuning.py defines."""
    names = {"__name__": "pared.kernels.tuning_written", "__package__": "pared.kernels"}
    sys.modules[names["__name__"]] = sys.modules[tuning.__name__]
    try:
        exec(compile(source, "tuning.py", "exec"), names)
    finally:
        del sys.modules[names["__name__"]]
    return names


def test_dry_compiles_every_tile_and_names_those_that_break_a_limit(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "space", lambda table: [(SMALL, SPILLS)])
    before = dict(tuning.GEMV)
    small, spills = run("--dry", "--target", "sm_90", "--table", "GEMV", "--shape", "512x4096").splitlines()[-3:-1]
    assert "1 x 4 x 256, 2 warps" in small and "to time" in small
    assert "spills" in spills and "to time" not in spills
    assert before == tuning.GEMV
    assert tune.TABLE.read_text(encoding="utf-8") == SOURCE


def test_a_tile_is_the_only_one_of_its_table_while_it_is_tried() -> None:
    with tune.trying("GEMM", "sm_90", Tile(16, 32, 64, 4, 2)):
        assert tuning.linear_tile(99, torch.bfloat16, "sm_90") == Tile(16, 32, 64, 4, 2)
    with tune.trying("GEMV", "sm_80", SMALL):
        assert tuning.linear_tile(1, torch.bfloat16, "sm_80") == SMALL
        assert tuning.linear_tile(1, torch.bfloat16, "sm_90") == tuning.GEMV["default"]
    assert "sm_80" not in tuning.GEMV


def test_no_table_of_launches_is_missing() -> None:
    """Whatever holds a tile, or tiles, by target; and whether it is one is what ONE_TILE says."""
    tables = {name: value for name, value in vars(tuning).items() if name.isupper() and isinstance(value, dict)}
    found = {name: table["default"] for name, table in tables.items()}
    held = {name: entry for name, entry in found.items() if isinstance(entry, tuple)}
    assert held.keys() == set(tune.TABLES)
    assert {name for name, entry in held.items() if isinstance(entry, Tile)} == set(tune.ONE_TILE)


@pytest.mark.parametrize("table", tune.TABLES)
def test_every_table_has_a_space_around_what_it_holds(table: str) -> None:
    entry = getattr(tuning, table)["default"]
    slots = tune.slots(table, [(512, 512)])
    assert all(slot.tiles and slot.workloads for slot in slots)
    assert len({tile for slot in slots for tile in slot.tiles}) == sum(len(slot.tiles) for slot in slots)
    known = {tile for slot in slots for tile in slot.tiles}
    assert known & set(entry if isinstance(entry[0], Tile) else [entry]), (
        "today's default is not among the tiles to try"
    )


class OnThisCpu:
    """A workload that needs no GPU: weights of one number, doubled; a tile of 13 outputs doubles wrongly."""

    def on(self, device: str, rotated: int) -> Ground:
        def call(weight: torch.Tensor) -> torch.Tensor:
            return weight * (3 if tuning.GEMV["sm_90"].n == 13 else 2)

        return Ground(call, [torch.ones(4)], 16, torch.full((2,), 2.0), torch.full((2,), 2.0))

    def __str__(self) -> str:
        return "doubling"


def test_what_is_right_is_timed_and_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow, wrong = (Tile(1, n, 256, warps=2, stages=1) for n in (2, 8, 13))

    def time(side: one_format.Side, device: str) -> None:
        side.seconds.append(1.0 if side.name == str(fast) else 2.0)

    monkeypatch.setattr(one_format.Side, "time", time)
    slot = tune.Slot("GEMV", (slow, fast, wrong), (OnThisCpu(), OnThisCpu()))
    trials = [tune.Trial(slot, tile) for tile in slot.tiles]
    tune.timed(trials, "sm_90", rounds=3)
    assert [trial.seconds for trial in trials] == [[2.0, 2.0], [1.0, 1.0], []]
    assert "wrong on doubling" in trials[2].dropped
    assert tune.best(trials).tile == fast
    with pytest.raises(KernelError, match="no tile is left"):
        tune.best(trials[2:])


def test_a_gpu_run_writes_the_table_that_is_read(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: dict[str, dict] = {}

    def timed(trials: list[tune.Trial], target: str, rounds: int) -> None:
        for i, trial in enumerate(trials):
            trial.seconds = [1.0 + i]

    monkeypatch.setattr(tune, "space", lambda table: [(SMALL, SMALL._replace(n=8))])
    monkeypatch.setattr(tune, "timed", timed)
    monkeypatch.setattr(tune, "_this_gpu", lambda: "sm_80")
    monkeypatch.setattr(tune.record, "write", lambda name, result: written.update({name: result}))
    out = tmp_path / "tuning.py"
    out.write_text(SOURCE, encoding="utf-8")
    run("--table", "GEMV", "--shape", "512x512", "--out", str(out))
    assert executed(out.read_text())["GEMV"]["sm_80"] == SMALL
    (result,) = written.values()
    assert [trial["seconds"] for trial in result["trials"]["GEMV"]] == [[1.0], [2.0]]


@pytest.mark.parametrize(
    "table, target", [("GEMV", "sm_90"), ("GEMM", "gfx942"), ("BASIS_GEMV", "sm_80"), ("ATTENTION", "sm_100")]
)
def test_only_the_entry_changes(table: str, target: str) -> None:
    value = SMALL if table in tune.ONE_TILE else (SMALL, Tile(64, 64, 0, warps=4, stages=2))
    once = with_entry(SOURCE, table, target, value)
    names, before = executed(once), executed(SOURCE)
    for name in tune.TABLES:
        expected = dict(before[name]) | ({target: value} if name == table else {})
        assert names[name] == expected
    assert with_entry(once, table, target, value) == once
    with pytest.raises(ValueError, match="no dict called NOPE"):
        with_entry(SOURCE, "NOPE", target, value)


WORKLOADS = [
    *(FormatOnRows(name, 64, 96, 3, around) for name in ("dense", "shared_basis") for around in ("", *AROUNDS)),
    *(Attention(2, 1, 64), Attention(1, 48, 48), DecodeStep(2, 64)),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_what_is_timed_is_held_to_what_torch_makes_of_it(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU functions of the ops, which take everything; a GPU's kernels are held to the same."""
    monkeypatch.setattr(ops, "takes_triton", lambda x: True)
    ground = workload.on("cpu", 1)
    y = ground.call(ground.weights[0])[: len(ground.own)]
    error, bound = rms_error(y, ground.own, ground.truth)
    assert error <= bound < 0.02 * ground.truth.square().mean().sqrt()
    assert not rms_error(1.05 * y, ground.own, ground.truth)[0] <= bound


def test_workloads_compile_what_a_gpu_would_launch() -> None:
    for workload, expected in (
        (FormatOnRows("shared_basis", 256, 512, 1), [["_basis_gemv", "_coefficients_gemv"]] * 2),
        *((FormatOnRows("dense", 256, 512, 8, around), [["_gemm"]]) for around in AROUNDS),
        (Attention(1, 1, 64), [["_attend"]]),
        (DecodeStep(1, 64), [["_attend_split", "_merge"]]),
    ):
        names = []
        for call in workload.on_meta():
            with compile_only.names_only("sm_90") as launches, GpuLaunchers():
                call()
            names.append(launches)
        assert names == expected
    assert not ops.takes_triton(torch.empty(1))


def test_a_tile_that_is_tried_is_the_one_that_compiles() -> None:
    """Also where a table is one of several, of which a launch takes the first that fills the machine."""
    tile = Tile(64, 64, 64, warps=8, stages=2)
    (call,) = FormatOnRows("dense", 28672, 4096, 64, "residual").on_meta()
    with tune.trying("WHOLE_GEMM", "sm_90", tile):
        (kernel,) = launched("sm_90", call)
    assert kernel.metadata.num_warps == 8
    assert kernel.metadata.num_stages == 2


def test_without_a_gpu_nothing_is_timed(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="--dry"):
        run("--table", "GEMV")
    with pytest.raises(KernelError, match="sm_100"):
        run("--dry", "--target", "sm_9")
