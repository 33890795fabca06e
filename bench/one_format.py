"""Any format's linear layers against the best dense path of this machine, interleaved, weights cold.

On a CPU the dense side is the faster of our dense format and F.linear at that M, on a GPU cuBLAS. Every side walks
through copies of its weights, more bytes together than caches hold. No time is given for a case whose result is not
as near to the unrounded one as the format's own reference.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import KernelError
from ..kernels import dense
from ..kernels.native import library
from ..kernels.unit import Packed, Prepared
from . import contract, cpu_linear, record, samples
from .cpu_linear import CALL_BYTES, Ceiling, buffer_of, reads_of, rotated_bytes, seconds_of
from .truth import rms_error

CHECKED_ROWS = 2  # of x: the reference computes in fp32, slowly
TORCH = {"cpu": "F.linear", "cuda": "cuBLAS"}
COLUMNS = ("format", "N x K", "M", "path", "time_us", "MB", "GB/s", "% of ceiling", "best dense / ours (quartiles)", "")


class Side:
    """One way to multiply x by weights that no cache still holds, and its seconds per call in every round."""

    def __init__(self, name: str, call: Callable[[Any], Any], weights: Sequence[Any], size: int) -> None:
        self.name, self.seconds = name, list[float]()
        self._call, self._count, self._size = call, len(weights), size
        self._next = itertools.cycle(weights)
        self._graph: Any = None

    def time(self, device: str) -> None:
        """One round: CALL_BYTES of weights on a CPU, on a GPU every copy once, in a captured graph."""
        if device == "cuda":
            self._graph = self._graph or self._captured()
            self.seconds.append(gpu_seconds_of(self._graph.replay) / self._count)
            return
        turn = list(itertools.islice(self._next, min(self._count, max(1, CALL_BYTES // self._size))))
        self.seconds.append(seconds_of(lambda: [self._call(weight) for weight in turn]) / len(turn))

    def _captured(self) -> Any:
        """A graph of one call a copy: launched one by one, small kernels would wait for Python."""
        self._call(next(self._next))  # compiles
        turn = [next(self._next) for _ in range(self._count)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in turn:
                self._call(weight)
        return graph


@dataclass
class Case:
    """One format, shape and M: the format's side, and the dense ones."""

    what: str
    n: int
    k: int
    m: int
    path: str
    weight_bytes: int
    ours: Side
    denses: list[Side] = field(default_factory=list)


