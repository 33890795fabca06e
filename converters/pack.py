"""From a stream of tensors to a compact folder: name, check, cast, group into units, choose formats, write."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from tqdm import tqdm

from .. import families
from ..compact import UnitEntry
from ..compact_writer import FolderWriter
from ..errors import BadWeights, LeftoverTensors, MissingTensors, SourceError, WrongShape
from ..kernels import dense, formats
from ..kernels.unit import Packed, Unit
from ..spec import Linear, Spec
from .sources.source import Source

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pack(
    source: Source,
    writer: FolderWriter,
    dtype: torch.dtype | None = None,
    format: str | None = None,
    progress: bool = True,
) -> None:
    """Write every weight of `source`; `writer` skips what an interrupted run has finished.

    dtype: cast floating weights; default keeps each as it is. format: for every linear module; default is
    whichever fits and reads the fewest bytes for one row. Raises BadWeights, MissingTensors,
    LeftoverTensors, WrongShape, or SourceError for a dtype that pared does not run.
    """
    packing = _Packing(families.read(source.config), writer, format)
    with tqdm(total=len(packing.shapes), desc="packing", unit="tensor", disable=not progress) as bar:
        for name, tensor in packing.named(source):
            packing.add(name, _checked(name, tensor, dtype))
            bar.update()
        bar.update(bar.total - bar.n)
    packing.close(source)


class _Packing:
    """The state of one pass over a source: units that wait for their other tensors, names already met."""

    def __init__(self, spec: Spec, writer: FolderWriter, format: str | None) -> None:
        self.spec, self.writer, self.format = spec, writer, format
        self.shapes = _disk_shapes(spec)
        self._linears = spec.linears()
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._met: set[str] = set()
        self._embed = f"{spec.names.embed}.weight"
        self._embedding: torch.Tensor | None = None

    def named(self, source: Source) -> Iterator[tuple[str, torch.Tensor]]:
        """The stream under this model's names, each of the right shape, each once."""
        for name, tensor in source.tensors(self._skip):
            ours = self.spec.canonical(name)
            if ours is None:
                continue
            if ours not in self.shapes:
                raise LeftoverTensors(f"{source.path} holds {name}, which its config.json has no place for")
            if tuple(tensor.shape) != self.shapes[ours]:
                raise WrongShape(
                    f"{name} in {source.path} is {list(tensor.shape)}, its config.json says {list(self.shapes[ours])}"
                )
            if self._is_new(name, ours, tensor):
                yield ours, tensor

    def _skip(self, name: str) -> bool:
        """True for what an earlier run wrote. A tied embedding is read again, to compare its second copy."""
        ours = self.spec.canonical(name)
        if ours is None or (ours == self._embed and self.spec.tied):
            return False
        if not self.writer.holds(ours if ours in self.spec.plain() else ours.rpartition(".")[0]):
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

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a plain tensor, or a unit as soon as it is complete."""
        path, _, role = name.rpartition(".")
        linear = self._linears.get(path)
        if linear is None:
            self._add_plain(name, tensor)
            return
        waiting = self._waiting.setdefault(path, {})
        waiting[role] = tensor
        if len(waiting) == 1 + linear.bias:
            self._add_unit(linear, self._waiting.pop(path))

    def _add_plain(self, name: str, tensor: torch.Tensor) -> None:
        if self.writer.holds(name):
            return
        self.writer.add_plain(name, tensor)
        if name == self._embed and self.spec.tied:
            shape = (self.spec.vocab, self.spec.embed_dim)
            self.writer.add_unit(
                UnitEntry(dense.NAME, dense.VERSION, {self.spec.names.head: shape}, {"weight": name}), {}
            )

    def _add_unit(self, linear: Linear, tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["weight"].t() if linear.transposed else tensors["weight"]
        unit = Unit({linear.path: (linear.n, linear.k)}, {**tensors, "weight": weight})
        packed = _encode(unit, self.format, linear.transposed)
        names = {role: f"{linear.path}.{role}" for role in packed.tensors}
        entry = UnitEntry(packed.format, packed.version, packed.modules, names, packed.params)
        self.writer.add_unit(entry, {names[role]: tensor for role, tensor in packed.tensors.items()})

    def close(self, source: Source) -> None:
        """Hold what was met against what the model needs."""
        if missing := sorted(self.shapes.keys() - self._met):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise MissingTensors(f"{source.path} holds no {missing[0]}{more}, which its config.json asks for")


def _disk_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this model, by name."""
    shapes = dict(spec.plain())
    for path, linear in spec.linears().items():
        shapes[f"{path}.weight"] = (linear.k, linear.n) if linear.transposed else (linear.n, linear.k)
        if linear.bias:
            shapes[f"{path}.bias"] = (linear.n,)
    return shapes


def _encode(unit: Unit, name: str | None, transposed: bool) -> Packed:
    """In the named format, or in the fitting one that reads the fewest bytes; the first wins a tie."""
    candidates = (formats.by_name(name),) if name else formats.FORMATS
    reasons = {module.NAME: module.fits(unit) for module in candidates}
    fitting = [module for module in candidates if reasons[module.NAME] is None]
    if not fitting:
        why = "; ".join(f"{format}: {reason}" for format, reason in reasons.items())
        raise SourceError(f"{next(iter(unit.modules))} fits no format ({why}); a --dtype for all weights may help")
    packs = [_encode_as(module, unit, transposed) for module in fitting]
    return min(packs, key=lambda packed: formats.by_name(packed.format).traffic(packed, 1).weight_bytes)


def _encode_as(module: ModuleType, unit: Unit, transposed: bool) -> Packed:
    """Only dense keeps a checkpoint's own orientation; the other formats store [N, K] in layouts of their own."""
    return module.encode(unit, transposed=True) if transposed and module is dense else module.encode(unit)


def _checked(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in its stored dtype, free of NaN and infinity before and after the cast."""
    if tensor.dtype not in DTYPES:
        raise SourceError(f"{name} is stored as {tensor.dtype}; pared takes float32, bfloat16 and float16 weights")
    _refuse_bad(name, tensor, "")
    if dtype is None or dtype == tensor.dtype:
        return tensor
    cast = tensor.to(dtype)
    _refuse_bad(name, cast, f" once cast from {tensor.dtype} to {dtype}; choose another --dtype")
    return cast


def _refuse_bad(name: str, tensor: torch.Tensor, context: str) -> None:
    low, high = torch.aminmax(tensor)  # one pass without temporaries; NaN reaches both
    if not (torch.isfinite(low) and torch.isfinite(high)):
        index = tuple(torch.nonzero(~torch.isfinite(tensor))[0].tolist())
        raise BadWeights(f"{name}{list(index)} is {tensor[index].item()}{context}")
