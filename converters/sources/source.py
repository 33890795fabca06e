"""What every published layout is read into: a config, small files, and a stream of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...kernels.unit import Unit

Skip = Callable[[str], bool]


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    config: the Hugging Face config.json. files: name -> content, or path, of what goes along (tokenizer,
    generation_config.json, licence). tensors(skip): (Hugging Face name, tensor) in a fixed order, at most
    one shard in memory; what `skip(name)` refuses is not read. fingerprint: changes when the source does.
    units(): modules that are compressed already, each whole, in the order of their first layer; `tensors` lacks them.
    notes: module path -> what was done to its weights on the way here, for people.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    files: dict[str, bytes | Path]
    tensors: Callable[[Skip], Iterator[tuple[str, torch.Tensor]]]
    fingerprint: str
    units: Callable[[], Iterator[Unit]] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The names of all tensors; none is read."""
        found: list[str] = []

        def refuse(name: str) -> bool:
            found.append(name)
            return True

        for _ in self.tensors(refuse):
            pass
        return found
