"""Sides of a layer timed in turns over cold weights; no time for one whose result is not as near as plain torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...kernels import dense
from .. import record
from .layers import TORCH, Layer, Sets, Side
from .setting import Setting
from .timing import Recorded, in_turns, microseconds


def measure_sets(sets: Sets, m: int, sides: Sequence[Side], setting: Setting, ceiling: float) -> list[dict[str, Any]]:
    """One row a side: all sets together as one time, quartiles over rounds in which every side had its turn.

    A side that is wrong or cannot run gets its error instead of a time.
    """
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Recorded] = {}
    for side in sides:
        rows[side.name] = {"side": side.name, "format": side.format.NAME if side.format else "torch", "m": m}
        try:
            layer = Layer(side, sets, m, setting)
            rows[side.name] |= {"bytes": layer.nbytes, "error_rms": layer.check()}
            runs[side.name] = _recorded(layer, setting)
        except Exception as error:  # one broken kernel must not take the others' numbers along
            rows[side.name] |= {"failed": f"{type(error).__name__}: {error}"[:500]}
    seconds = in_turns(runs, setting.rounds)
    for name, taken in seconds.items():
        rows[name] |= summary(rows[name]["bytes"], [s * len(sets) for s in taken], ceiling)
    compare(rows, seconds)
    return list(rows.values())


def _recorded(layer: Layer, setting: Setting) -> Recorded:
    copies = [layer.calls() for _ in range(-(-setting.rotated // layer.nbytes))]
    repeats = -(-setting.recorded // (layer.nbytes * len(copies)))
    calls = [call for _ in range(repeats) for copy in copies for call in copy]
    return Recorded(calls, setting.device, warm=len(layer.packs))


def summary(nbytes: int, seconds: list[float], ceiling: float) -> dict[str, Any]:
    """Time, and the rate at which so many bytes were read, beside the ceiling in GB/s."""
    rate = nbytes / record.quartiles(seconds)[1] / 1e9
    return {"time_us": microseconds(seconds), "gb_per_s": rate, "percent_of_ceiling": 100 * rate / ceiling}


def compare(rows: dict[str, dict[str, Any]], seconds: dict[str, list[float]]) -> None:
    """Add to every row how many times as fast it is as the best dense path, and as cuBLAS: quartiles, pair by pair."""
    dense_sides = [name for name in (TORCH, dense.NAME) if name in seconds]
    if not dense_sides:
        return
    best = min(dense_sides, key=lambda name: record.quartiles(seconds[name])[1])
    for name, taken in seconds.items():
        rows[name] |= {"best_dense": best, "ratio": record.ratios(taken, seconds[best])}
        if TORCH in seconds:
            rows[name]["ratio_to_torch"] = record.ratios(taken, seconds[TORCH])
