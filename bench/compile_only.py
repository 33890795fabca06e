"""Compile what the real launchers launch, for GPUs that are not there, and read the machine code.

Inside `compile_only("sm_90")` a launch compiles for that target and does not run, so meta tensors of
real shapes cost no memory. `report` then tells what a kernel would take on the device: registers,
scratch memory, spills, shared memory, its instructions and those of its inner loop, from the binary
itself and not from a second run of the assembler, whose flags may differ from Triton's.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes that one program may take. Triton compiles more without a word; only a launch would fail."""

LOAD = re.compile(r"LDG(STS)?\.|(buffer|global)_load")
WIDE_LOAD = re.compile(r"LDG.*\.128|(buffer|global)_load_dwordx4")


class Report(NamedTuple):
    """One compiled kernel. scratch: bytes of stack a thread; operations: mnemonic -> how often it stands there.

    loop: the same of the shortest loop with loads of 16 bytes in it; empty where there is none.
    """

    name: str
    registers: int
    scratch: int
    spills: int
    shared: int
    operations: Counter[str]
    loop: Counter[str]

    @property
    def bytes_an_instruction(self) -> float:
        """Bytes that a thread loads 16 at a time, for each instruction of the loop that it issues.

        An H100 issues some 3e13 instructions of threads a second and reads 3e12 bytes: below 0.1 it waits for itself.
        """
        wide = sum(n for name, n in self.loop.items() if WIDE_LOAD.match(name))
        return 16 * wide / max(1, self.loop.total())

    @property
    def wide_loads(self) -> int:
        """Loads from memory of 16 bytes a thread."""
        return self.count(WIDE_LOAD.pattern)

    @property
    def narrow_loads(self) -> int:
        """Loads from memory of fewer."""
        return self.count(LOAD.pattern) - self.wide_loads

    def breaks(self, target: str) -> list[str]:
        """The limits that this kernel breaks on `target`, in words."""
        broken = [f"{self.spills} spills"] if self.spills else []
        broken += [f"{self.scratch} bytes of stack a thread"] if self.scratch else []
        most = SHARED_MEMORY[target]
        return broken + ([f"{self.shared} bytes of shared memory, {target} has {most}"] if self.shared > most else [])

    def count(self, pattern: str) -> int:
        """Instructions whose mnemonic matches `pattern` from its start."""
        return sum(n for name, n in self.operations.items() if re.match(pattern, name))


class _Driver:
    """What Triton asks its device driver while it compiles."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)  # Triton keeps one cache of kernels a device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compile_only(name: str) -> Iterator[list[Any]]:
    """Within this block launches compile for target `name`; the list gathers the compiled kernels."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    with _instead_of_launching(name, compile_it):
        yield compiled


@contextlib.contextmanager
def names_only(name: str) -> Iterator[list[str]]:
    """Within this block launches on target `name` do nothing; the list gathers the names of the kernels."""
    names: list[str] = []

    def note_it(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.fn.__name__)

    with _instead_of_launching(name, note_it):
        yield names


@contextlib.contextmanager
def _instead_of_launching(name: str, run: Any) -> Iterator[None]:
    launch, active = JITFunction.run, driver._active
    driver.set_active(_Driver(name))
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run, driver._active = launch, active


def report(kernel: Any) -> Report:
    """Read a compiled kernel's binary."""
    return _report_amd(kernel) if kernel.metadata.target.backend == "hip" else _report_nvidia(kernel)


def _report_nvidia(kernel: Any) -> Report:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if usage is None:
        raise RuntimeError(f"cuobjdump told no resource usage for {kernel.metadata.name}: {listing[:500]}")
    lines = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(?:\s+\S+,)*\s*(?:0x([0-9a-f]+))?",
        listing,
        re.MULTILINE,
    )
    places = {int(at, 16): i for i, (at, _, _) in enumerate(lines)}
    jumps = [(places[int(to, 16)], i) for i, (_, name, to) in enumerate(lines) if name.startswith("BRA") and to]
    names = [name for _, name, _ in lines]
    operations = Counter(names)
    spills = sum(n for name, n in operations.items() if name.startswith(("STL", "LDL")))
    registers, scratch = map(int, usage.groups())
    return Report(
        kernel.metadata.name, registers, scratch, spills, kernel.metadata.shared, operations, _loop(names, jumps)
    )


def _loop(names: list[str], jumps: list[tuple[int, int]]) -> Counter[str]:
    """What the shortest way back around a wide load runs; jumps: (target, source), indices of `names`."""
    loops = (names[start : stop + 1] for start, stop in jumps if start < stop)
    around = [loop for loop in loops if any(WIDE_LOAD.match(name) for name in loop)]
    return Counter(min(around, key=len) if around else ())


def _report_amd(kernel: Any) -> Report:
    listing = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", listing)
        return int(found[1]) if found else 0

    places: dict[str, int] = {}
    names: list[str] = []
    jumps: list[tuple[int, int]] = []
    for label, name, target in re.findall(r"^(?:(\.LBB\w+):|\t([a-z][a-z0-9_]+)(?:[ ]+(\.LBB\w+))?)", listing, re.M):
        if label:
            places[label] = len(names)
            continue
        if target in places:
            jumps.append((places[target], len(names)))
        names.append(name)
    operations = Counter(names)
    registers, scratch = field("vgpr_count"), field("private_segment_fixed_size")
    spills = field("vgpr_spill_count")  # scalar spills go to lanes of vector registers and cost no memory
    return Report(
        kernel.metadata.name, registers, scratch, spills, kernel.metadata.shared, operations, _loop(names, jumps)
    )
