"""One decoder layer on this CPU in every compressed form, against our own best dense, interleaved.

A layer is its linears alone, q|k|v, o, gate|up and down, at the shapes of Llama-2-7B and Llama-3-8B: with the ranks
that Basis Sharing chooses for groups of two, and with half of the weights zero, anywhere (bitmap) or two of every four
(two_four). Weights are cold as in cpu_linear.py. The dense side is the faster of the
dense format and F.linear at that M. No time is given for a form whose result is not as near to the unrounded one as
plain torch's in the same dtype.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import KernelError
from . import record
from .cold_sparse import SPARSE, SparseWeights, rows_as_packed
from .cpu_cases import CHECKED_ROWS, CONFIGS, DENSE, TORCH, header, run
from .cpu_linear import Ceiling, Weights, buffer_of, reads_of, rotated_bytes, seconds_of

if TYPE_CHECKING:
    import torch

    from ..kernels.unit import Packed, Prepared

SETS: tuple[tuple[str, ...], ...] = (  # modules that read the same input
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
RATIOS, FORMS, GROUP = (20, 50), ("pivoted", "factored"), 2
SIDES = (DENSE, TORCH, *(f"{form} {ratio} %" for ratio in RATIOS for form in FORMS), *SPARSE)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)


@dataclass(frozen=True)
class Module:
    """A linear of the layer and its rank at each of RATIOS."""

    path: str
    n: int
    k: int
    ranks: dict[int, int]


@dataclass
class Case:
    """One side at one M: seconds of every set of the layer in every round, and bytes of weights."""

    side: str
    m: int
    seconds: list[list[float]] = field(default_factory=list)
    weight_bytes: int = 0

    def layer(self) -> list[float]:
        """Seconds of the whole layer in every round."""
        return [sum(sets) for sets in self.seconds]


def plan(name: str) -> list[list[Module]]:
    """The first layer's linears of model `name`, those with one input together, as the paper's rules rank them."""
    from .. import families
    from ..converters.groups import kinds, runs
    from ..converters.low_rank import rank

    common = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}
    common |= {"num_hidden_layers": GROUP, "max_position_embeddings": 4096}
    spec = families.read(common | CONFIGS[name])
    modules = {}
    for kind in kinds(spec):
        group = runs(spec, GROUP)[0].groups(spec, kind, kind.shared)[0]
        linear = spec.linears()[group.paths[0]]
        ranks = {ratio: rank(ratio / 100, linear.n, linear.k, group.size) for ratio in RATIOS}
        modules[kind.name] = Module(kind.name, linear.n, linear.k, ranks)
    return [[modules[name] for name in names] for names in SETS]


def measure(name: str, dtype: torch.dtype, rows: Sequence[int], rounds: int) -> dict[str, Any]:
    """Time every side at every M once a round, in random order; returns what the JSON holds. Raises KernelError."""
    import torch

    from ..kernels.native import library

    native = library.load()
    if native is None:
        raise KernelError(library.why_not())
    generator = torch.Generator().manual_seed(0)
    layer, weights = plan(name), SparseWeights(buffer_of(dtype, rotated_bytes(), generator), generator)
    cases = [Case(side, m) for m in rows for side in SIDES]
    result, ceiling = record.circumstances(), Ceiling(reads_of(weights.buffer, native))
    with torch.inference_mode():
        for case in cases:
            _check(case, layer, weights, dtype, generator)
        for _ in range(rounds):
            ceiling.read()
            for at in torch.randperm(len(cases), generator=generator).tolist():
                _time(cases[at], layer, weights, dtype, generator)
    return {
        **result,
        **header(name, dtype, native, weights, ceiling),
        "rounds": rounds,
        "sets": [[module.path for module in modules] for modules in layer],
        "cases": [_summary(case, cases, ceiling.gb_per_s) for case in cases],
    }


def _pack(side: str, module: Module, weights: Weights) -> Packed:
    """Cold weights of one module in the form of `side`."""
    import torch

    from ..kernels import dense, shared_basis
    from ..kernels.unit import Packed

    shapes, n, k = {module.path: (module.n, module.k)}, module.n, module.k
    if side in (DENSE, TORCH):
        return Packed(dense.NAME, dense.VERSION, shapes, {"weight": weights.take(n, k)})
    form, ratio, _ = side.split()
    rank = module.ranks[int(ratio)]
    tensors = {"coefficients." + module.path: weights.take(n, rank)}
    if form == "pivoted":
        tensors |= {"basis": weights.take(rank, k - rank), "pivots": torch.randperm(k)[:rank].sort()[0].int()}
    else:
        tensors |= {"basis": weights.take(rank, k)}
    return Packed(shared_basis.NAME, shared_basis.VERSION, shapes, tensors)


def _made(side: str, modules: list[Module], weights: SparseWeights) -> tuple[list[Packed], Prepared]:
    """Cold weights of modules with one input, each packed, and laid side by side as the loader would."""
    from ..kernels import dense, formats
    from ..kernels.unit import Prepared

    widths, path = tuple(module.n for module in modules), modules[0].path
    if side in SPARSE:
        prepared = weights.take_sparse(side, sum(widths), modules[0].k)
        ends = list(itertools.accumulate(widths, initial=0))
        rows = zip(modules, ends, ends[1:], strict=False)
        packs = [rows_as_packed(prepared, start, stop, module.path) for module, start, stop in rows]
        return packs, dataclasses.replace(prepared, outputs={path: widths})
    packs = [_pack(side, module, weights) for module in modules]
    if side in (DENSE, TORCH):
        return packs, Prepared(dense.NAME, {path: widths}, (weights.take(sum(widths), modules[0].k), None))
    module = formats.by_name(packs[0].format)
    return packs, module.stack([(module.prepare(p, "cpu"), m.path) for p, m in zip(packs, modules, strict=True)])


def _call(side: str, x: torch.Tensor, prepared: Prepared, path: str) -> Callable[[], torch.Tensor]:
    import torch.nn.functional as F

    from ..kernels import formats

    weight = prepared.tensors[0]
    if side == TORCH and weight is not None:
        return lambda: F.linear(x, weight)
    return lambda: formats.by_name(prepared.format).apply(x, prepared, path)


def _check(
    case: Case, layer: list[list[Module]], weights: SparseWeights, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Note the bytes; raise KernelError unless `apply` is as near to the unrounded result as `reference` is."""
    import torch

    from ..kernels import formats
    from .truth import rms_error

    for modules in layer:
        packs, prepared = _made(case.side, modules, weights)
        case.weight_bytes += sum(formats.by_name(p.format).traffic(p, case.m).weight_bytes for p in packs)
        if case.side in (DENSE, TORCH):
            continue  # cpu_linear.py has checked both
        x = torch.randn(case.m, modules[0].k, generator=generator).to(dtype)
        y = _call(case.side, x, prepared, modules[0].path)()[:CHECKED_ROWS]
        few, reference = x[:CHECKED_ROWS], formats.by_name(packs[0].format).reference
        pairs = list(zip(packs, (module.path for module in modules), strict=True))
        own, truth = (torch.cat([reference(rows, *pair) for pair in pairs], dim=1) for rows in (few, few.float()))
        error, bound = rms_error(y, own, truth)
        if not error <= bound:
            raise KernelError(
                f"{case.side}, {modules[0].path}, M = {case.m}: our error is {error:.3g}, torch's {bound:.3g}"
            )


