"""Every form of every format at 1 to 512 rows of a 7B model's feed-forward matrix, in turns with the best dense path.

A new format appears here by itself; low rank as two of torch's products stands beside them. A case whose result is not
as near to the unrounded one as plain torch's fails before anything is timed. Each timed call finds its weights in no
cache.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pared.bench import record
from pared.bench.cpu_formats import ROWS
from pared.bench.cpu_linear import LARGE, seconds_of
from pared.bench.gpu.layers import TORCH, TWICE, Layer, Side, format_sides, lone, sides_of
from pared.bench.gpu.setting import GROUP, Setting
from pared.kernels import dense, formats

N, K = LARGE[0]
ROUNDS = 9
ON_CPU = Setting(False, torch.device("cpu"), torch.bfloat16, 1, 1, ROUNDS, context=0, tokens=0, rows=ROWS)
BASELINES = sides_of((TORCH,), (dense,))
SIDES = [*(side for module in formats.LINEAR for side in format_sides(module)), *sides_of((TWICE,))]


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.name)
def test_linear(benchmark: Any, memory: Any, side: Side, m: int) -> None:
    sets = [[lone(N, K, size=GROUP)]]
    with torch.inference_mode():
        layer = Layer(side, sets, m, ON_CPU)
        errors = layer.check()
        (ours,) = layer.calls()
        others = {
            other.name: Layer(other, sets, m, ON_CPU).calls()[0] for other in BASELINES if other.name != side.name
        }
        seconds: dict[str, list[float]] = {name: [] for name in others}

        def others_turn() -> None:
            for name, call in others.items():
                memory.sweep()
                seconds[name].append(seconds_of(call))
            memory.sweep()

        benchmark.pedantic(ours, setup=others_turn, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable: the check was all that was wanted
        return
    own = list(benchmark.stats.stats.data)
    paired = {name: taken[-len(own) :] for name, taken in seconds.items()} | {side.name: own}
    best = min((other.name for other in BASELINES), key=lambda name: record.quartiles(paired[name])[1])
    rate = layer.nbytes / record.quartiles(own)[1] / 1e9
    benchmark.group = f"{N} x {K}, M = {m}"
    benchmark.extra_info.update(
        format=side.name,
        m=m,
        n=N,
        k=K,
        dtype="bfloat16",
        threads=torch.get_num_threads(),
        bytes=layer.nbytes,
        time_us=[1e6 * s for s in record.quartiles(own)],
        gb_per_s=rate,
        percent_of_ceiling=100 * rate / memory.ceiling(),
        best_dense=best,
        ratio=record.ratios(own, paired[best]),
        error_rms=errors,
    )
