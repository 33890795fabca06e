"""How much memory the KV cache may take."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

SHARE_OF_FREE = {"cuda": 0.85, "cpu": 0.4}  # the rest is for activations, and on a CPU for everybody else


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on the device now; on a CPU the cgroup's limit counts too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):  # the kernel's caches count as available
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(free, 0)


def cache_blocks(block_bytes: int, wanted: int, device: torch.device) -> int:
    """Blocks for the KV cache, the reserved one included: `wanted`, or what the device's share of memory holds."""
    return min(wanted, int(free_bytes(device) * SHARE_OF_FREE[device.type]) // block_bytes)
