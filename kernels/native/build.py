"""Compile the C++ kernels into one shared library, with nothing but Python's own library and a compiler.

setup.py runs this file during installation, and library.py at first use when no built library is found. The library
is not tied to the machine that built it: every function carries its own target and the caller chooses at run time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("g++", "c++")
DIGEST_BYTES = 32


class BuildFailed(Exception):
    """There is no compiler, or it refused the sources; the message carries what it said."""


def file_name() -> str:
    """The library's file name: it changes with the sources, the flags and the machine's architecture."""
    digest = hashlib.sha256(" ".join((*FLAGS, platform.system(), platform.machine())).encode())
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return f"libpared_cpu-{digest.hexdigest()[:16]}.so"


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX when it is set, else g++ or c++ on the PATH.

    Raises BuildFailed when there is none.
    """
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else COMPILERS:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise BuildFailed(f"no C++ compiler: looked for {chosen or ' and '.join(COMPILERS)}; install g++ or set CXX")


def compile_library(out_dir: Path | str) -> Path:
    """Build the library into `out_dir` and return its path.

    The file appears under its final name in one step, so that processes that build at once cannot see half a file.
    Raises BuildFailed when the compiler is missing or fails, OSError when `out_dir` cannot be written.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    target = out_dir / file_name()
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=out_dir)
    os.close(handle)
    try:
        _compile(Path(temporary))
        _seal(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def intact(path: Path) -> bool:
    """True when `path` is whole, as `compile_library` sealed it; loading half a library could kill the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _compile(target: Path) -> None:
    """Compile every source at the same time, then link."""
    command = compiler()
    with tempfile.TemporaryDirectory(prefix="pared-build-") as folder:
        objects = {source: Path(folder) / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))}
        _run_all([[*command, *FLAGS, "-c", str(source), "-o", str(made)] for source, made in objects.items()])
        _run_all([[*command, *FLAGS, "-shared", *map(str, objects.values()), "-o", str(target)]])


def _run_all(commands: list[list[str]]) -> None:
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    said = [process.communicate()[1] for process in running]
    for process, errors in zip(running, said, strict=True):
        if process.returncode:
            raise BuildFailed(f"{commands[0][0]} ended with {process.returncode}: {errors.strip()[-2000:]}")


def _seal(path: Path) -> None:
    """Append the content's digest; a loader ignores what follows the last section."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as file:
        file.write(digest)
