"""The GPU report: one command that tests and measures everything that needs a GPU, in less than nine minutes.

Every stage is a process of its own with a budget of its own, and writes each number into the one JSON as soon as it
has it: being cut off costs the rows that were not measured yet and nothing else. On a machine where pared is not
installed, `sh bench/gpu_report.sh` runs this from the checkout; it needs torch, triton, transformers and pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..kernels.dispatch import set_threads
from .gpu import markdown, report
from .gpu.report import Part, Report

NAME = "gpu_report"
RESULTS = report.ROOT / "bench" / "results"


@dataclass(frozen=True)
class Stage:
    """A function of bench/gpu/. seconds: its budget, the start of its process included.

    probes: it launches Triton kernels whatever the device, so that a dry run needs the interpreter.
    """

    seconds: float
    module: str
    function: str
    arguments: tuple[str, ...] = ()
    probes: bool = False


STAGES = {
    "ceilings": Stage(25, "ceilings", "run", probes=True),
    "bubble": Stage(15, "questions", "bubble", probes=True),
    "cublas": Stage(25, "questions", "cublas"),
    "ell": Stage(15, "questions", "ell", probes=True),
    "gather": Stage(15, "questions", "gather", probes=True),
    "early-exit": Stage(15, "questions", "early_exit", probes=True),
    "tests": Stage(80, "gpu_tests", "run"),
    "compile": Stage(45, "kernels", "compile_all"),
    "kernels": Stage(45, "kernels", "table"),
    "sweep": Stage(40, "kernels", "sweep"),
    "ffn": Stage(34, "ffn", "run"),
    "decode-llama-3-8b": Stage(70, "decode", "run", ("llama-3-8b",)),
    "decode-llama-2-7b": Stage(40, "decode", "run", ("llama-2-7b",)),
    "peer-kernels": Stage(18, "peers", "kernels", probes=True),
    "peers": Stage(55, "peers", "run"),
}
"""In the order of what is worth most if the rest is cut off; the budgets together stay below nine minutes."""


def run_all(names: list[str], out: Path, dry: bool, commit: str, keep: bool) -> Report:
    """Run the stages one after the other; the report lies in `out` and is whole after each of them."""
    out.mkdir(parents=True, exist_ok=True)
    whole = Report(out / f"{NAME}.json")
    whole.begin(dry, names, keep)
    for name in names:
        whole = _run_one(name, whole, commit)
        (out / f"{NAME}.md").write_text(markdown.render(whole.data), encoding="utf-8")
        print(f"{name}: {whole.data['stages'][name]['state']} in {whole.data['stages'][name]['seconds']} s", flush=True)
    return whole


def _run_one(name: str, whole: Report, commit: str) -> Report:
    """One stage in a process, which writes the file meanwhile: so it is read anew before it is closed."""
    budget = STAGES[name].seconds
    whole.open(name, budget, commit)
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        state = _wait(name, whole, budget, log.fileno())
        log.seek(0)
        tail = log.read()[-4000:]
    whole = Report(whole.path)
    whole.close(name, state, time.monotonic() - start, "" if state == "done" else tail)
    return whole


def _wait(name: str, whole: Report, budget: float, log: int) -> str:
    """done, failed, or cut: then nothing that the stage started lives on."""
    command = [sys.executable, "-P", "-m", f"{__package__}.{NAME}", "--one", name, "--out", str(whole.path.parent)]
    interpreted = {"TRITON_INTERPRET": "1"} if whole.dry and STAGES[name].probes else {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **interpreted}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        return "failed" if process.wait(budget) else "done"
    except subprocess.TimeoutExpired:
        return "cut"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_stage(name: str, out: Path) -> None:
    """What the process of a stage does; whatever it raises is the stage's error."""
    set_threads()
    import torch

    from .gpu.setting import setting

    whole = Report(out / f"{NAME}.json")
    part = Part(whole, name)
    whole.data["environment"] = report.environment()
    part.note(clocks=report.clocks())
    torch.manual_seed(0)
    stage = STAGES[name]
    with torch.no_grad():  # not inference mode, whose tensors torch.compile does not take
        _function(stage)(part, setting(whole.dry), *stage.arguments)


def _function(stage: Stage) -> Callable[..., None]:
    found: Callable[..., None] = getattr(importlib.import_module(f".gpu.{stage.module}", __package__), stage.function)
    return found


def main() -> None:
    """`make gpu-report`, or `sh bench/gpu_report.sh` where pared is not installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=lambda text: text.split(","), help=f"of {','.join(STAGES)}; default: all")
    parser.add_argument("--out", type=Path, help="folder of the JSON and the markdown; default: bench/results")
    parser.add_argument("--dry", action="store_true", help="walk through all of it on a CPU at tiny shapes")
    parser.add_argument("--commit", help="what to write down where git cannot tell")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out or RESULTS
    if options.one:
        return run_stage(options.one, out)
    unknown = sorted(set(options.stages or ()) - STAGES.keys())
    if unknown:
        parser.error(f"no stage is called {unknown[0]}; known: {', '.join(STAGES)}")
    if options.dry and out.resolve() == RESULTS.resolve():
        parser.error("a dry run measures nothing and never writes to bench/results: give --out FOLDER")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut off"))  # so that the running stage is ended as well
    commit = options.commit or report.commit()
    whole = run_all(options.stages or list(STAGES), out, options.dry, commit, keep=options.stages is not None)
    print(f"{whole.path}: {_states(whole)}")
    return None


def _states(whole: Report) -> str:
    states = [stage["state"] for stage in whole.data["stages"].values()]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


if __name__ == "__main__":
    main()
