"""The tensors of a source under this model's names: each known, of the right shape, once, and none missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..errors import LeftoverTensors, MissingTensors, SourceError, WrongShape
from ..kernels.shared_basis import BIAS
from ..kernels.unit import Unit
from ..spec import Spec
from .sources.source import Source


class Stream:
    """One pass over a source. `shapes`: every tensor of a checkpoint of this model, by name.

    finished(name): True for what need not be read again, by the name of the plain tensor or module path.
    """

    def __init__(self, source: Source, spec: Spec, finished: Callable[[str], bool] = lambda _: False) -> None:
        self.source, self.spec = source, spec
        self.shapes = disk_shapes(spec)
        self._linears, self._ffns = spec.linears(), spec.ffns()
        self._finished = finished
        self._met: set[str] = set()
        self._embed = f"{spec.names.embed}.weight"
        self._embedding: torch.Tensor | None = None

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors in the source's order. Raises LeftoverTensors, WrongShape, SourceError."""
        for name, tensor in self.source.tensors(self._skip):
            ours = self.spec.canonical(name)
            if ours is None:
                continue
            if ours not in self.shapes:
                raise LeftoverTensors(f"{self.source.path} holds {name}, which its config.json has no place for")
            if tuple(tensor.shape) != self.shapes[ours]:
                raise WrongShape(
                    f"{name} in {self.source.path} is {list(tensor.shape)}, "
                    f"its config.json says {list(self.shapes[ours])}"
                )
            if self._is_new(name, ours, tensor):
                yield ours, tensor

    def serve(self, unit: Unit) -> None:
        """Count the linears that a compressed unit stands for as met. Raises LeftoverTensors, WrongShape."""
        for path, shape in unit.modules.items():
            ffn = self._ffns.get(path)
            for linear in ffn.values() if ffn else (self._linears.get(path),):
                if linear is None or f"{linear.path}.weight" in self._met:
                    why = "its config.json has no place for" if linear is None else "has weights already"
                    raise LeftoverTensors(f"{self.source.path} holds compressed weights of {path}, which {why}")
                if linear.bias and (ffn or BIAS + path in unit.tensors):
                    self._met.add(f"{linear.path}.bias")
                self._met.add(f"{linear.path}.weight")
            self._check(path, shape, unit)

    def _check(self, path: str, shape: tuple[int, int], unit: Unit) -> None:
        """Raises WrongShape where a unit's module has not the widths that the config gives it."""
        if path in self._ffns:
            *_, down = self._ffns[path].values()
            found, wanted = [*shape, len(unit.tensors["up"])], [down.n, down.n, down.k]
        else:
            found, wanted = list(shape), [self._linears[path].n, self._linears[path].k]
        if found != wanted:
            raise WrongShape(f"{path} in {self.source.path} is {found}, its config.json says {wanted}")

    def close(self) -> None:
        """Hold what was met against what the model needs. Raises MissingTensors."""
        if missing := sorted(self.shapes.keys() - self._met):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise MissingTensors(f"{self.source.path} holds no {missing[0]}{more}, which its config.json asks for")

    def _skip(self, name: str) -> bool:
        """True for what an earlier run wrote. A tied embedding is read again, to compare its second copy."""
        ours = self.spec.canonical(name)
        if ours is None or (ours == self._embed and self.spec.tied):
            return False
        if not self._finished(ours if ours in self.spec.plain() else ours.rpartition(".")[0]):
            return False
        self._met.add(ours)
        return True

    def _is_new(self, name: str, ours: str, tensor: torch.Tensor) -> bool:
        """False for the second copy of a tied head, which must be the embedding once more."""
        if ours in self._met:
            if self._embedding is None or not torch.equal(tensor, self._embedding):
                raise SourceError(
                    f"{name} stands for {ours} a second time and differs; "
                    "if the head is not tied, set tie_word_embeddings to false in config.json"
                )
            return False
        self._met.add(ours)
        if ours == self._embed and self.spec.tied:
            self._embedding = tensor
        return True


def disk_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this model, by name."""
    shapes = dict(spec.plain())
    for path, linear in spec.linears().items():
        shapes[f"{path}.weight"] = (linear.k, linear.n) if linear.transposed else (linear.n, linear.k)
        if linear.bias:
            shapes[f"{path}.bias"] = (linear.n,)
    return shapes
