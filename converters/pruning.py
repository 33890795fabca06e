"""Setting weights to zero, layer by layer: what `magnitude`, `wanda` and `gblm` share.

A method brings a score for every weight of a linear; the lowest go. The walk sees each layer's inputs as the already
pruned layers before it give them (Wanda, arXiv 2306.11695, section 3) and holds one block beside the model. Masks are
saved block by block, so that a killed search goes on; the model is dense again when it ends.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .. import families
from ..errors import BadParameter, SourceError
from ..spec import Spec
from .calibration import LayerWalk, squares_of_inputs
from .groups import kinds, runs
from .modelling import weight_of
from .record import Record

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Params:
    """What every pruning method takes.

    sparsity: share of the weights to zero, unstructured; default 0.5. pattern: `unstructured`, or N:M, which keeps N
    of every M consecutive inputs (2:4, 4:8) and thereby says the sparsity. layers, modules: only these.
    """

    sparsity: float | None = None
    pattern: str = UNSTRUCTURED
    layers: tuple[int, ...] | None = None
    modules: tuple[str, ...] | None = None

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"sparsity": (0.01, 0.99)}

    def __post_init__(self) -> None:
        found = self.n_of_m
        if self.pattern != UNSTRUCTURED and (found is None or not 0 < found[0] < found[1]):
            raise BadParameter(
                f"pattern={self.pattern} is neither unstructured nor N:M with N from 1 to M - 1, such as 2:4 or 4:8"
            )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise BadParameter(f"sparsity={self.sparsity} is not between 0 and 1; 0.5 zeroes half of the weights")
        if found and self.sparsity not in (None, 1 - found[0] / found[1]):
            raise BadParameter(
                f"pattern={self.pattern} zeroes {1 - found[0] / found[1]:g} of the weights, "
                f"sparsity={self.sparsity} asks for another share; leave sparsity out"
            )

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(weights kept, of so many), or None where any may go."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def share(self) -> float:
        """Of the weights that go, where no pattern says it."""
        return 0.5 if self.sparsity is None else self.sparsity


@dataclass(frozen=True)
class Target:
    """A linear to prune: its module path, and that of the module whose inputs are also its own (q for q, k, v)."""

    path: str
    observed: str
    kind: str


# (target, weight [N, K], squared norm [K] of each input over all calibration tokens) -> scores [N, K]
Score = Callable[[Target, torch.Tensor, torch.Tensor], torch.Tensor]


def targets(model: PreTrainedModel, params: Params) -> dict[int, list[Target]]:
    """The linears to prune, by layer in order. Raises BadParameter for what the model has not, or what cannot be."""
    spec = families.read(model.config.to_dict())
    chosen = kinds(spec, params.modules)
    layers = sorted(run.layers[0] for run in runs(spec, 1, params.layers))
    found = {
        i: [Target(spec.path(i, kind.name), spec.path(i, kind.observed), kind.name) for kind in chosen] for i in layers
    }
    widths = {linear.path: linear.k for linear in spec.linears().values()}
    for target in (target for layer in found.values() for target in layer):
        if not hasattr(model.get_submodule(target.path), "weight"):
            raise BadParameter(f"{target.path} is compressed already; prune first, or choose other layers= or modules=")
        if params.n_of_m and widths[target.path] % params.n_of_m[1]:
            raise BadParameter(
                f"pattern={params.pattern} needs inputs in whole groups of {params.n_of_m[1]}, "
                f"{target.path} has {widths[target.path]}; choose another pattern, or leave it out with modules="
            )
    return found


# --- which weights go ----------------------------------------------------------------------------


def lowest_in_rows(scores: torch.Tensor, params: Params) -> torch.Tensor:
    """True where a weight stays, [N, K]: the int(K * share) lowest of each row go, or the M - N lowest of each group.

    Of equal scores the first go, as in the stable sort of the reference.
    """
    inputs = scores.shape[1]
    kept, size = params.n_of_m or (inputs - int(inputs * params.share), inputs)
    groups = scores.reshape(len(scores), -1, size)
    gone = groups.argsort(dim=-1, stable=True)[..., : size - kept]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, gone, False).view_as(scores)


def lowest_in_matrix(scores: torch.Tensor, params: Params) -> torch.Tensor:
    """True where a weight stays: of the whole matrix those above its int(N K share)-th lowest, ties going with it."""
    if params.n_of_m:
        return lowest_in_rows(scores, params)
    flat = scores.flatten()
    return scores > flat.kthvalue(int(len(flat) * params.share) + 1).values


# --- the walk ------------------------------------------------------------------------------------


class Search:
    """Fills a record with the masks of `targets`, block by block; blocks that it holds are not searched again."""

    def __init__(self, model: PreTrainedModel, record: Record, params: Params, name: str, progress: bool) -> None:
        self.model, self.record, self.params = model, record, params
        self.spec = families.read(model.config.to_dict())
        self.targets = targets(model, params)
        self._bar = partial(tqdm, desc=name, unit="layer", disable=not progress)

    def by_size(self) -> None:
        """Each matrix by the size of its weights alone."""
        for i in self._bar(self.targets):
            self._choose(i, lambda _, weight: weight.abs(), lowest_in_matrix)
        self._finish()

    def by_inputs(self, tokens: torch.Tensor, score: Score) -> None:
        """Each row by a score that looks at the inputs, over the windows `tokens`, int64 [windows, length]."""
        last = max(self.targets)
        if not all(self.record.holds(_part(i)) for i in self.targets):
            walk = LayerWalk(self.model, self.spec, tokens)
            for i in self._bar(range(last + 1)):
                if i in self.targets:
                    self._choose(i, partial(_Inputs(self.model, walk, self.targets[i]).score, score))
                if i < last:
                    with _pruned(self.model, self.spec, _masks(self.record, i) if i in self.targets else {}):
                        walk.run(i)
        self._finish()

    def _choose(
        self,
        i: int,
        score: Callable[[Target, torch.Tensor], torch.Tensor],
        choose: Callable[[torch.Tensor, Params], torch.Tensor] = lowest_in_rows,
    ) -> None:
        if self.record.holds(_part(i)):
            return
        masks, facts = {}, {}
        for target in self.targets[i]:
            scores = score(target, weight_of(self.model, target.path, self.spec.transposed))
            refuse_not_finite(
                scores, f"the scores of {target.path}", "look at its weights, and at the calibration text"
            )
            keep = choose(scores, self.params)
            masks[target.path] = pack_bits(keep)
            facts[target.path] = {"kind": target.kind, "shape": list(keep.shape), "zeroed": int((~keep).sum())}
        self.record.save(_part(i), masks, {"params": asdict(self.params), "modules": facts})

    def _finish(self) -> None:
        self.record.save("plan", {}, {"layers": list(self.targets)})


class _Inputs:
    """What the modules of the walk's next layer read, looked at when the first score asks; the walk stays there."""

    def __init__(self, model: PreTrainedModel, walk: LayerWalk, layer: Sequence[Target]) -> None:
        self.walk, self.modules = walk, {t.observed: model.get_submodule(t.observed) for t in layer}

    def score(self, score: Score, target: Target, weight: torch.Tensor) -> torch.Tensor:
        """The score of a module's weights under its inputs."""
        return score(target, weight, self._squares[target.observed])

    @cached_property
    def _squares(self) -> dict[str, torch.Tensor]:
        before, at = list(self.walk.hidden), self.walk.at
        with squares_of_inputs(self.modules) as squares:
            self.walk.run(at)
        self.walk.hidden, self.walk.at = before, at
        return squares


