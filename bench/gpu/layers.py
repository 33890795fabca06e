"""Layers of linears in every form that the formats give them, and as peers compute them, over cold weights.

`FORMS` are ways to make a unit of random weights; a format is measured in every form that it fits, so a new format
appears here by itself. `PEERS` are what no format of ours computes. measuring.py times them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from ... import families
from ...converters.groups import kinds, runs
from ...converters.low_rank import rank
from ...errors import KernelError
from ...kernels import dense, formats, int8, shared_basis
from ...kernels.unit import Packed, Prepared, Unit
from .setting import GROUP, RATIOS, Setting
from .timing import Call

TORCH, TWICE = "F.linear", "F.linear twice"
GATHER, SPARSELT = "gather of half the inputs", "cuSPARSELt 2:4"


@dataclass(frozen=True)
class Module:
    """A linear [n, k], and the rank that it has at each ratio of compression."""

    path: str
    n: int
    k: int
    ranks: dict[int, int]


Sets = Sequence[Sequence[Module]]
Make = Callable[[Module, torch.device, torch.dtype], Unit]


@dataclass(frozen=True)
class Peer:
    """What no format of ours computes: a call for x and the packed units of a set.

    packer: how the units are packed. read: the share of their bytes that a call needs. inputs: the share of x that is
    not zero. torchs: it is torch's product, whose error is what others are held to.
    """

    call: Callable[[torch.Tensor, list[Packed]], Call]
    packer: ModuleType = dense
    read: float = 1.0
    inputs: float = 1.0
    torchs: bool = False


@dataclass(frozen=True)
class Side:
    """What is timed: a format of ours, or a peer. Baselines are what others are compared with."""

    name: str
    format: ModuleType | None
    make: Make
    peer: Peer | None = None

    @property
    def baseline(self) -> bool:
        return self.name in (TORCH, dense.NAME)


# --- shapes --------------------------------------------------------------------------------------


def layer_of(config: dict[str, Any]) -> list[list[Module]]:
    """The first layer's linears, those with one input together, ranked by the paper's rules for groups of two."""
    spec = families.read(config)
    found = {}
    for kind in kinds(spec):
        group = runs(spec, GROUP)[0].groups(spec, kind, kind.shared)[0]
        linear = spec.linears()[group.paths[0]]
        found[kind.name] = lone(linear.n, linear.k, kind.name, group.size)
    names = spec.names
    return [[found[name] for name in each] for each in (names.qkv, (names.out,), names.ffn_in, (names.ffn_out,))]


def lone(n: int, k: int, path: str = "m", size: int = 1) -> Module:
    """One linear; size: modules that would share its basis."""
    return Module(path, n, k, {ratio: rank(ratio / 100, n, k, size) for ratio in RATIOS})


# --- forms ---------------------------------------------------------------------------------------


def _random(n: int, k: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n, k, device=device, dtype=torch.float32).mul_(k**-0.5).to(dtype)


def _full(module: Module, device: torch.device, dtype: torch.dtype) -> Unit:
    weight = _random(module.n, module.k, device, dtype)
    return Unit({module.path: (module.n, module.k)}, {"weight": weight})


def _half(run: int) -> Make:
    """Half of the weights zero: half of every `run` inputs, of a whole row if 0."""

    def make(module: Module, device: torch.device, dtype: torch.dtype) -> Unit:
        unit = _full(module, device, dtype)
        pieces = unit.tensors["weight"].view(module.n, -1, run or module.k)
        dropped = pieces.abs().topk(pieces.shape[2] // 2, dim=2, largest=False).indices
        return Unit(unit.modules, {"weight": pieces.scatter(2, dropped, 0).view(module.n, module.k)})

    return make


def _basis(ratio: int, pivoted: bool) -> Make:
    def make(module: Module, device: torch.device, dtype: torch.dtype) -> Unit:
        (n, k), r = (module.n, module.k), module.ranks[ratio]
        tensors = {f"coefficients.{module.path}": _random(n, r, device, dtype)}
        tensors["basis"] = _random(r, k - r if pivoted else k, device, dtype)
        if pivoted:
            tensors["pivots"] = torch.randperm(k, device=device)[:r].sort().values.int()
        return Unit({module.path: (n, k)}, tensors)

    return make


def _int8(module: Module, device: torch.device, dtype: torch.dtype) -> Unit:
    return int8.quantize(_full(module, device, dtype))


FORMS: dict[str, Make] = {
    "rows": _int8,
    "2:4": _half(4),
    "half zero": _half(0),
    **{f"{form} {ratio} %": _basis(ratio, form == "pivoted") for ratio in RATIOS for form in ("pivoted", "factored")},
}


def format_sides(module: ModuleType) -> list[Side]:
    """One side for each form that a format fits; dense keeps whole weights. Raises LookupError where none fits."""
    if module is dense:
        return [Side(dense.NAME, dense, _full)]
    small = Module("m", 32, 64, dict.fromkeys(RATIOS, 16))
    device = torch.device("cpu")
    fitting = [form for form, make in FORMS.items() if module.fits(make(small, device, torch.bfloat16)) is None]
    if not fitting:
        raise LookupError(f"no form of bench/gpu/layers.py fits the format {module.NAME}: give it one in FORMS")
    return [Side(f"{module.NAME} {form}", module, FORMS[form]) for form in fitting]


def sides_of(peers: Sequence[str] = (TORCH, TWICE), modules: Sequence[ModuleType] = ()) -> list[Side]:
    """The sides of PEERS so named, then every form of the formats `modules`."""
    others = [Side(name, None, make, peer) for name in peers for make, peer in [PEERS[name]]]
    return [*others, *(s for m in modules for s in format_sides(m))]


# --- peers ---------------------------------------------------------------------------------------


def _joined(row: list[Packed]) -> torch.Tensor:
    return torch.cat([packed.tensors["weight"] for packed in row])


def _torchs(x: torch.Tensor, row: list[Packed]) -> Call:
    weight = _joined(row)
    return lambda: F.linear(x, weight)


def _twice(x: torch.Tensor, row: list[Packed]) -> Call:
    pairs = [(p.tensors["basis"], p.tensors[f"coefficients.{next(iter(p.modules))}"]) for p in row]
    return lambda: [F.linear(F.linear(x, basis), coefficients) for basis, coefficients in pairs]


def _gathering(x: torch.Tensor, row: list[Packed]) -> Call:
    from .triton_peers import gather_gemv

    columns = _joined(row).t().contiguous()
    return lambda: gather_gemv(x, columns, 0.0)


def _sparselt(x: torch.Tensor, row: list[Packed]) -> Call:
    weight = torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(_joined(row))
    return lambda: F.linear(x, weight)


PEERS: dict[str, tuple[Make, Peer]] = {
    TORCH: (_full, Peer(_torchs, torchs=True)),
    TWICE: (FORMS[f"factored {RATIOS[0]} %"], Peer(_twice, shared_basis, torchs=True)),
    GATHER: (_full, Peer(_gathering, read=0.5, inputs=0.5)),
    SPARSELT: (FORMS["2:4"], Peer(_sparselt, read=9 / 16)),
}


# --- layers --------------------------------------------------------------------------------------


class Layer:
    """The sets of one side at M rows, packed; `calls` lays them out as the loader would."""

    def __init__(self, side: Side, sets: Sets, m: int, setting: Setting) -> None:
        self.side = side
        packer, read, inputs = side.format or dense, 1.0, 1.0
        if side.peer:
            packer, read, inputs = side.peer.packer, side.peer.read, side.peer.inputs
        units = [[side.make(module, setting.device, setting.dtype) for module in modules] for modules in sets]
        self.packs: list[list[Packed]] = [[packer.encode(unit) for unit in row] for row in units]
        self.xs = [_rows(m, row[0].k, inputs, setting) for row in sets]
        whole = sum(packer.traffic(packed, m).weight_bytes for row in self.packs for packed in row)
        self.nbytes = int(whole * read)

    def calls(self) -> list[Call]:
        """One call for each set, on a fresh copy of the weights."""
        return [self._call(x, [_copy(packed) for packed in row]) for x, row in zip(self.xs, self.packs, strict=True)]

    def _call(self, x: torch.Tensor, row: list[Packed]) -> Call:
        if self.side.peer:
            return self.side.peer.call(x, row)
        module = self.side.format or dense
        parts = _laid_out(module, row, x.device)
        if len(parts) == 1:
            return lambda: module.apply(x, *parts[0])
        return lambda: [module.apply(x, *part) for part in parts]

    def check(self) -> dict[str, float]:
        """RMS errors against the unrounded result. Raises KernelError if a kernel's is larger than plain torch's."""
        ours = torch.cat([_flat(call()) for call in self.calls()])
        own, truth = (self._reference(wide) for wide in (False, True))
        errors = {"ours": _rms(ours - truth), "torch": _rms(own - truth) * self._excess()}
        slack = 1e-5 * max(1.0, truth.abs().max().item())
        trusted = self.side.peer is not None and self.side.peer.torchs
        if not trusted and not errors["ours"] <= errors["torch"] + slack:
            raise KernelError(f"{self.side.name}: our error is {errors['ours']:.3g}, torch's {errors['torch']:.3g}")
        return errors

    def _excess(self) -> float:
        """How many times as far from the truth as one rounding F.linear is: cuBLAS may add partial sums in 16 bits."""
        x, packed = self.xs[0], self.packs[0][0]
        weight = _random(*next(iter(packed.modules.values())), x.device, x.dtype)
        truth, own = x.float() @ weight.float().t(), F.linear(x, weight).float()
        rounding = _rms(truth.to(x.dtype).float() - truth)
        return max(1.0, _rms(own - truth) / rounding) if rounding else 1.0

    def _reference(self, wide: bool) -> torch.Tensor:
        results = []
        for x, row in zip(self.xs, self.packs, strict=True):
            rows = x.float() if wide else x
            of_row = [formats.by_name(p.format).reference(rows, p, next(iter(p.modules))) for p in row]
            results.append(_flat(torch.cat(of_row, dim=1)))
        return torch.cat(results)


def _rows(m: int, k: int, share: float, setting: Setting) -> torch.Tensor:
    """x [m, k] of normal numbers, of which all but the largest `share` of each row are zero."""
    x = torch.randn(m, k, device=setting.device)
    if share < 1:
        x[x.abs() <= x.abs().kthvalue(k - int(share * k), dim=1, keepdim=True).values] = 0
    return x.to(setting.dtype)


def _rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


def _flat(y: Any) -> torch.Tensor:
    """What a call gave, one tensor or several side by side, as one row of fp32."""
    joined: torch.Tensor = torch.cat(y, dim=1) if isinstance(y, list) else y
    return joined.float().flatten()


def _copy(packed: Packed) -> Packed:
    return replace(packed, tensors={role: tensor.clone() for role, tensor in packed.tensors.items()})


def _laid_out(module: ModuleType, row: list[Packed], device: torch.device) -> list[tuple[Prepared, str]]:
    parts = [(module.prepare(packed, device), next(iter(packed.modules))) for packed in row]
    stacked = module.stack(parts) if len(parts) > 1 else None
    return parts if stacked is None else [(stacked, parts[0][1])]
