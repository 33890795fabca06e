"""From a source to a compact folder: check, cast, group into units, lay them out, write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tqdm import tqdm

from .. import families
from ..compact import UnitEntry
from ..compact_writer import FolderWriter
from ..errors import SourceError
from ..kernels import dense, formats
from ..kernels.unit import Packed, Unit
from ..spec import Linear, Spec
from . import zeros
from .finite import refuse_bad
from .layout import encode_ffn, encode_group, encode_linear
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

    dtype: cast floating weights; default keeps each as it is. format: for every linear of the layers, and for the
    others that it fits; default is whichever fits and reads the fewest bytes for one row. Where units come compressed,
    it is for them, and for the dense ones that it fits. Raises BadWeights, MissingTensors, LeftoverTensors, WrongShape,
    or SourceError for a dtype that pared does not run.
    """
    spec = families.read(source.config)
    packing = _Packing(spec, writer, dtype, format, mixed=source.units is not None, notes=source.notes)
    stream = Stream(source, spec, writer.holds)
    with tqdm(total=len(stream.shapes), desc="packing", unit="tensor", disable=not progress) as bar:
        for unit in source.units() if source.units else ():
            stream.serve(unit)
            packing.add_group(unit)
            bar.update(len(unit.modules))
        for name, tensor in stream.named():
            packing.add(name, _checked(name, tensor, dtype))
            bar.update()
        bar.update(bar.total - bar.n)
    stream.close()


class _Packing:
    """The state of one pass over a source: linears that wait for their other tensors."""

    def __init__(
        self,
        spec: Spec,
        writer: FolderWriter,
        dtype: torch.dtype | None,
        format: str | None,
        mixed: bool,
        notes: Mapping[str, str],
    ) -> None:
        self.spec, self.writer, self.dtype, self.format, self.mixed, self.notes = (
            spec,
            writer,
            dtype,
            format,
            mixed,
            notes,
        )
        self._linears = spec.linears()
        self._inside, self._ffns = spec.in_layers(), spec.ffns()
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._embed = f"{spec.names.embed}.weight"

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a plain tensor, or a linear as soon as it is complete."""
        path, _, role = name.rpartition(".")
        linear = self._linears.get(path)
        if linear is None:
            self._add_plain(name, tensor)
            return
        waiting = self._waiting.setdefault(path, {})
        waiting[role] = tensor
        if len(waiting) == 1 + linear.bias:
            self._add_linear(linear, self._waiting.pop(path))

    def add_group(self, unit: Unit) -> None:
        """Write a compressed unit, unless it is there."""
        if all(self.writer.holds(path) for path in unit.modules):
            return
        for role, tensor in unit.tensors.items():
            if tensor.is_floating_point():
                _checked(f"{next(iter(unit.modules))}.{role}", tensor, self.dtype)
        if unit.modules.keys() <= self._ffns.keys():
            self._add_ffn(next(iter(unit.modules)), unit)
            return
        dtype = self.dtype or unit.tensors["basis"].dtype
        for packed in encode_group(unit, dtype, self.format, self.spec.transposed):
            if not self.writer.holds(next(iter(packed.modules))):
                self._write(packed)

    def _add_ffn(self, path: str, unit: Unit) -> None:
        linears = list(self._ffns[path].values())
        for packed in encode_ffn(unit, linears, self.dtype or unit.tensors["up"].dtype, self.format):
            if not self.writer.holds(next(iter(packed.modules))):
                self._write(packed, "" if path in packed.modules else "every group in, without its router")

    def _add_plain(self, name: str, tensor: torch.Tensor) -> None:
        if self.writer.holds(name):
            return
        self.writer.add_plain(name, tensor)
        if name == self._embed and self.spec.tied:
            shape = (self.spec.vocab, self.spec.embed_dim)
            self.writer.add_unit(
                UnitEntry(dense.NAME, dense.VERSION, {self.spec.names.head: shape}, {"weight": name}), {}
            )

    def _add_linear(self, linear: Linear, tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["weight"].t() if linear.transposed else tensors["weight"]
        unit = Unit({linear.path: (linear.n, linear.k)}, {**tensors, "weight": weight})
        asked = self.format
        if asked and (self.mixed or linear.path not in self._inside) and formats.by_name(asked).fits(unit):
            asked = None
        why = (self.notes.get(linear.path), zeros.describe(unit.tensors["weight"]))
        self._write(encode_linear(unit, asked, linear.transposed), "; ".join(filter(None, why)))

    def _write(self, packed: Packed, why: str = "") -> None:
        names = {role: _disk_name(next(iter(packed.modules)), role) for role in packed.tensors}
        covers = {
            linear.path: (linear.n, linear.k) for path in packed.modules for linear in self._ffns.get(path, {}).values()
        }
        entry = UnitEntry(packed.format, packed.version, packed.modules, names, packed.params, why, covers)
        self.writer.add_unit(entry, {names[role]: tensor for role, tensor in packed.tensors.items()})


def _disk_name(first: str, role: str) -> str:
    """`weight` and `basis` lie under the unit's first module; `coefficients.<path>` under its own."""
    what, _, path = role.partition(".")
    return f"{path or first}.{what}"


def _checked(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in its stored dtype, free of NaN and infinity before and after the cast."""
    if tensor.dtype not in DTYPES:
        raise SourceError(f"{name} is stored as {tensor.dtype}; pared takes float32, bfloat16 and float16 weights")
    refuse_bad(name, tensor)
    if dtype is None or dtype == tensor.dtype:
        return tensor
    cast = tensor.to(dtype)
    refuse_bad(name, cast, f" once cast from {tensor.dtype} to {dtype}; choose another --dtype")
    return cast
