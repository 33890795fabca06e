"""Search the launch sizes of the Triton kernels, and write those that won into kernels/tuning.py.

    python -m pared.bench.tune                          on a GPU: compile, check, time, write its entries
    python -m pared.bench.tune --dry --target sm_90     without one: compile, and print what would be timed

A tile that spills, takes more shared memory than a program has, or gives a wrong result is dropped and named. The
others are captured in graphs over cold weights and timed in turns; the lowest geometric mean over the cases wins.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import KernelError
from . import record, samples
from .compiled import launched, need_a_compiler
from .one_format import Side
from .truth import rms_error
from .tuning_source import with_entry
from .workloads import Attention, DecodeStep, FormatOnRows, Workload

if TYPE_CHECKING:
    from ..kernels.tuning import Tile

ROTATED_BYTES = 1 << 30
TABLE = Path(__file__).resolve().parents[1] / "kernels" / "tuning.py"
COLUMNS = ("table", "tile", "registers", "shared", "bytes/instr", "verdict")
SERVED = {
    "GEMV": (("dense", ""),),
    "GEMM": (("dense", ""), ("shared_basis", "")),  # whose second launch takes its tiles from here as well
    "WHOLE_GEMM": tuple(("dense", kind) for kind in samples.AROUNDS),
    "BASIS_GEMV": (("shared_basis", ""),),
    "BASIS_GEMM": (("shared_basis", ""),),
    "TWO_FOUR_GEMV": (("two_four", ""),),
    "ELL_GEMV": (("bitmap", ""),),
    "SPARSE_GEMM": (("bitmap", ""), ("two_four", "")),
    "SPREAD": (("bitmap", ""), ("two_four", "")),
    "ROUTER": (("routed_ffn", ""),),
    "ROUTED_WAKE": (("routed_ffn", ""),),
    "ROUTED_DOWN": (("routed_ffn", ""),),
}
"""Tables of kernels/tuning.py, and (format, what stands around it) of the launches that look into them."""
ATTENDING: dict[str, tuple[Workload, ...]] = {
    "ATTENTION": (Attention(8, 1, 4096), Attention(1, 2048, 2048)),
    "DECODE": (DecodeStep(8, 4096),),
}
"""Tables without a matrix: for each slot the workload."""
TABLES = (*SERVED, *ATTENDING)
ONE_TILE = ("GEMV", "DECODE", "TWO_FOUR_GEMV", "ELL_GEMV", "SPREAD", "ROUTER")
"""Tables that hold a tile for a target; the others hold a tuple of them, one a slot."""


class Slot(NamedTuple):
    """One tile of a table of kernels/tuning.py: the tiles to try, and what they are tried on."""

    table: str
    tiles: tuple[Tile, ...]
    workloads: tuple[Workload, ...]


@dataclass
class Trial:
    """One tile in one slot; dropped says why it is out, seconds are medians by workload."""

    slot: Slot
    tile: Tile
    registers: int = 0
    shared: int = 0
    rate: float = math.inf
    dropped: str = ""
    seconds: list[float] = field(default_factory=list)


def space(table: str) -> list[tuple[Tile, ...]]:
    """The tiles to try for every slot of a table, in the order in which the table holds them."""
    from ..kernels.tuning import Tile

    def tiles(m: int, n: Sequence[int], k: Sequence[int], warps: Sequence[int], stages: Sequence[int]) -> Any:
        return tuple(Tile(m, *sizes) for sizes in itertools.product(n, k, warps, stages))

    def streams(tile: Tile) -> bool:  # two to eight loads of 16 bytes in flight a thread
        return 16 <= tile.n * tile.k // (32 * tile.warps) <= 64

    gemv = (256, 512, 1024, 2048)
    return {
        "GEMV": [tuple(filter(streams, tiles(1, (1, 2, 4, 8, 16), gemv, (2, 4, 8), (1,))))],
        "GEMM": [tiles(m, (32, 64, 128), (64, 128), (4, 8), (2, 3, 4, 5)) for m in (16, 32, 64, 128)],
        "WHOLE_GEMM": [
            tiles(m, n, (64, 128, 256), (4, 8), (2, 3, 4)) for m, n in ((16, (32,)), (16, (16,)), (64, (32, 64)))
        ],
        "BASIS_GEMV": [tuple(filter(streams, tiles(1, (n,), gemv, (4, 8), (1,)))) for n in (16, 8, 4)],
        "BASIS_GEMM": [tiles(m, (32, 64), (64, 128), (4, 8), (2, 3, 4)) for m in (16, 64)],
        "TWO_FOUR_GEMV": [tiles(1, (16, 32, 64), (1024, 2048), (4, 8), (1,))],
        "ELL_GEMV": [tiles(1, (32,), (0,), (4, 8, 16, 32), (1,))],
        "SPARSE_GEMM": [tiles(m, (32, 64, 128), (64, 128), (4, 8), (2, 3)) for m in (16, 64)],
        "SPREAD": [tiles(512, (8, 16, 32), (128, 256, 512), (4, 8), (1,))],
        "ROUTER": [tiles(64, (16, 32), (32, 64, 128), (4, 8), (2, 3, 4))],
        "ROUTED_WAKE": [
            tuple(filter(streams, tiles(1, (4, 8, 16), gemv, (4, 8), (1,)))),
            *(tiles(m, (32, 64), (64, 128), (4, 8), (2, 3, 4)) for m in (16, 64, 128)),
        ],
        "ROUTED_DOWN": [
            tuple(filter(streams, tiles(1, (64, 128, 256), (16, 32, 64), (4, 8), (1,)))),
            *(tiles(m, (64, 128), (64, 128), (4, 8), (2, 3, 4)) for m in (16, 64, 128)),
        ],
        "ATTENTION": [tiles(m, (32, 64, 128), (0,), (4, 8), (1, 2, 3)) for m in (16, 64)],
        "DECODE": [tiles(16, (16, 32, 64, 128), (0,), (2, 4, 8), (1, 2, 3))],
    }[table]


def slots(table: str, shapes: Sequence[tuple[int, int]]) -> list[Slot]:
    """What has to be decided for `table`, and on which workloads."""
    if table in ATTENDING:
        return [Slot(table, tiles, (one,)) for tiles, one in zip(space(table), ATTENDING[table], strict=True)]

    def workloads(m: int) -> tuple[Workload, ...]:
        return tuple(FormatOnRows(name, n, k, m, around) for name, around in SERVED[table] for n, k in shapes)

    return [Slot(table, tiles, workloads(tiles[0].m)) for tiles in space(table)]


@contextlib.contextmanager
def trying(table: str, target: str, tile: Tile) -> Iterator[None]:
    """Within this block `target` has no other tile in `table`."""
    from ..kernels import tuning

    entries = getattr(tuning, table)
    before = dict(entries)
    entries[target] = tile if table in ONE_TILE else (tile,)
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)


def compiled(slot: Slot, target: str) -> list[Trial]:
    """Every tile of the slot compiled for `target`; those that break a limit are dropped."""
    from tqdm import tqdm

    trials = [Trial(slot, tile) for tile in slot.tiles]
    calls = [call for workload in slot.workloads for call in workload.on_meta()]
    for trial in tqdm(trials, desc=f"{slot.table}, compiling", disable=not sys.stderr.isatty()):
        with trying(slot.table, target, trial.tile):
            _compile(trial, target, calls)
    return trials


def _compile(trial: Trial, target: str, calls: Sequence[Any]) -> None:
    from .compile_only import report

    try:
        reports = [report(kernel) for call in calls for kernel in launched(target, call)]
    except Exception as error:  # Triton's compiler and assembler have no common error
        trial.dropped = f"does not compile: {str(error).strip().splitlines()[-1]}"
        return
    trial.registers = max(one.registers for one in reports)
    trial.shared = max(one.shared for one in reports)
    trial.rate = min((one.bytes_an_instruction for one in reports if one.loop), default=math.inf)
    trial.dropped = next((f"{one.name}: {'; '.join(one.breaks(target))}" for one in reports if one.breaks(target)), "")


def timed(trials: Sequence[Trial], target: str, rounds: int) -> None:
    """Check and time on this GPU what is not dropped, a workload at a time, all tiles in turns."""
    for workload in trials[0].slot.workloads:
        sides: dict[int, Side] = {}
        ground = workload.on("cuda", ROTATED_BYTES)
        for i, trial in enumerate(trials):
            if trial.dropped:
                continue
            with trying(trial.slot.table, target, trial.tile):
                y = ground.call(ground.weights[0])[: len(ground.own)].cpu()
                error, bound = rms_error(y, ground.own, ground.truth)
                if not error <= bound:
                    trial.dropped = f"wrong on {workload}: error {error:.3g}, bound {bound:.3g}"
                    continue
                sides[i] = Side(str(trial.tile), ground.call, ground.weights, ground.size)
                sides[i].time("cuda")  # captures its graph while the tile is in the table
        for number in range(rounds):
            for i in torch.randperm(len(sides), generator=torch.Generator().manual_seed(number)).tolist():
                list(sides.values())[i].time("cuda")
        for i, side in sides.items():
            trials[i].seconds.append(record.quartiles(side.seconds[1:])[1])


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of the lowest geometric mean. Raises KernelError where every tile was dropped."""
    left = [trial for trial in trials if not trial.dropped]
    if not left:
        raise KernelError(f"{trials[0].slot.table}: no tile is left, the first says: {trials[0].dropped}")
    return min(left, key=lambda trial: math.prod(trial.seconds) ** (1 / len(trial.seconds)))


