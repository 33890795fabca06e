"""The tests that need a GPU, in a pytest of their own; in dry mode they are collected and skipped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
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
        command = [sys.executable, "-m", "pytest", *options, f"--rootdir={ROOT}"]
        listed = subprocess.run([*command, "--collect-only", *files], capture_output=True, text=True, check=False)
        tests = [line for line in listed.stdout.splitlines() if "::" in line]
        if listed.returncode or not tests:
            raise KernelError(f"pytest collects no GPU test:\n{listed.stdout[-2000:]}{listed.stderr[-1000:]}")
        count = min(len(tests), max(1, (os.cpu_count() or 1) // 2))  # most of the time goes into compiling kernels
        shards = [tests[i::count] for i in range(count)]
        done = [_started([*command, *shard]) for shard in shards]
        said = [process.communicate()[0] for process in done]
    counts: Counter[str] = Counter()
    for text in said:
        counts.update({what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", text)})
    part.note(files=[Path(file).name for file in files], tests=len(tests), counts=dict(counts))
    wrong = [text[-2000:] for text, process in zip(said, done, strict=True) if process.returncode]
    if wrong or sum(counts.values()) != len(tests):
        raise KernelError(f"{dict(counts)} of {len(tests)} tests:\n" + "\n".join(wrong))


def _started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
