"""The one JSON file of a GPU report: every stage adds to it while it runs, so that a cut loses nothing measured before.

    {"dry", "environment", "stages": {name: {"state", "budget_s", "seconds", "commit", "date", "rows", ...}}}

state: running (or cut off together with the whole report), done, cut (its budget was over) or failed (see "error").
The file is replaced as a whole, never written in place: whoever reads it finds it complete.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "numpy")
CLOCKS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu"


class Report:
    """The file and what it holds. dry: nothing in it is a measurement, and every row says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def dry(self) -> bool:
        return bool(self.data["dry"])

    def begin(self, dry: bool, names: list[str], keep: bool) -> None:
        """Forget the stages `names`, or with keep=False all of them; others stay only beside numbers of their kind."""
        old = self.data.get("stages", {}) if keep and self.data.get("dry") == dry else {}
        self.data = {"dry": dry, "environment": self.data.get("environment", {}) if old else {}}
        self.data["stages"] = {name: stage for name, stage in old.items() if name not in names}
        self.write()

    def open(self, name: str, budget: float, commit: str) -> None:
        """A stage starts."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        start = {"state": "running", "budget_s": budget, "commit": commit, "date": date, "dry": self.dry, "rows": []}
        self.data["stages"][name] = start
        self.write()

    def close(self, name: str, state: str, seconds: float, error: str = "") -> None:
        """A stage is over: done, cut or failed."""
        end = {"state": state, "seconds": round(seconds, 1)} | ({"error": error} if error else {})
        self.data["stages"][name] |= end
        self.write()

    def write(self) -> None:
        """Replace the file by what `data` holds."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


class Part:
    """What a running stage sees of the report: its own rows and values."""

    def __init__(self, report: Report, name: str) -> None:
        self._report, self._stage = report, report.data["stages"][name]

    def row(self, **values: Any) -> None:
        """Add one row, at once on disk."""
        self._stage["rows"].append(values | ({"dry": True} if self._report.dry else {}))
        self._report.write()

    def note(self, **values: Any) -> None:
        """Set values of the stage, at once on disk."""
        self._stage.update(values)
        self._report.write()


def environment() -> dict[str, Any]:
    """What decides the numbers: versions and device, no names of folders or hosts."""
    import torch

    found: dict[str, Any] = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    found |= {name: _version(name) for name in PACKAGES}
    if not torch.cuda.is_available():
        return found | {"gpu": "none"}
    device = torch.cuda.get_device_properties(0)
    return found | {
        "gpu": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "l2_bytes": device.L2_cache_size,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def clocks() -> dict[str, str]:
    """Driver, clocks, power limit and temperature as nvidia-smi tells them now; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "-i", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    names = CLOCKS.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def commit() -> str:
    """The commit of this checkout, or "unknown" where git or its folder is missing."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
