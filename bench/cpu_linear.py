"""The dense linear layer on this CPU against torch's F.linear and against the memory, interleaved in one process.

Every call reads weights that no cache still holds: they rotate through a buffer of several times the last-level
cache. The ceiling is the faster of torch.sum and our own read kernel over 1 GiB, taken in the same rounds with the
same threads. No time is given for a case whose result is not as near to fp64 truth as torch's own.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import KernelError
from ..kernels.dispatch import set_threads
from . import record

if TYPE_CHECKING:
    import torch

LARGE = ((11008, 4096), (4096, 11008))  # [N outputs, K inputs]: Llama-2-7B's feed-forward layers
SMALL = ((576, 576), (960, 576), (3072, 576), (576, 1536), (49152, 576))  # SmolLM2-135M's o, qkv, gate|up, down, head
CASES = [(n, k, m) for n, k in LARGE for m in (1, 2, 4, 8, 16, 32, 64)] + [
    (n, k, m) for n, k in SMALL for m in (1, 8, 32, 64)
]
CEILING_BYTES = 1 << 30
CALL_BYTES = 64 << 20  # of weights read per timing: small layers are called several times
COLUMNS = ("N x K", "M", "path", "time_us", "MB", "GB/s", "% of ceiling", "F.linear / ours (quartiles)")


@dataclass
class Case:
    """One shape: what is timed, and its seconds per call in every round."""

    n: int
    k: int
    x: torch.Tensor
    path: str
    ours: list[float] = field(default_factory=list)
    torchs: list[float] = field(default_factory=list)

    @property
    def weight_bytes(self) -> int:
        return self.n * self.k * self.x.element_size()


class Weights:
    """Weights that are cold: every one handed out lies behind the last one in a buffer larger than the caches."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer, self._at = buffer, 0

    def take(self, n: int, k: int) -> torch.Tensor:
        """A weight [n, k], a view of the buffer."""
        if self._at + n * k > self.buffer.numel():
            self._at = 0
        start, self._at = self._at, self._at + n * k
        return self.buffer[start : self._at].view(n, k)