def lines(trials: Sequence[Trial]) -> Iterator[tuple[str, ...]]:
    """Lines of a table under COLUMNS."""
    for one in trials:
        tile = f"{one.tile.m} x {one.tile.n} x {one.tile.k}, {one.tile.warps} warps, {one.tile.stages} stages"
        times = ", ".join(f"{1e6 * seconds:.1f} us" for seconds in one.seconds)
        rate = "" if math.isinf(one.rate) else f"{one.rate:.2f}"
        verdict = one.dropped or times or "to time"
        yield (one.slot.table, tile, str(one.registers), str(one.shared), rate, verdict)


def main() -> None:
    """Print every trial; on a GPU also write the winners into the table and the times beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="compile only, for --target")
    parser.add_argument("--target", default="sm_90", help="for --dry: sm_80, sm_90, sm_100 or gfx942")
    parser.add_argument("--table", choices=TABLES, nargs="+", default=list(TABLES))
    parser.add_argument("--shape", metavar="NxK", nargs="+", default=[f"{n}x{k}" for n, k in samples.SHAPES])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to write, default: kernels/tuning.py")
    options = parser.parse_args()
    need_a_compiler()
    shapes = [(int(n), int(k)) for n, _, k in (shape.partition("x") for shape in options.shape)]
    target = options.target if options.dry else _this_gpu()
    _known(target)
    from ..terminal import print_table

    results: dict[str, Any] = {}
    for table in options.table:
        winners = []
        for slot in slots(table, shapes):
            trials = compiled(slot, target)
            if not options.dry:
                timed(trials, target, options.rounds)
                winners.append(best(trials))
            print_table(f"{table} on {target}: {', '.join(map(str, slot.workloads))}", COLUMNS, lines(trials))
            results.setdefault(table, []).extend(_as_json(trial) for trial in trials)
        if winners:
            value = winners[0].tile if table in ONE_TILE else tuple(winner.tile for winner in winners)
            options.out.write_text(with_entry(options.out.read_text(encoding="utf-8"), table, target, value), "utf-8")
    if not options.dry:
        record.write(f"tuning_{target}", record.circumstances() | {"target": target, "trials": results})


def _this_gpu() -> str:
    if not torch.cuda.is_available():
        raise KernelError("there is no GPU to time on; --dry --target sm_90 compiles for one")
    from ..kernels import tuning

    return tuning.target()


def _known(target: str) -> None:
    from .compile_only import TARGETS

    if target not in TARGETS:
        raise KernelError(f"no target is called {target!r}; known: {', '.join(TARGETS)}")


def _as_json(trial: Trial) -> dict[str, Any]:
    return {
        "tile": trial.tile._asdict(),
        "workloads": [str(workload) for workload in trial.slot.workloads],
        "registers": trial.registers,
        "shared_bytes": trial.shared,
        "dropped": trial.dropped,
        "seconds": trial.seconds,
    }


if __name__ == "__main__":
    main()