def gpu_seconds_of(run: Callable[[], Any]) -> float:
    """Time of one call on the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(
    modules: Sequence[ModuleType],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    dtype: torch.dtype,
    rounds: int,
    device: str,
) -> dict[str, Any]:
    """Time every case once a round, in random order; returns what the JSON holds. Raises KernelError."""
    generator = torch.Generator().manual_seed(0)
    native = library.load() if device == "cpu" else None
    buffer = buffer_of(dtype, rotated_bytes(), generator).to(device)
    result, ceiling = record.circumstances(), Ceiling(reads_of(buffer, native))
    summaries: list[dict[str, Any]] = []
    with torch.inference_mode():
        for module, (n, k) in itertools.product(modules, shapes):
            for form in samples.units(module, n, k, dtype):  # one at a time: copies take memory
                cases = list(_cases(module, form, (n, k), rows, buffer, device))
                for _ in range(rounds):
                    ceiling.read(gpu_seconds_of if device == "cuda" else seconds_of)
                    for at in torch.randperm(len(cases), generator=generator).tolist():
                        sides = [cases[at].ours, *cases[at].denses]
                        for side in torch.randperm(len(sides), generator=generator).tolist():
                            sides[side].time(device)
                summaries += [_summary(case) for case in cases]
    for one in summaries:
        one["percent_of_ceiling"] = 100 * one["gb_per_s"] / ceiling.gb_per_s
    return {
        **result,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "rotated_bytes": buffer.nbytes,
        **ceiling.as_json(),
        "cases": summaries,
    }


def _cases(
    module: ModuleType, form: str, shape: tuple[int, int], rows: Sequence[int], buffer: torch.Tensor, device: str
) -> Iterator[Case]:
    """The checked cases of one unit. Half of the rotated bytes are copies of it: dense weights pass between them."""
    n, k = shape
    packed = module.encode(samples.units(module, n, k, buffer.dtype)[form])
    size = module.traffic(packed, 1).weight_bytes
    copies = [module.prepare(_copied(packed), device) for _ in range(max(1, buffer.nbytes // 2 // size))]
    weights = cpu_linear.Weights(buffer)
    denses = [weights.take(n, k) for _ in range(max(1, buffer.numel() // (n * k)))]
    for m in rows:
        x = samples.random((m, k), buffer.dtype) * k**0.5
        path = checked(module, packed, copies[0], x, device)
        x = x.to(device)
        ours = Side(module.NAME, partial(_apply, module, x), copies, size)
        case = Case(samples.title(module, form), n, k, m, path, module.traffic(packed, m).weight_bytes, ours)
        case.denses.append(Side(TORCH[device], partial(F.linear, x), denses, denses[0].nbytes))
        if device == "cpu" and module is not dense:
            prepared = [Prepared(dense.NAME, {samples.PATH: (n,)}, (w, None)) for w in denses]
            case.denses.append(Side(dense.NAME, partial(_apply, dense, x), prepared, denses[0].nbytes))
        yield case


def checked(module: ModuleType, packed: Packed, prepared: Prepared, x: torch.Tensor, device: str) -> str:
    """The path that `apply` took. Raises KernelError unless it is as near to truth as the reference."""
    parts = [(packed, samples.PATH)]
    path, *results = contract.applied(module, prepared, parts, x, device, most=CHECKED_ROWS)
    error, bound = rms_error(*results)
    if not error <= bound:
        n, k = packed.modules[samples.PATH]
        raise KernelError(f"{module.NAME} [{n}, {k}] at M = {len(x)}: its error is {error:.3g}, the bound {bound:.3g}")
    return path


def _copied(packed: Packed) -> Packed:
    return dataclasses.replace(packed, tensors={role: tensor.clone() for role, tensor in packed.tensors.items()})


def _apply(module: ModuleType, x: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    y: torch.Tensor = module.apply(x, prepared, samples.PATH)
    return y


def _summary(case: Case) -> dict[str, Any]:
    ours = record.quartiles(case.ours.seconds)
    best = min(case.denses, key=lambda side: record.quartiles(side.seconds)[1])
    return {
        "format": case.what,
        "n": case.n,
        "k": case.k,
        "m": case.m,
        "path": case.path,
        "bytes": case.weight_bytes,
        "time_us": [1e6 * seconds for seconds in ours],
        "best_dense": best.name,
        "best_dense_us": [1e6 * seconds for seconds in record.quartiles(best.seconds)],
        "ratio": record.ratios(case.ours.seconds, best.seconds),
        "gb_per_s": case.weight_bytes / ours[1] / 1e9,
    }


def title(result: dict[str, Any]) -> str:
    """Where it was measured, and the reads that are the ceiling."""
    reads = ", ".join(f"{how} {rate[1]:.1f}" for how, rate in result["reads_gb_per_s"].items())
    return f"{result['dtype']} on {result['device']}, {result['rounds']} rounds; GB/s read: {reads}"


def lines(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cases as lines of a table under COLUMNS."""
    for case in result["cases"]:
        low, middle, high = case["ratio"]
        yield (
            case["format"],
            f"{case['n']} x {case['k']}",
            str(case["m"]),
            case["path"],
            f"{case['time_us'][1]:.0f}",
            f"{case['bytes'] / 1e6:.1f}",
            f"{case['gb_per_s']:.1f}",
            f"{case['percent_of_ceiling']:.0f}",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            case["best_dense"],
        )
