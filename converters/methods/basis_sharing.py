"""Basis Sharing (arXiv 2410.03765): consecutive layers write each kind of weight over one common basis.

`search` walks the calibration text through the dense model, a run of layers at a time: it collects the Gram
matrices of their inputs, factorises each group and saves it. From 40 % on a second walk, through the
compressed layers, refits the coefficients to the inputs that these really see (paper, 3.3). `apply` puts
the factors into the model. A group of one is SVD-LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ... import families
from ...spec import Spec
from ..calibration import Calibration, LayerWalk, gram_of_inputs
from ..groups import Group, Kind, Run, kinds, runs
from ..low_rank import Factors, factorize, pivoted_rank, rank, refit, square_root, weighted_loss
from ..modelling import BasisLinear, replace_linear, weight_of
from ..record import Record

NAME = "basis_sharing"
REFIT_FROM = 40  # percent
Grams = Callable[[Run, Sequence[str]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Params:
    """ratio: percent of the block linears' weights to take away. group: layers that share. samples x length: tokens.

    share: the paper's rule, or whichever of shared and separate has the smaller weighted error at equal bytes.
    ranks: the paper's, which count a stored basis in full, or the larger ones that pivoted storage has room for.
    refit: auto does it from 40 % on. layers, modules: only these.
    """

    ratio: float = 20.0
    group: int = 2
    share: Literal["paper", "auto"] = "paper"
    ranks: Literal["paper", "pivoted"] = "paper"
    samples: int = 256
    length: int = 2048
    seed: int = 2023
    refit: Literal["auto", "yes", "no"] = "auto"
    layers: tuple[int, ...] | None = None
    modules: tuple[str, ...] | None = None

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "ratio": (1, 99),
        "group": (1, 1024),
        "samples": (1, 1 << 20),
        "length": (2, 1 << 20),
        "seed": (0, 2**63 - 1),
    }

    @property
    def refits(self) -> bool:
        return self.refit == "yes" or (self.refit == "auto" and self.ratio >= REFIT_FROM)


def search(
    model: PreTrainedModel, calibration: Calibration, record: Record, params: Params, progress: bool = True
) -> None:
    """Fill `record` with the factors of every run of layers; what it holds already is kept. The model stays dense.

    model: frozen, in the dtype to compute in. Raises BadParameter for layers or modules that it has not, SourceError
    for too little text.
    """
    spec = families.read(model.config.to_dict())
    tokens = calibration.windows(params.samples, params.length, params.seed)
    plan = _runs(model, spec, params)
    if not all(record.holds(_part(run)) for run in plan):
        factorize_runs(model, spec, params, _walk_grams(model, spec, tokens), record, progress)
    if params.refits and not all(record.holds(_part(run, "refit")) for run in plan):
        refit_runs(model, spec, params, tokens, record, progress)
    record.save("plan", {}, {"parts": [_part(run, "refit") if params.refits else _part(run) for run in plan]})


def apply(model: PreTrainedModel, record: Record) -> None:
    """Replace the linears that the record holds factors for; members of a group share one basis Parameter."""
    for part in record.facts("plan")["parts"]:
        _put(model, _modules(model, record, part))


def summary(record: Record) -> dict[str, Any]:
    """Relative activation-weighted error per kind of module, before any refit, and what is shared."""
    sums: dict[str, list[float]] = {}
    shared: dict[str, int] = {}
    for part in record.facts("plan")["parts"]:
        for group in record.facts(part.removesuffix("-refit"))["groups"]:
            lost, total = sums.get(group["kind"], (0.0, 0.0))
            sums[group["kind"]] = [lost + group["lost"], total + group["total"]]
            shared[group["kind"]] = shared.get(group["kind"], 0) + (len(group["paths"]) > 1)
    errors = {kind: (lost / total) ** 0.5 if total else 0.0 for kind, (lost, total) in sums.items()}
    return {"error": errors, "shared": shared}


# --- factors -------------------------------------------------------------------------------------


def _walk_grams(model: PreTrainedModel, spec: Spec, tokens: torch.Tensor) -> Grams:
    """Gram matrices from one walk through the dense model; runs must be asked for in order."""
    walk = LayerWalk(model, spec, tokens)

    def grams(run: Run, observed: Sequence[str]) -> dict[str, torch.Tensor]:
        found = _grams_of(model, observed, walk, range(walk.at, run.layers[-1] + 1))
        return {path: gram / tokens.numel() for path, gram in found.items()}

    return grams


def factorize_runs(
    model: PreTrainedModel, spec: Spec, params: Params, grams: Grams, record: Record, progress: bool
) -> None:
    """Factorise run after run, one kind at a time, and save each run. grams(run, paths): mean of x x^T per path."""
    chosen = kinds(spec, params.modules)
    for run in tqdm(_runs(model, spec, params), "basis sharing", unit="run", disable=not progress):
        if record.holds(_part(run)):
            grams(run, ())
            continue
        observed = dict.fromkeys(path for kind in chosen for path in run.group(spec, kind).observed)
        found = _Inputs(grams(run, list(observed)))
        done = [pair for kind in chosen for pair in _factors(model, spec, params, run, kind, found)]
        facts = [_facts(group, factors) for group, factors in done]
        record.save(_part(run), _tensors(done, found), {"params": asdict(params), "groups": facts})


def _factors(
    model: PreTrainedModel, spec: Spec, params: Params, run: Run, kind: Kind, inputs: _Inputs
) -> list[tuple[Group, Factors]]:
    """The factors of one kind in one run: of one group or of several, by the chosen rule."""
    rules = (kind.shared,) if params.share == "paper" else (True, False)
    plans = [run.groups(spec, kind, shared) for shared in rules]
    found = [[(g, _factorize(model, spec, params, g, inputs)) for g in groups] for groups in plans]
    if len(found) == 1:
        return found[0]
    return min(found, key=lambda pairs: sum(_own_loss(model, spec, g, f, inputs.grams) for g, f in pairs))


def _factorize(model: PreTrainedModel, spec: Spec, params: Params, group: Group, inputs: _Inputs) -> Factors:
    weights = [weight_of(model, path, spec.transposed).double() for path in group.paths]
    n, k = weights[0].shape
    r = (rank if params.ranks == "paper" else pivoted_rank)(params.ratio / 100, n, k, group.size)
    root = inputs.root(group.observed) if n * len(weights) > k else None
    return factorize(weights, inputs.pooled(group.observed), r, root)


class _Inputs:
    """The Gram matrices of a run. What several kinds need (q, k and v; gate and up) is computed once."""

    def __init__(self, grams: dict[str, torch.Tensor]) -> None:
        self.grams = grams
        self._roots: dict[tuple[str, ...], torch.Tensor] = {}

    def pooled(self, observed: Sequence[str]) -> torch.Tensor:
        """Of the inputs of these modules taken together."""
        first, *others = (self.grams[path] for path in observed)
        return sum(others, start=first)

    def root(self, observed: tuple[str, ...]) -> torch.Tensor:
        """Its symmetric square root."""
        if observed not in self._roots:
            self._roots[observed] = square_root(self.pooled(observed))
        return self._roots[observed]


def _own_loss(
    model: PreTrainedModel, spec: Spec, group: Group, factors: Factors, grams: dict[str, torch.Tensor]
) -> float:
    """Weighted loss with each module under its own inputs, so that shared and separate can be compared."""
    return sum(
        weighted_loss(weight_of(model, path, spec.transposed).double(), c @ factors.basis.t(), grams[observed])
        for path, observed, c in zip(group.paths, group.observed, factors.coefficients, strict=True)
    )


# --- refit ---------------------------------------------------------------------------------------


def refit_runs(
    model: PreTrainedModel, spec: Spec, params: Params, tokens: torch.Tensor, record: Record, progress: bool
) -> None:
    """Refit the coefficients, run by run, under what the dense model and the one refitted so far give each run.

    The paper fits to the compressed model's inputs alone. Where these have drifted far that teaches a module to pass
    on what its basis had filtered out; half of each was the better fit (bench/LOG.md).
    """
    dense_walk, walk = (LayerWalk(model, spec, tokens) for _ in range(2))
    for run in tqdm(_runs(model, spec, params), "refitting", unit="run", disable=not progress):
        part, dense = _part(run), {path: model.get_submodule(path) for path in _paths(record, run)}
        layers, before = range(dense_walk.at, run.layers[-1] + 1), list(walk.hidden)
        if record.holds(_part(run, "refit")):
            dense_walk.run_all(layers)
        else:
            weights = {path: weight_of(model, path, spec.transposed) for path in dense}
            facts = record.facts(part)
            observed = dict.fromkeys(path for group in facts["groups"] for path in group["observed"])
            wanted = _grams_of(model, observed, dense_walk, layers)
            _put(model, _modules(model, record, part))
            found = _grams_of(model, observed, walk, layers)
            grams = {path: wanted[path] + found[path] for path in observed}
            record.save(_part(run, "refit"), _refitted(record.tensors(part), facts, weights, grams), facts)
        _put(model, dense)
        _put(model, _modules(model, record, _part(run, "refit")))
        walk.hidden = before
        walk.run_all(layers)
        _put(model, dense)


def _grams_of(
    model: PreTrainedModel, observed: Iterable[str], walk: LayerWalk, layers: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Take a walk through layers, and sum X^T X over what these modules see of it."""
    with gram_of_inputs({path: model.get_submodule(path) for path in observed}) as grams:
        walk.run_all(layers)
    return grams


