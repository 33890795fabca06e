"""A Ray head node for tests: few processes, files in a home of its own, nothing told to anyone, gone afterwards."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pared.tests.serving import eventually, free_port

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'pared[ray]'")
imports_ray = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, of pydantic
PATIENCE = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_worker_niceness": "0",  # 15 if left alone: with anything else on the machine hardly any worker would run
}
"""For a machine that is busy with other things."""


def program(name: str) -> str:
    """A command that was installed beside this Python."""
    return str(Path(sys.executable).parent / name)


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Variables for Ray's commands; their files go to a folder with a short name, as sockets need."""
    home = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    caches = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))}
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(home), "HOME": str(home)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_", "PARED_"))}
    try:
        yield {**inherited, **caches, **quiet, **PATIENCE}
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def cluster(variables: dict[str, str]) -> Iterator[str]:
    """The address of a running head node with two CPUs. At the end nothing of it may be left."""
    nodes: list[subprocess.Popen] = []
    try:
        address = None
        while address is None:
            assert len(nodes) < 4, (Path(variables["RAY_TMPDIR"]) / "head.log").read_text()
            address = _start(variables, nodes)
        yield address
    finally:
        _end(variables)
        for node in nodes:
            node.wait(60)


@contextmanager
def serving(config: Path, variables: dict[str, str], ready: Callable[[], bool]) -> Iterator[None]:
    """`serve run` of a file that `pared deploy ray` has written, on a cluster of its own, once it is ready."""
    with cluster(variables) as head, (config.parent / "log").open("w+") as log:
        run = [program("serve"), "run", "--address", head, str(config)]
        process = subprocess.Popen(run, cwd=config.parent, env=variables, stdout=log, stderr=subprocess.STDOUT)
        try:
            eventually(lambda: process.poll() is not None or ready(), 400, pause=0.5)
            assert process.poll() is None, Path(log.name).read_text()
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def _start(variables: dict[str, str], nodes: list[subprocess.Popen]) -> str | None:
    """Start a head node: its address, or None where that took longer than the 30 seconds which Ray gives itself."""
    port, log = free_port(), Path(variables["RAY_TMPDIR"]) / "head.log"
    command = [program("ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    command += ["--include-dashboard=false", "--object-store-memory=80000000"]
    for option in ("metrics-export", "dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent"):
        command.append(f"--{option}-port={free_port()}")
    with log.open("w") as out:
        node = subprocess.Popen(command, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    nodes.append(node)
    eventually(lambda: node.poll() is not None or "runtime started" in log.read_text(), 300, pause=0.5)
    return None if node.poll() is not None else f"127.0.0.1:{port}"


def _end(variables: dict[str, str]) -> None:
    """End what was started, and wait for it."""
    for sign, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 30)):
        for process in processes(variables):
            with suppress(ProcessLookupError):
                os.kill(process, sign)
        with suppress(AssertionError):
            eventually(lambda: not processes(variables), seconds, pause=0.5)
    assert not processes(variables)


def processes(variables: dict[str, str], named: str = "") -> list[int]:
    """Ids of the processes that have a file open in these variables' folder and whose command line begins so."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            open_files = [os.readlink(file) for file in (folder / "fd").iterdir()]
            ours = any(file.startswith(variables["RAY_TMPDIR"]) for file in open_files)
            if ours and (folder / "cmdline").read_text().startswith(named):
                found.append(int(folder.name))
        except OSError:  # it has ended, or is not ours
            continue
    return found
