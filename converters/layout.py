"""How each unit is stored: of everything exact that fits, what reads the fewest bytes for one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch

from ..errors import SourceError
from ..kernels import dense, formats, routed_ffn, shared_basis
from ..kernels.shared_basis import BIAS, COEFFICIENTS
from ..kernels.unit import FP32_ROLES, Packed, Unit
from ..spec import Linear

TIE = 1.02
"""Of formats that read so nearly the same the first of LINEAR is taken: it needs less arithmetic."""


def encode_linear(unit: Unit, format: str | None, transposed: bool) -> Packed:
    """A dense linear in the named format, or in the fitting one that reads the fewest bytes."""
    candidates = (formats.by_name(format),) if format else formats.LINEAR
    unsigned = _unsigned_zeros(unit)
    units = {module: unit if module is dense else unsigned for module in candidates}
    reasons = {module.NAME: module.fits(units[module]) for module in candidates}
    fitting = [module for module in candidates if reasons[module.NAME] is None]
    if not fitting:
        why = "; ".join(f"{format}: {reason}" for format, reason in reasons.items())
        raise SourceError(f"{next(iter(unit.modules))} fits no format ({why}); a --dtype for all weights may help")
    packs = [_encode_as(module, units[module], transposed) for module in fitting]
    sizes = [formats.by_name(packed.format).traffic(packed, 1).weight_bytes for packed in packs]
    return next(packed for packed, size in zip(packs, sizes, strict=True) if size <= TIE * min(sizes))


def _unsigned_zeros(unit: Unit) -> Unit:
    """-0.0 as 0.0: what a mask leaves of a negative weight that it multiplies, and no product tells them apart."""
    return Unit(unit.modules, {**unit.tensors, "weight": unit.tensors["weight"] + 0})


def _encode_as(module: ModuleType, unit: Unit, transposed: bool) -> Packed:
    """Only dense keeps a checkpoint's own orientation; the other formats store [N, K] in layouts of their own."""
    return module.encode(unit, transposed=True) if transposed and module is dense else module.encode(unit)


def encode_group(unit: Unit, dtype: torch.dtype, format: str | None, transposed: bool) -> list[Packed]:
    """A basis group, as the product of its factors (a pack for each module), factored or pivoted; all in `dtype`.

    The unit may have `scale` [K], the RMS of its inputs, which guides pivoting. Nothing is rounded to `dtype`
    before it is laid out.
    """
    tensors = dict(unit.tensors)
    scale = tensors.pop("scale", None)
    unit = Unit(unit.modules, tensors)
    if reason := shared_basis.fits(unit):
        raise SourceError(f"{next(iter(unit.modules))}: {reason}")
    sizes = layout_sizes(unit, dtype.itemsize)
    allowed = {None: list(sizes), dense.NAME: ["dense"], shared_basis.NAME: ["factored", "pivoted"]}.get(format, [])
    if not allowed:
        raise SourceError(f"{next(iter(unit.modules))} is a basis and coefficients, which {format} does not store")
    best = min(allowed, key=sizes.__getitem__)
    if best == "dense":
        return [dense.encode(_cast(part, dtype), transposed=transposed) for part in _products(unit)]
    if best == "pivoted":
        inputs = next(iter(unit.modules.values()))[1]
        unit = shared_basis.pivot(unit, torch.ones(inputs) if scale is None else scale)
    return [shared_basis.encode(_cast(unit, dtype))]


def encode_ffn(unit: Unit, linears: Sequence[Linear], dtype: torch.dtype, format: str | None) -> list[Packed]:
    """A routed FFN, its matrices in `dtype` and its router in fp32; as dense it is its `linears`, every group in."""
    cast = {role: tensor if role in FP32_ROLES else tensor.to(dtype) for role, tensor in unit.tensors.items()}
    unit = replace(unit, tensors=cast)
    if format == dense.NAME:
        return [dense.encode(part, transposed=linears[0].transposed) for part in _without_router(unit, linears)]
    path = next(iter(unit.modules))
    if format not in (None, routed_ffn.NAME):
        raise SourceError(f"{path} is a routed FFN, which {format} does not store; leave --format out")
    if reason := routed_ffn.fits(unit):
        raise SourceError(f"{path}: {reason}")
    return [routed_ffn.encode(unit)]


def _without_router(unit: Unit, linears: Sequence[Linear]) -> list[Unit]:
    """The linears [N, K] of an FFN in the order of its groups; gate and up are one where the family has them so."""
    *ins, down = linears
    found = [("down", down)] if len(ins) < 2 else [("gate", ins[0]), ("up", ins[1]), ("down", down)]
    parts = {linear.path: unit.tensors[role] for role, linear in found}
    biases = {linear.path: unit.tensors[f"{role}_bias"] for role, linear in found if linear.bias}
    if len(ins) == 1:
        roles = [role for role in ("gate", "up") if role in unit.tensors]
        parts = {ins[0].path: torch.cat([unit.tensors[role] for role in roles])} | parts
        if ins[0].bias:
            biases[ins[0].path] = torch.cat([unit.tensors[f"{role}_bias"] for role in roles])
    return [
        Unit(
            {path: (weight.shape[0], weight.shape[1])},
            {"weight": weight} | ({"bias": biases[path]} if path in biases else {}),
        )
        for path, weight in parts.items()
    ]


def layout_sizes(unit: Unit, itemsize: int) -> dict[str, int]:
    """Bytes that one row reads of a basis group in each layout, each module applied once."""
    rank, inputs = unit.tensors["basis"].shape
    count, outputs = len(unit.modules), sum(n for n, _ in unit.modules.values())
    return {
        "dense": outputs * inputs * itemsize,
        "factored": (count * rank * inputs + outputs * rank) * itemsize,
        "pivoted": (count * rank * (inputs - rank) + outputs * rank) * itemsize + 4 * count * inputs,
    }


def _products(unit: Unit) -> list[Unit]:
    """A dense linear for each module, in the unit's dtype."""
    found = []
    for path, shape in unit.modules.items():
        weight = unit.tensors[COEFFICIENTS + path] @ unit.tensors["basis"]
        bias = {"bias": unit.tensors[BIAS + path]} if BIAS + path in unit.tensors else {}
        found.append(Unit({path: shape}, {"weight": weight, **bias}))
    return found


def _cast(unit: Unit, dtype: torch.dtype) -> Unit:
    tensors = {role: t.to(dtype) if t.is_floating_point() else t for role, t in unit.tensors.items()}
    return Unit(unit.modules, tensors)
