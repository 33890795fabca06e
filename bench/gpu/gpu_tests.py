"""The tests that need a GPU, in a pytest of their own; in dry mode they are collected and skipped."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ...errors import KernelError
from .report import ROOT, Part
from .setting import Setting

MARK = "mark.gpu"
CONFIG = "[pytest]\nmarkers =\n    gpu: needs a GPU\n"  # not the project's: its options ask for plugins


def run(part: Part, setting: Setting) -> None:
    """Raises KernelError when a test fails, with the end of what pytest said."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if MARK in path.read_text("utf-8")]
    with tempfile.TemporaryDirectory() as home:
        config = Path(home) / "pytest.ini"
        config.write_text(CONFIG, encoding="utf-8")
        options = ["-q", "-m", "gpu", "--import-mode=importlib", "-p", "no:cacheprovider", "-c", str(config)]
        command = [sys.executable, "-m", "pytest", *options, f"--rootdir={ROOT}", *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-500:]]
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", lines[-1])}
    part.note(files=[Path(file).name for file in files], counts=counts)
    if done.returncode:
        raise KernelError("\n".join(lines[-12:]))
