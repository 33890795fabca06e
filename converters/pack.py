"""From a stream of tensors to a compact folder: name, check, cast, group into units, choose formats, write."""

from __future__ import annotations

from types import ModuleType

import torch
from tqdm import tqdm

from .. import families
from ..compact import UnitEntry
from ..compact_writer import FolderWriter
from ..errors import BadWeights, SourceError
from ..kernels import dense, formats
from ..kernels.unit import Packed, Unit
from ..spec import Linear, Spec
from .sources.source import Source
from .stream import Stream

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
    spec = families.read(source.config)
    packing, stream = _Packing(spec, writer, format), Stream(source, spec, writer.holds)
    with tqdm(total=len(stream.shapes), desc="packing", unit="tensor", disable=not progress) as bar:
        for name, tensor in stream.named():
            packing.add(name, _checked(name, tensor, dtype))
            bar.update()
        bar.update(bar.total - bar.n)
    stream.close()


class _Packing:
    """The state of one pass over a source: units that wait for their other tensors."""

    def __init__(self, spec: Spec, writer: FolderWriter, format: str | None) -> None:
        self.spec, self.writer, self.format = spec, writer, format
        self._linears = spec.linears()
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._embed = f"{spec.names.embed}.weight"

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
