"""What the suites share: threads set before torch is imported, memory that evicts every cache, and the real model.

Collected only when asked for: `make bench-suites`, or `pytest bench/suites --benchmark-json=FILE`. They measure a CPU;
a GPU has the GPU report.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pared.kernels.dispatch import set_threads

if TYPE_CHECKING:
    import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
set_threads()


class Memory:
    """A buffer beyond every cache. `sweep` reads it: what was cached is gone, and how fast that went is the ceiling."""

    def __init__(self, native: Any, buffer: torch.Tensor) -> None:
        from pared.bench.cpu_linear import reads_of

        self._read = reads_of(buffer, native)["native read"]
        self._rates: list[float] = []

    def sweep(self) -> None:
        """Read all of it."""
        from pared.bench.cpu_linear import CEILING_BYTES, seconds_of

        self._rates.append(CEILING_BYTES / seconds_of(self._read) / 1e9)

    def ceiling(self) -> float:
        """GB/s, the median of all sweeps so far."""
        from pared.bench import record

        return record.quartiles(self._rates)[1]


@pytest.fixture(scope="session")
def memory() -> Memory:
    """One buffer for the whole session."""
    import torch

    from pared.bench.cpu_linear import CEILING_BYTES, buffer_of, last_level_cache
    from pared.kernels.native import library

    native = library.load()
    if native is None:
        pytest.skip(library.why_not())
    if last_level_cache() > CEILING_BYTES:
        pytest.skip(f"{CEILING_BYTES} bytes do not evict a cache of {last_level_cache()}")
    return Memory(native, buffer_of(torch.bfloat16, CEILING_BYTES, torch.Generator().manual_seed(0)))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a dense compact folder in bf16."""
    from pared.bench.data import convert_smollm2, gguf_path
    from pared.errors import SourceError

    try:
        gguf_path()
    except SourceError as missing:
        pytest.skip(str(missing))
    target = tmp_path_factory.mktemp("suites") / "smollm2"
    convert_smollm2(target)
    return target
