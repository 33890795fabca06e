"""One feed-forward layer on this CPU, routed and dense, interleaved: what sleeping groups are worth at every M.

The layer is gate, up and down of Llama-2-7B or Llama-3-8B. A random router wakes a given share of its groups of 32 for
every row of x by itself, so that many rows wake nearly all of them between them: the worst company there is. Weights,
the router's too, are cold as in cpu_linear.py. The dense side is the faster of the dense format and F.linear at that M.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import KernelError
from . import record
from .cpu_cases import CHECKED_ROWS, CONFIGS, DENSE, TORCH, header, run
from .cpu_linear import Ceiling, Weights, buffer_of, reads_of, rotated_bytes, seconds_of

if TYPE_CHECKING:
    import torch

    from ..kernels.unit import Prepared

HIDDEN, GROUP, ACT = 4096, 32, "silu"
AWAKE = (100, 50, 20)  # percent of the groups, for each row
SIDES = (DENSE, TORCH, *(f"routed, {share} % awake" for share in AWAKE))
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)


@dataclass
class Case:
    """One side at one M: seconds and bytes of weights read in every round."""

    side: str
    m: int
    seconds: list[float] = field(default_factory=list)
    weight_bytes: list[int] = field(default_factory=list)


class Ffn:
    """The layer in every form, on cold weights."""

    def __init__(self, neurons: int, weights: Weights, generator: torch.Generator) -> None:
        import torch

        self.neurons, self.weights, self._generator = neurons, weights, generator
        count = weights.buffer.numel() // (3 * neurons * HIDDEN) + 1
        shape = (neurons // GROUP, HIDDEN)
        self._routers = [torch.randn(shape, generator=generator) * HIDDEN**-0.5 for _ in range(count)]
        self._taken = 0

    def rows(self, m: int) -> torch.Tensor:
        """x [m, HIDDEN], its elements near 1."""
        import torch

        return torch.randn(m, HIDDEN, generator=self._generator).to(self.weights.buffer.dtype)

    def dense(self, side: str, x: torch.Tensor) -> tuple[Callable[[], torch.Tensor], int]:
        """A call of the dense layer in the form `side`, and its bytes."""
        import torch.nn.functional as F

        from ..kernels import dense, fused
        from ..kernels.unit import Prepared

        ins = self.weights.take(2 * self.neurons, HIDDEN)
        down = self.weights.take(HIDDEN, self.neurons)
        units = [Prepared(dense.NAME, {"m": (len(weight),)}, (weight, None)) for weight in (ins, down)]

        def ours() -> torch.Tensor:
            return dense.apply(fused.gated_act(dense.apply(x, units[0], "m"), ACT), units[1], "m")

        def torchs() -> torch.Tensor:
            return F.linear(fused.gated_act(F.linear(x, ins), ACT), down)

        return (ours if side == DENSE else torchs), ins.nbytes + down.nbytes

    def router(self) -> torch.Tensor:
        """The next cold router; its logits are normal numbers."""
        self._taken += 1
        return self._routers[self._taken % len(self._routers)]

    def routed(self, share: int) -> Prepared:
        """The layer with a router that wakes `share` percent of its groups."""
        import torch

        from ..kernels import routed_ffn, routed_layout
        from ..kernels.unit import Prepared

        router = self.router()
        least = statistics.NormalDist().inv_cdf(1 - share / 100) if share < 100 else -torch.inf
        ins, downs = self.weights.take(2 * self.neurons, HIDDEN), self.weights.take(self.neurons, HIDDEN)
        laid = (ins.view(-1, 2, GROUP, HIDDEN), downs.view(len(router), -1, GROUP // 2, routed_layout.TILE_OUTPUTS, 2))
        tensors = (*laid, None, None, None, router, torch.zeros(3, dtype=torch.int64))
        ints = (GROUP, routed_ffn.KINDS.index(ACT), 1)
        return Prepared(routed_ffn.NAME, {"m": (HIDDEN,)}, tensors, ints, (least,))


def measure(name: str, dtype: torch.dtype, rows: Sequence[int], rounds: int) -> dict[str, Any]:
    """Time every side at every M once a round, in random order; returns what the JSON holds. Raises KernelError."""
    import torch

    from ..kernels.native import library

    native = library.load()
    if native is None:
        raise KernelError(library.why_not())
    generator = torch.Generator().manual_seed(0)
    weights = Weights(buffer_of(dtype, rotated_bytes(), generator))
    layer = Ffn(CONFIGS[name]["intermediate_size"], weights, generator)
    cases = [Case(side, m) for m in rows for side in SIDES]
    result, ceiling = record.circumstances(), Ceiling(reads_of(weights.buffer, native))
    with torch.inference_mode():
        for m in rows:
            check(layer, m)
        for _ in range(rounds):
            ceiling.read()
            for at in torch.randperm(len(cases), generator=generator).tolist():
                _time(cases[at], layer)
    return {
        **result,
        **header(name, dtype, native, weights, ceiling),
        "rounds": rounds,
        "group_size": GROUP,
        "cases": [_summary(case, cases, ceiling.gb_per_s) for case in cases],
    }


def check(layer: Ffn, m: int) -> None:
    """Raise KernelError unless the routed layer at half awake is as near to the unrounded result as its reference."""
    from ..kernels import routed_ffn
    from ..kernels.unit import Packed
    from .truth import rms_error

    groups = layer.weights.take(3 * layer.neurons, HIDDEN).view(-1, 3, GROUP, HIDDEN)
    params = {"group_size": GROUP, "tau": 0.5, "activation": ACT}
    tensors = {"groups": groups, "router": layer.router()}
    packed = Packed(routed_ffn.NAME, 1, {"m": (HIDDEN, HIDDEN)}, tensors, params)
    x = layer.rows(m)
    y, few = routed_ffn.apply(x, routed_ffn.prepare(packed, "cpu"), "m")[:CHECKED_ROWS], x[:CHECKED_ROWS]
    own, truth = (routed_ffn.reference(rows, packed, "m") for rows in (few, few.float()))
    error, bound = rms_error(y, own, truth)
    if not error <= bound:
        raise KernelError(f"routed_ffn, M = {m}: our error is {error:.3g}, torch's {bound:.3g}")


def _time(case: Case, layer: Ffn) -> None:
    from ..kernels import routed_ffn

    x = layer.rows(case.m)
    if case.side in (DENSE, TORCH):
        call, size = layer.dense(case.side, x)
        case.seconds.append(seconds_of(call))
        case.weight_bytes.append(size)
        return
    prepared = layer.routed(AWAKE[SIDES.index(case.side) - 2])
    case.seconds.append(seconds_of(lambda: routed_ffn.apply(x, prepared, "m")))
    *_, router, counts = (tensor for tensor in prepared.tensors if tensor is not None)
    passes, group = -(-case.m // routed_ffn.MOST_ROWS), 3 * GROUP * HIDDEN * x.element_size()
    case.weight_bytes.append(int(counts[2]) * group + passes * router.nbytes)


def _summary(case: Case, cases: list[Case], ceiling: float) -> dict[str, Any]:
    ours = record.quartiles(case.seconds)
    denses = [other for other in cases if other.m == case.m and other.side in (DENSE, TORCH)]
    best = min(denses, key=lambda dense: record.quartiles(dense.seconds)[1])
    size = statistics.median(case.weight_bytes)
    return {
        "side": case.side,
        "m": case.m,
        "bytes": size,
        "bytes_promise": best.weight_bytes[0] / size,
        "time_us": [1e6 * seconds for seconds in ours],
        "ratio": record.ratios(case.seconds, best.seconds),
        "gb_per_s": size / ours[1] / 1e9,
        "percent_of_ceiling": 100 * size / ours[1] / 1e9 / ceiling,
    }


if __name__ == "__main__":
    run(measure, ROWS, "cpu_ffn", "one FFN", __doc__)
