"""Time of GPU work: calls recorded as one CUDA graph, replayed in turns with the other sides, between two events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import record

Call = Callable[[], Any]


class Recorded:
    """Calls recorded once as a CUDA graph; on a CPU, or as `eager`, they are made one after the other."""

    def __init__(self, calls: Sequence[Call], device: torch.device, warm: int = 1, eager: bool = False) -> None:
        self.calls, self.device = calls, device
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda" or eager:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels, makes cuBLAS's handles
            for call in calls[:warm]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for call in self.calls:
            call()

    def seconds(self) -> float:
        """Time of one call, the mean over all of them."""
        return seconds_of(self, self.device) / len(self.calls)


def seconds_of(run: Call, device: torch.device) -> float:
    """Time of one run: between events on a GPU, wall time on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def in_turns(sides: Mapping[str, Recorded], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of every side, one value a round; the order turns around each round, the first is warm-up."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            taken = sides[name].seconds()
            if turn:
                seconds[name].append(taken)
    return seconds


def microseconds(seconds: list[float]) -> list[float]:
    """Quartiles in us."""
    return [1e6 * value for value in record.quartiles(seconds)]
