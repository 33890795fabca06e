"""A format's own cases, held to the contract of kernels/formats.py on the path that this machine takes.

tests/test_formats.py proves the same and more in CI; this is the quick look of somebody who writes a kernel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch

from ..kernels import formats
from ..kernels.dispatch import interpreting
from ..kernels.unit import Packed, Prepared, Unit
from . import truth
from .paths import PathSpy

ROWS = (1, 7, 40, 130)
SLICED_ROWS = 4
COLUMNS = ("format", "case", "check", "M", "path", "error", "bound", "")


class Check(NamedTuple):
    """One promise of one case. storage counts tensors that came back different; the rest are errors of y."""

    format: str
    case: str
    what: str
    m: int | None
    path: str
    error: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return not self.note and self.error <= self.bound


def check(module: ModuleType, rows: Sequence[int] = ROWS, device: str = "cpu") -> Iterator[Check]:
    """Every check of the format's cases; one that raises is a failed check with the message as its note.

    Triton's interpreter cuts bf16 off where a GPU rounds: there bf16 is left to tests/test_triton_interpret.py.
    """
    for unit in module.cases():
        if interpreting() and dtype_of(unit) == torch.bfloat16:
            continue
        runs: list[tuple[str, int | None, Callable[[], Iterator[Check]]]] = [
            ("storage", None, partial(_storage, module, unit)),
        ]
        if module in formats.LINEAR:
            runs.append(("slice", None, partial(_slice, module, unit)))
        runs += [("apply", m, partial(_apply, module, unit, m, device)) for m in rows]
        runs += [("stack of 3", m, partial(_stack, module, unit, m, device)) for m in rows]
        for what, m, run in runs:
            try:
                yield from run()
            except Exception as wrong:  # any failure of the format under test is a finding
                note = f"{type(wrong).__name__}: {wrong}"
                yield Check(module.NAME, case_name(unit), what, m, "", math.inf, 0.0, note)


def case_name(unit: Unit) -> str:
    """Shapes of the modules, dtype, and what is stored."""
    shapes = dict.fromkeys(f"{n}x{k}" for n, k in unit.modules.values())
    roles = dict.fromkeys(role.partition(".")[0] for role in unit.tensors)
    return f"{len(unit.modules)} of {', '.join(shapes)}, {dtype_name(unit)}, {' '.join(roles)}"


def dtype_of(unit: Unit) -> torch.dtype:
    """Of x: the unit's floating-point dtype; its first tensor's where several are."""
    return next(tensor.dtype for tensor in unit.tensors.values() if tensor.is_floating_point())


def dtype_name(unit: Unit) -> str:
    return str(dtype_of(unit)).removeprefix("torch.")


def inputs(unit: Unit, rows: int) -> torch.Tensor:
    """x [rows, K] of the unit's dtype, always the same."""
    k = next(iter(unit.modules.values()))[1]
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(0)).to(dtype_of(unit))


def applied(
    module: ModuleType,
    prepared: Prepared,
    parts: list[tuple[Packed, str]],
    x: torch.Tensor,
    device: str,
    most: int | None = None,
) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(path, result, own, truth): `apply` under the first part's path, and the references of all parts beside it.

    most: so many rows of the result are compared, where references in fp32 take long.
    """
    spy, there = PathSpy(), x.to(device)
    with _poisoned(), spy:
        y = module.apply(there, prepared, parts[0][1])[:most]
    few = x[:most]
    own, exact = (torch.cat([module.reference(given, *part) for part in parts], dim=1) for given in (few, few.float()))
    if (y.shape, y.dtype) != (own.shape, own.dtype):
        raise ValueError(f"y is {tuple(y.shape)} of {y.dtype}, the references say {tuple(own.shape)} of {own.dtype}")
    return "+".join(dict.fromkeys(spy.paths.values())) or "torch", y.cpu(), own, exact


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Within this block fresh memory holds NaN, so that an element which no kernel wrote is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _storage(module: ModuleType, unit: Unit) -> Iterator[Check]:
    reason = module.fits(unit)
    decoded = {} if reason else module.decode(module.encode(unit)).tensors
    changed = sum(role not in decoded or not _same(tensor, decoded[role]) for role, tensor in unit.tensors.items())
    yield Check(module.NAME, case_name(unit), "storage", None, "", float(changed), 0.0, reason or "")


def _slice(module: ModuleType, unit: Unit) -> Iterator[Check]:
    """Halves of the outputs side by side, and halves of the inputs added up, against the whole, in fp32."""
    packed, (path, sizes) = module.encode(unit), next(iter(unit.modules.items()))
    x = inputs(unit, SLICED_ROWS).float()
    whole = module.reference(x, packed, path)
    for dim in (dim for dim in (0, 1) if sizes[dim] > 1):
        cuts = [(0, sizes[dim] // 2), (sizes[dim] // 2, sizes[dim])]
        try:
            parts = [module.slice(packed, path, dim, *cut) for cut in cuts]
        except ValueError:
            if dim == 1:  # some forms cannot be cut along their inputs, and say so
                continue
            raise
        shares = [x if dim == 0 else x[:, start:stop] for start, stop in cuts]
        found = [module.reference(share, part, path) for share, part in zip(shares, parts, strict=True)]
        joined = torch.cat(found, dim=1) if dim == 0 else sum(found)
        off = (joined - whole).abs().max().item()
        yield Check(module.NAME, case_name(unit), f"slice {dim}", SLICED_ROWS, "", off, truth.slack(whole))


def _apply(module: ModuleType, unit: Unit, m: int, device: str) -> Iterator[Check]:
    packed = module.encode(unit)
    prepared = module.prepare(packed, device)
    for path in list(unit.modules)[:2]:  # what is true of the second is true of the rest
        yield _judged(module, unit, "apply", prepared, [(packed, path)], m, device)


def _stack(module: ModuleType, unit: Unit, m: int, device: str) -> Iterator[Check]:
    packed, last = module.encode(unit), list(unit.modules)[-1]
    prepared = module.stack([(module.prepare(packed, device), last)] * 3)
    if prepared is not None:
        yield _judged(module, unit, "stack of 3", prepared, [(packed, last)] * 3, m, device)


def _judged(
    module: ModuleType,
    unit: Unit,
    what: str,
    prepared: Prepared,
    parts: list[tuple[Packed, str]],
    m: int,
    device: str,
) -> Check:
    path, y, own, exact = applied(module, prepared, parts, inputs(unit, m), device)
    return Check(module.NAME, case_name(unit), what, m, path, *truth.error(y, own, exact))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals itself and -0.0 not 0.0."""
    bits = (tensor.contiguous().view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and torch.equal(*bits)


def lines(checks: Sequence[Check]) -> Iterator[tuple[str, ...]]:
    """Lines of a table under COLUMNS: one a case, check and path, with the error that is nearest to its bound."""
    alike: dict[tuple[str, ...], list[Check]] = {}
    for one in checks:
        alike.setdefault((one.format, one.case, one.what, one.path, one.note), []).append(one)
    for (*where, path, note), group in alike.items():
        worst = max(group, key=lambda one: one.error / one.bound if one.bound else one.error)
        m = ", ".join(str(m) for m in dict.fromkeys(one.m for one in group) if m is not None)
        verdict = note or ("" if all(one.passed for one in group) else "WRONG")
        yield (*where, m, path, f"{worst.error:.3g}", f"{worst.bound:.3g}", verdict)
