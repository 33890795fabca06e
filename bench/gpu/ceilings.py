"""What this device's memory gives: the larger of a copy and of a pure read is the ceiling of every kernel."""

from __future__ import annotations

import ctypes

import torch

from ...kernels.dispatch import triton_ready
from .. import record
from .report import Part
from .setting import Setting
from .timing import Call, Recorded, in_turns

SIZES = (256 << 20, 1 << 30, 4 << 30)  # bytes read
PERSISTING_L2 = 108  # cudaDevAttrMaxPersistingL2CacheSize


def measure(setting: Setting, size: int, rounds: int) -> dict[str, list[float]]:
    """Quartiles in GB/s: a copy, bytes read and written; torch.sum; our own read kernel where Triton can run."""
    source = torch.ones(size // 4, dtype=torch.float32, device=setting.device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "torch.sum": source.sum}
    if triton_ready(setting.device):
        from . import triton_probes

        calls["read"] = lambda: triton_probes.read(source)
    runs = {name: Recorded([call], setting.device) for name, call in calls.items()}
    moved = {"copy": 2 * size, "torch.sum": size, "read": size}
    return {
        name: record.quartiles([moved[name] / s / 1e9 for s in seconds])
        for name, seconds in in_turns(runs, rounds).items()
    }


def ceiling(setting: Setting) -> float:
    """GB/s that a kernel of this process can reach: the fastest of all ways, in a few turns."""
    size = 1 << 14 if setting.dry else 2 << 30
    return max(rates[1] for rates in measure(setting, size, rounds=min(9, setting.rounds)).values())


def run(part: Part, setting: Setting) -> None:
    """The stage: every size, and the sizes of the L2 cache."""
    part.note(persisting_l2_bytes=persisting_l2())
    for size in (1 << 12, 1 << 14) if setting.dry else SIZES:
        part.row(bytes=size, gb_per_s=measure(setting, size, setting.rounds))


def persisting_l2() -> int | None:
    """Bytes of L2 that may be set aside, from the CUDA runtime that torch has loaded; None without one."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    major = (torch.version.cuda or "12").split(".")[0]
    value = ctypes.c_int()
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{major}")
    except OSError:
        return None
    failed = runtime.cudaDeviceGetAttribute(ctypes.byref(value), PERSISTING_L2, 0)
    return None if failed else value.value
