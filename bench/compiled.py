"""What every launch of our kernels would take on a GPU that is not here: one line a compiled kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadParameter, KernelError
from ..kernels.dispatch import interpreting
from . import samples
from .paths import GpuLaunchers, prepared_for_gpu

if TYPE_CHECKING:
    from .compile_only import Report

COLUMNS = (
    "op",
    "kernel",
    "N x K",
    "M",
    "registers",
    "spills",
    "shared",
    "16-byte loads",
    "narrower",
    "bytes/instr",
    "",
)
NO_KERNEL = "none: torch computes"


@dataclass
class Compiled:
    """One kernel of one target, and every case that launches it.

    report: None where torch computes, and where the kernel does not compile: `error` says why.
    """

    what: str
    target: str
    report: Report | None
    error: str = ""
    shapes: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """Why it cannot run there as it should, in words."""
        return ([self.error] if self.error else []) + (self.report.breaks(self.target) if self.report else [])

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        made = {"what": self.what, "target": self.target, "shapes": self.shapes, "rows": self.rows}
        r = self.report
        if r is None:
            return {**made, "kernel": None, "broken": self.broken}
        sizes = {"registers": r.registers, "spills": r.spills, "stack_bytes": r.scratch, "shared_bytes": r.shared}
        loads = {"wide_loads": r.wide_loads, "narrow_loads": r.narrow_loads}
        return {
            **made,
            "kernel": r.name,
            **sizes,
            **loads,
            "bytes_an_instruction": r.bytes_an_instruction,
            "broken": self.broken,
        }


@dataclass(frozen=True)
class Case:
    """A call on meta tensors whose launches are wanted. optional: where there are none, other cases have them."""

    what: str
    shape: str
    m: int
    call: Callable[[], Any]
    optional: bool = False


def need_a_compiler() -> None:
    """Raise KernelError where kernels cannot be compiled in this process."""
    if importlib.util.find_spec("triton") is None:
        raise KernelError("Triton is not installed, so nothing can be compiled; pip install triton==3.6.0")
    if interpreting():
        raise KernelError("TRITON_INTERPRET=1 interprets kernels and compiles none; unset it")


def compile_all(
    target: str, name: str | None, shapes: Sequence[tuple[int, int]], rows: Sequence[int], dtype: torch.dtype
) -> list[Compiled]:
    """Compile what the format called `name` launches, or every format and step. Raises BadParameter, KernelError."""
    need_a_compiler()
    from triton.compiler.errors import CompilationError

    from . import compile_only

    if target not in compile_only.TARGETS:
        raise BadParameter(f"no target is called {target!r}; known: {', '.join(compile_only.TARGETS)}")
    found: dict[tuple[str, Any], Compiled] = {}
    cases = [case for module in samples.chosen(name) for case in _of(module, shapes, rows, dtype)]
    for case in cases if name else [*cases, *_steps(rows, dtype)]:
        try:
            kernels = launched(target, case.call)
        except CompilationError as error:
            reason = str(error).strip().splitlines()[-1]
            _line(found, case, reason, Compiled(case.what, target, None, f"does not compile: {reason}"))
            continue
        if not kernels and not case.optional:
            _line(found, case, None, Compiled(case.what, target, None))
        for kernel in kernels:
            known = found.get((case.what, id(kernel)))
            _line(found, case, id(kernel), known or Compiled(case.what, target, compile_only.report(kernel)))
    order = [what for what, _ in found]
    return sorted(found.values(), key=lambda line: order.index(line.what))


def _line(found: dict[tuple[str, Any], Compiled], case: Case, key: Any, fresh: Compiled) -> None:
    """Note that `case` belongs to the line under `key`, which begins as `fresh`."""
    line = found.setdefault((case.what, key), fresh)
    line.shapes += [case.shape] if case.shape not in line.shapes else []
    line.rows += [case.m] if case.m not in line.rows else []


def launched(target: str, call: Callable[[], Any]) -> list[Any]:
    """The kernels that `call`, on meta tensors, would launch on `target`, compiled."""
    from .compile_only import compile_only

    with compile_only(target) as kernels, GpuLaunchers():
        call()
    return kernels


def _of(
    module: ModuleType, shapes: Sequence[tuple[int, int]], rows: Sequence[int], dtype: torch.dtype
) -> Iterator[Case]:
    for n, k in shapes:
        for form, unit in samples.units(module, n, k, dtype).items():
            prepared = prepared_for_gpu(module, module.encode(unit))
            for m in rows:
                x, what = torch.empty(m, k, dtype=dtype, device="meta"), samples.title(module, form)
                yield Case(what, f"{n}x{k}", m, samples.applying(module, prepared, x))
                for kind, call in samples.arounds(module, prepared, x).items():
                    yield Case(f"{what}, {kind}", f"{n}x{k}", m, call, optional=True)


def _steps(rows: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    for m in rows:
        for op, call in samples.steps(m, dtype, "meta").items():
            yield Case(op, "", m, call)


def lines(compiled: Sequence[Compiled]) -> Iterator[tuple[str, ...]]:
    """Lines of a table under COLUMNS."""
    for one in compiled:
        r = one.report
        kernel = r.name if r else "" if one.error else NO_KERNEL
        numbers = (r.registers, r.spills, r.shared, r.wide_loads, r.narrow_loads) if r else ("",) * 5
        rate = f"{r.bytes_an_instruction:.2f}" if r and r.loop else ""
        shapes, rows = ", ".join(one.shapes), ", ".join(map(str, one.rows))
        yield (one.what, kernel, shapes, rows, *map(str, numbers), rate, "; ".join(one.broken))
