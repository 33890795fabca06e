"""Models whose linears have half of their weights zero, for decode.py: as the units that a folder would hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from ...compact import UnitEntry
from ...kernels import bitmap, two_four
from ...spec import Spec
from .setting import Setting

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Zeros:
    """Every linear in a format of half zeros, so many of each row."""

    name: str
    format: ModuleType

    def units(self, spec: Spec, shapes: Shapes) -> Iterator[UnitEntry]:
        """One unit for each linear; adds their tensors' shapes to `shapes`."""
        for path, linear in spec.linears().items():
            if path == spec.names.head:
                continue
            n, k = linear.n, linear.k
            wanted: Shapes = {"values": (n, k // 2), "positions": (n, k // 8)}
            if self.format is bitmap:
                wanted = {"values": (n * k // 2,), "bits": (n, k // 8)}
            names = {role: f"{path}.{role}" for role in wanted}
            shapes |= {names[role]: shape for role, shape in wanted.items()}
            yield UnitEntry(self.format.NAME, self.format.VERSION, {path: (n, k)}, names)

    def __str__(self) -> str:
        return self.name


ZEROS = (Zeros("2:4", two_four), Zeros("half zero", bitmap))


def tensor(name: str, shape: tuple[int, ...], setting: Setting) -> torch.Tensor | None:
    """What the sparse formats store under `name`, random; None for what they do not store."""
    on = setting.device
    if name.endswith(".values"):
        return torch.randn(shape, device=on).mul_(1 / 32).to(setting.dtype)
    if name.endswith(".positions"):
        pairs = torch.tensor([first | second << 2 for second in range(4) for first in range(second)], device=on)
        low, high = (pairs[torch.randint(len(pairs), shape, device=on)] for _ in range(2))
        return (low | high << 4).to(torch.uint8)
    if name.endswith(".bits"):  # as many of each row's bytes have the inverse of another's bits: half of a row
        half = torch.randint(256, (shape[0], shape[1] // 2), device=on)
        return torch.cat([half, 255 - half], dim=1).to(torch.uint8)
    return None