def measure(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Time every case `rounds` times in turn; returns what the JSON holds. Raises KernelError for a wrong result."""
    import torch

    from ..kernels.native import library

    native = library.load()
    if native is None:
        raise KernelError(library.why_not())
    generator = torch.Generator().manual_seed(0)
    weights = Weights(buffer_of(dtype, rotated_bytes(), generator))
    cases = []
    for n, k, m in CASES:
        x = torch.randn(m, k, generator=generator).to(dtype)
        cases.append(Case(n, k, x, "native" if m <= native.linear_rows(dtype, k) else "torch"))
        check(x, weights.take(n, k))
    result, ceiling = record.circumstances(), Ceiling(reads_of(weights.buffer, native))
    with torch.inference_mode():
        for number in range(rounds):
            ceiling.read()
            for case in cases:
                _time_both(case, weights, ours_first=number % 2 == 0)
    return {
        **result,
        "dtype": str(dtype).removeprefix("torch."),
        "level": native.level,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "last_level_cache_bytes": last_level_cache(),
        "rotated_bytes": weights.buffer.nbytes,
        **ceiling.as_json(),
        "cases": [_summary(case, ceiling.gb_per_s) for case in cases],
    }


def check(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise KernelError unless our result is as near to fp64 truth as F.linear's in the same dtype."""
    from .truth import rms_error

    ours, torchs = (side(x, [weight])()[0] for side in (_ours, _torchs))
    error, bound = rms_error(ours, torchs, x.double() @ weight.double().t())
    if not error <= bound:
        raise KernelError(f"x {tuple(x.shape)}, W {tuple(weight.shape)}: our error is {error:.3g}, torch's {bound:.3g}")


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cases as lines of a table under COLUMNS."""
    for case in result["cases"]:
        low, middle, high = case["ratio"]
        yield (
            f"{case['n']} x {case['k']}",
            str(case["m"]),
            case["path"],
            f"{case['time_us'][1]:.0f}",
            f"{case['bytes'] / 1e6:.1f}",
            f"{case['gb_per_s']:.1f}",
            f"{case['percent_of_ceiling']:.0f}",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
        )


def last_level_cache(cpu: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache that the kernel reports; 32 MiB when it reports none."""
    sizes = [path.read_text().strip() for path in cpu.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def free_memory() -> int:
    """Bytes that can be allocated without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) << 10 if found else CEILING_BYTES


def rotated_bytes() -> int:
    """Bytes that measurements read before any of them again: eight times the last-level cache, as memory allows."""
    return max(CEILING_BYTES, min(8 * last_level_cache(), free_memory() // 4))


def buffer_of(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    """`size` bytes of weights: random ones, repeated every 64 MiB or so."""
    import torch

    buffer = torch.empty(size // dtype.itemsize, dtype=dtype)
    pieces = buffer.split((64 << 20) // dtype.itemsize)
    pieces[0].copy_(torch.randn(pieces[0].shape, generator=generator) * 0.02)
    for piece in pieces[1:]:
        piece.copy_(pieces[0][: piece.numel()])
    return buffer


class Ceiling:
    """What the memory gives: CEILING_BYTES read in every known way, once a round of the measurement it judges."""

    def __init__(self, reads: dict[str, Callable[[], Any]]) -> None:
        self._reads = reads
        self._rates: dict[str, list[float]] = {how: [] for how in reads}

    def read(self, seconds: Callable[[Callable[[], Any]], float] | None = None) -> None:
        """One round; `seconds` times a call."""
        for how, run in self._reads.items():
            self._rates[how].append(CEILING_BYTES / (seconds or seconds_of)(run) / 1e9)

    @property
    def gb_per_s(self) -> float:
        """The median of the fastest way."""
        return max(record.quartiles(rates)[1] for rates in self._rates.values())

    def as_json(self) -> dict[str, Any]:
        reads = {how: record.quartiles(rates) for how, rates in self._rates.items()}
        return {"ceiling_gb_per_s": self.gb_per_s, "reads_gb_per_s": reads}


def reads_of(buffer: torch.Tensor, native: Any) -> dict[str, Callable[[], Any]]:
    """Ways to read the first CEILING_BYTES of the buffer: the fastest is the memory's ceiling."""
    import torch

    data = buffer.view(torch.uint8)[:CEILING_BYTES].view(torch.float32)
    if native is None:
        return {"torch.sum": data.sum}
    checksum = torch.empty(1, dtype=torch.int64)
    return {"torch.sum": data.sum, "native read": lambda: native.read(data, checksum)}


def _ours(x: torch.Tensor, weights: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """What the decoder runs: the dense format, with its checks and its choice of path."""
    from ..kernels import dense
    from ..kernels.unit import Prepared

    units = [Prepared(dense.NAME, {"linear": (len(weight),)}, (weight, None)) for weight in weights]
    return lambda: [dense.apply(x, unit, "linear") for unit in units]


def _torchs(x: torch.Tensor, weights: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    import torch.nn.functional as F

    return lambda: [F.linear(x, weight) for weight in weights]


def _time_both(case: Case, weights: Weights, ours_first: bool) -> None:
    sides = [(_ours, case.ours), (_torchs, case.torchs)]
    calls = max(1, CALL_BYTES // case.weight_bytes)
    for side, seconds in sides if ours_first else reversed(sides):
        run = side(case.x, [weights.take(case.n, case.k) for _ in range(calls)])
        seconds.append(seconds_of(run) / calls)


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _summary(case: Case, ceiling: float) -> dict[str, Any]:
    ours = record.quartiles(case.ours)
    rate = case.weight_bytes / ours[1] / 1e9
    return {
        "n": case.n,
        "k": case.k,
        "m": len(case.x),
        "path": case.path,
        "bytes": case.weight_bytes,
        "time_us": [1e6 * seconds for seconds in ours],
        "torch_us": [1e6 * seconds for seconds in record.quartiles(case.torchs)],
        "ratio": record.ratios(case.ours, case.torchs),
        "gb_per_s": rate,
        "percent_of_ceiling": 100 * rate / ceiling,
    }


def main() -> None:
    """`make bench`: a table, and JSON beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    set_threads()
    import torch

    from ..terminal import print_table

    result = measure(getattr(torch, options.dtype), options.rounds)
    record.write(f"cpu_linear_{options.dtype}", result)
    reads = ", ".join(f"{name} {rate[1]:.1f}" for name, rate in result["reads_gb_per_s"].items())
    print_table(f"linear, {options.dtype}, {result['level']}; GB/s read: {reads}", COLUMNS, rows(result))


if __name__ == "__main__":
    main()