def _put(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        replace_linear(model, path, module)


def _refitted(
    tensors: dict[str, torch.Tensor],
    facts: dict[str, Any],
    weights: dict[str, torch.Tensor],
    grams: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """A run's tensors with new coefficients."""
    for g, group in enumerate(facts["groups"]):
        gram = _Inputs(grams).pooled(group["observed"])
        targets = [weights[path].double() for path in group["paths"]]
        found = refit(targets, tensors[f"{g}.basis"].double().t(), gram)
        tensors |= {f"{g}.coefficients.{j}": c.float().contiguous() for j, c in enumerate(found)}
    return tensors


# --- parts of the record -------------------------------------------------------------------------


def _runs(model: PreTrainedModel, spec: Spec, params: Params) -> list[Run]:
    """The runs to compress; a method that removed blocks leaves `layer_origins`, their former indices, on the model."""
    return runs(spec, params.group, params.layers, getattr(model, "layer_origins", None))


def _part(run: Run, step: str = "") -> str:
    return f"layers-{run.layers[0]:04d}-{run.layers[-1]:04d}" + (f"-{step}" if step else "")


def _paths(record: Record, run: Run) -> list[str]:
    return [path for group in record.facts(_part(run))["groups"] for path in group["paths"]]


def _facts(group: Group, factors: Factors) -> dict[str, Any]:
    return asdict(group) | {"rank": factors.rank, "lost": factors.lost, "total": factors.total}


def _tensors(done: list[tuple[Group, Factors]], inputs: _Inputs) -> dict[str, torch.Tensor]:
    """Group g: `g.basis` [R, K], `g.coefficients.j` [N, R] per module, `g.scale` [K] the RMS of the inputs; fp32."""
    tensors: dict[str, torch.Tensor] = {}
    for g, (group, factors) in enumerate(done):
        mean = inputs.pooled(group.observed).diagonal() / len(group.paths)
        tensors[f"{g}.basis"] = factors.basis.t().float().contiguous()
        tensors[f"{g}.scale"] = mean.clamp(min=0).sqrt().float()
        tensors |= {f"{g}.coefficients.{j}": c.float().contiguous() for j, c in enumerate(factors.coefficients)}
    return tensors


def _modules(model: PreTrainedModel, record: Record, part: str) -> dict[str, nn.Module]:
    """The compressed modules of a part, by the paths they replace, in the model's dtype, with the dense biases."""
    tensors, made = record.tensors(part), dict[str, nn.Module]()
    for g, group in enumerate(record.facts(part)["groups"]):
        basis = nn.Parameter(tensors[f"{g}.basis"].to(model.dtype), requires_grad=False)
        for j, path in enumerate(group["paths"]):
            bias = model.get_submodule(path).bias if hasattr(model.get_submodule(path), "bias") else None
            coefficients = tensors[f"{g}.coefficients.{j}"].to(model.dtype)
            made[path] = BasisLinear(basis, coefficients, bias, tensors[f"{g}.scale"])
    return made
