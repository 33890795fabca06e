"""Which path a kernel takes, and the rule that no slower path is taken in silence.

Importing this module imports neither torch nor triton: the command line sets the threads with
`set_threads` before torch starts its OpenMP pool.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FallbackRefused

if TYPE_CHECKING:
    import torch

FALLBACKS: Counter[tuple[str, str]] = Counter()
"""(op, reason) -> how often a slower path ran instead of the intended kernel in this process."""

_STRICT = contextvars.ContextVar("pared_strict", default=False)


class SlowerPath(RuntimeWarning):
    """A kernel could not run and plain torch ran in its place."""


def fallback(op: str, reason: str) -> None:
    """Record that `op` takes its slower path because of `reason`; warn the first time.

    Raises FallbackRefused under `strict`.
    """
    if _STRICT.get():
        raise FallbackRefused(f"{op}: {reason}; strict forbids the slower torch path (see `pared doctor`)")
    FALLBACKS[op, reason] += 1
    if FALLBACKS[op, reason] == 1:
        warnings.warn(f"{op} runs on plain torch: {reason}", SlowerPath, stacklevel=3)


@contextlib.contextmanager
def strict(on: bool = True) -> Iterator[None]:
    """Within this block a fall-back is an error. A new thread starts outside of it."""
    token = _STRICT.set(on)
    try:
        yield
    finally:
        _STRICT.reset(token)


def interpreting() -> bool:
    """True when Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_ready(device: torch.device | str) -> bool:
    """True when a Triton kernel can take tensors of `device`: a GPU, or any device when interpreting."""
    if importlib.util.find_spec("triton") is None:
        return False
    return interpreting() or str(device).startswith("cuda")


def describe(device: torch.device | str, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """(op, path, why) for every kernel family: the path that `device` and `dtype` will take."""
    ops = ("linear", "attention", "fused")
    if triton_ready(device):
        why = "TRITON_INTERPRET=1" if interpreting() else f"Triton on {device}"
        return [(op, "triton", why) for op in ops]
    if str(device).startswith("cuda"):
        return [(op, "torch", "Triton is not installed") for op in ops]
    from .native import bindings, library

    native = library.load()
    if native is None:
        return [(op, "torch", library.why_not()) for op in ops]
    if dtype not in bindings.DTYPES:
        return [(op, "torch", f"no native kernel for {dtype}") for op in ops]
    fewest, most = (native.linear_rows(dtype, inputs) for inputs in (1, 1 << 20))
    rows = str(most) if fewest == most else f"{fewest} to {most}"
    return [
        ("linear", "native", f"{native.level}, up to {rows} rows; torch above"),
        ("attention", "native", native.level),
        ("fused", "native", native.level),
    ]


def cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may keep busy: its affinity mask, cut by the cgroup's CPU quota (v2, then v1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((cgroup / "cpu/cpu.cfs_period_us").read_text())
        if quota_us > 0:
            return max(1, min(count, math.ceil(quota_us / period_us)))
    return count


SPINS = "300"
"""How often an idle OpenMP thread looks for work before it sleeps: some 15 us, as waking it takes 25 to 30 us and a
decode step calls it a hundred times. Measured on SmolLM2-135M in bf16, two threads, time per token against no spinning:
with a CPU for each thread 300 and 1000 both took 0.93; with one CPU for both 300 took 1.04, 1000 took 1.12, 4000 took
1.54. libgomp's own 300000 once took 50 times as long: who spun held the CPU that the other thread needed."""


def set_threads() -> None:
    """Give OpenMP one thread a CPU of ours, which spins for a moment only; call it before torch is imported.

    Threads that spin long starve each other in a container that has more CPUs than quota. What the user set stays.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(cpus()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