def refuse_not_finite(values: torch.Tensor, what: str, hint: str) -> None:
    """Raises SourceError that names the first NaN or infinity."""
    bad = ~torch.isfinite(values)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise SourceError(f"{what} hold {values[tuple(place)].item()} at {place}; {hint}")


# --- masks ---------------------------------------------------------------------------------------


def pack_bits(keep: torch.Tensor) -> torch.Tensor:
    """bool [N, K] as uint8 [N, ceil(K / 8)], the first input in the lowest bit."""
    return torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))


def unpack_bits(bits: torch.Tensor, inputs: int) -> torch.Tensor:
    """bool [N, inputs] from `pack_bits`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=inputs, bitorder="little")).bool()


def _part(i: int) -> str:
    return f"layer-{i:04d}"


def _masks(record: Record, i: int) -> dict[str, torch.Tensor]:
    bits, modules = record.tensors(_part(i)), record.facts(_part(i))["modules"]
    return {path: unpack_bits(bits[path], facts["shape"][1]) for path, facts in modules.items()}


@contextlib.contextmanager
def _pruned(model: nn.Module, spec: Spec, masks: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While open, these linears have their zeros; their dense weights wait outside the model."""
    dense = {path: model.get_parameter(f"{path}.weight").data for path in masks}
    _zero(model, spec, masks)
    try:
        yield
    finally:
        for path, weight in dense.items():
            model.get_parameter(f"{path}.weight").data = weight


def _zero(model: nn.Module, spec: Spec, masks: Mapping[str, torch.Tensor]) -> None:
    for path, keep in masks.items():
        parameter = model.get_parameter(f"{path}.weight")
        parameter.data = parameter.data.masked_fill(~(keep.t() if spec.transposed else keep), 0)


def apply(model: PreTrainedModel, record: Record) -> None:
    """Zero the weights that the record's masks leave out. Raises BadParameter where a mask is not of this model."""
    spec = families.read(model.config.to_dict())
    for i in record.facts("plan")["layers"]:
        masks = _masks(record, i)
        for path, keep in masks.items():
            shape = tuple(weight_of(model, path, spec.transposed).shape)
            if shape != tuple(keep.shape):
                raise BadParameter(f"the mask of {path} is {list(keep.shape)}, its weight {list(shape)}; search again")
        _zero(model, spec, masks)


def summary(record: Record) -> dict[str, Any]:
    """Share of the weights that the masks zero: of all pruned modules, and of each kind."""
    zeroed: dict[str, int] = {}
    total: dict[str, int] = {}
    for i in record.facts("plan")["layers"]:
        for facts in record.facts(_part(i))["modules"].values():
            zeroed[facts["kind"]] = zeroed.get(facts["kind"], 0) + facts["zeroed"]
            total[facts["kind"]] = total.get(facts["kind"], 0) + facts["shape"][0] * facts["shape"][1]
    kinds_of = {kind: zeroed[kind] / total[kind] for kind in total}
    return {"zeroed": sum(zeroed.values()) / sum(total.values()), "kinds": kinds_of}
