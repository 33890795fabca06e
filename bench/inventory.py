"""Every op of ours: which formats use it, which kernels stand behind it, and the path it takes here at which M.

Nothing is read from tables: formats and steps run on small samples, and what their ops do is watched.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..kernels import dispatch, formats
from . import samples
from .paths import NAMESPACE, GpuLaunchers, PathSpy, prepared_for_gpu

OUTPUTS, INPUTS = 16, 4096
ROWS = {"cpu": tuple(range(1, 257)), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 129, 256)}
STEP_ROWS = (1, 64)
TARGET = "sm_90"
GPU_ALONE, NO_SAMPLE = "on GPUs alone; here step by step", "no sample in bench/samples.py reaches it"
COLUMNS = ("op", "formats", "Triton kernels", "native", "here, by rows M", "how")


@dataclass
class Op:
    """One op; here: (M, path) as they were seen, ascending."""

    name: str
    formats: list[str] = field(default_factory=list)
    triton: list[str] = field(default_factory=list)
    native: bool = False
    here: list[tuple[int, str]] = field(default_factory=list)
    why: str = ""

    @property
    def ranges(self) -> list[tuple[int, str]]:
        """(first M of a run, path): where the path changes."""
        return [seen for i, seen in enumerate(self.here) if not i or seen[1] != self.here[i - 1][1]]

    def as_json(self) -> dict[str, Any]:
        ranges = [{"from_m": m, "path": path} for m, path in self.ranges]
        known = {"op": self.name, "formats": self.formats, "triton": self.triton, "native": self.native}
        return {**known, "torch": True, "here": ranges, "why": self.why}


def ops(dtype: torch.dtype, device: str) -> list[Op]:
    """Every registered op, those of the formats first."""
    found = {name: Op(name) for name in _registered()}
    *_, (_, ours, why) = dispatch.describe(device, dtype)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", dispatch.SlowerPath)  # a fall-back is what this tells of
        for call, m, owner in _calls(dtype, device):
            for name, path in _paths(call).items():
                op = found.setdefault(name, Op(name))
                op.here += [(m, path)] if (m, path) not in op.here else []
                op.formats += [owner] if owner and owner not in op.formats else []
        for call, owner in _gpu_calls(dtype):
            for name, kernels in _triton(call).items():
                op = found.setdefault(name, Op(name))
                op.triton += [kernel for kernel in kernels if kernel not in op.triton]
                op.formats += [owner] if owner and owner not in op.formats else []
    for op in found.values():
        op.here.sort()
        op.native = any(path == "native" for _, path in op.here)
        taken = {path for _, path in op.here}
        op.why = (why if ours in taken else "") if taken else GPU_ALONE if op.triton else NO_SAMPLE
    return sorted(found.values(), key=lambda op: (not op.formats, op.name))


def _registered() -> list[str]:
    """Names of the ops that the modules of kernels/ define."""
    folder = Path(formats.__file__).parent
    for module in pkgutil.iter_modules([str(folder)]):
        if not module.name.startswith("triton_") and module.name != "tuning":
            importlib.import_module(f"..kernels.{module.name}", __package__)
    names = (name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith(NAMESPACE))
    return sorted({name.partition(".")[0] for name in names})


def _calls(dtype: torch.dtype, device: str) -> Iterator[tuple[Callable[[], Any], int, str | None]]:
    """(call, M, the format that makes it or None) on real tensors of `device`."""
    for module in formats.FORMATS:
        for unit in samples.units(module, OUTPUTS, INPUTS, dtype).values():
            prepared = module.prepare(module.encode(unit), device)
            for m in ROWS[device]:
                x = torch.zeros(m, INPUTS, dtype=dtype, device=device)
                yield samples.applying(module, prepared, x), m, module.NAME
            x = torch.zeros(1, INPUTS, dtype=dtype, device=device)
            for call in samples.arounds(module, prepared, x).values():
                yield call, 1, module.NAME
    for m in STEP_ROWS:
        for call in samples.steps(m, dtype, device).values():
            yield call, m, None


def _gpu_calls(dtype: torch.dtype) -> Iterator[tuple[Callable[[], Any], str | None]]:
    """(call, the format that makes it or None) on meta tensors, at few rows and at more."""
    if importlib.util.find_spec("triton") is None or dispatch.interpreting():
        return
    for m in STEP_ROWS:
        for module in formats.FORMATS:
            for unit in samples.units(module, OUTPUTS, INPUTS, dtype).values():
                prepared = prepared_for_gpu(module, module.encode(unit))
                x = torch.empty(m, INPUTS, dtype=dtype, device="meta")
                yield samples.applying(module, prepared, x), module.NAME
                for around in samples.arounds(module, prepared, x).values():
                    yield around, module.NAME
        for call in samples.steps(m, dtype, "meta").values():
            yield call, None


def _paths(call: Callable[[], Any]) -> dict[str, str]:
    with PathSpy() as spy:
        call()
    return spy.paths


def _triton(call: Callable[[], Any]) -> dict[str, list[str]]:
    """Op -> the kernels that it launches on a GPU."""
    from .compile_only import names_only

    with names_only(TARGET) as names, GpuLaunchers() as launchers:
        call()
    return dict.fromkeys(launchers.ops, names)


def lines(found: Iterable[Op]) -> Iterator[tuple[str, ...]]:
    """Lines of a table under COLUMNS."""
    for op in found:
        native = "yes" if op.native else ""
        yield (op.name, ", ".join(op.formats), ", ".join(op.triton), native, _in_words(op.ranges), op.why)


def _in_words(ranges: Sequence[tuple[int, str]]) -> str:
    """1 native, from 33 torch."""
    return ", ".join(path if i == 0 else f"from {m} {path}" for i, (m, path) in enumerate(ranges))
