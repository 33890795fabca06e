"""What every measurement of ours shares: quartiles, and a JSON in bench/results/ that says where it was taken."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from ..reports import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PLACES = ("pared", "native library")  # rows of the environment that name folders of this machine


def quartiles(values: list[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Quartiles of theirs / ours, pair by pair: above 1 ours took less."""
    return quartiles([other / one for one, other in zip(ours, theirs, strict=True)])


def circumstances() -> dict[str, Any]:
    """Versions, processor, commit and load of this moment."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "environment": {what: value for what, value in environment() if what not in PLACES},
        "commit": done.stdout.strip() or "unknown",
        "load": os.getloadavg()[0],
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """Write `result` as bench/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return out