def _time(
    case: Case, layer: list[list[Module]], weights: SparseWeights, dtype: torch.dtype, generator: torch.Generator
) -> None:
    import torch

    seconds = []
    for modules in layer:
        _, prepared = _made(case.side, modules, weights)
        x = torch.randn(case.m, modules[0].k, generator=generator).to(dtype)
        seconds.append(seconds_of(_call(case.side, x, prepared, modules[0].path)))
    case.seconds.append(seconds)


def _summary(case: Case, cases: list[Case], ceiling: float) -> dict[str, Any]:
    ours = record.quartiles(case.layer())
    denses = [other for other in cases if other.m == case.m and other.side in (DENSE, TORCH)]
    best = min(denses, key=lambda dense: record.quartiles(dense.layer())[1])
    rate = case.weight_bytes / ours[1] / 1e9
    return {
        "side": case.side,
        "m": case.m,
        "bytes": case.weight_bytes,
        "time_us": [1e6 * seconds for seconds in ours],
        "sets_ratio": [record.ratios(*sets) for sets in zip(_by_set(case), _by_set(best), strict=True)],
        "sets_us": [1e6 * record.quartiles(seconds)[1] for seconds in _by_set(case)],
        "ratio": record.ratios(case.layer(), best.layer()),
        "gb_per_s": rate,
        "percent_of_ceiling": 100 * rate / ceiling,
    }


def _by_set(case: Case) -> list[list[float]]:
    """Seconds of every round, for each set of the layer."""
    return [list(seconds) for seconds in zip(*case.seconds, strict=True)]


if __name__ == "__main__":
    run(measure, ROWS, "cpu_formats", "one layer", __doc__)
