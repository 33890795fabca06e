"""Magnitude pruning: the smallest weights of each matrix go, whatever they multiply. The baseline of the field.

As in the reference code of Wanda and GBLM-Pruner the threshold is one a matrix, and weights at it go too; with a
pattern N:M the smallest of every M inputs go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from .. import pruning
from ..calibration import Calibration
from ..record import Record

NAME = "magnitude"
apply, summary = pruning.apply, pruning.summary


@dataclass(frozen=True)
class Params(pruning.Params):
    """sparsity, pattern, layers, modules: see pruning.Params."""

    reads: ClassVar[str] = "nothing"


def search(
    model: PreTrainedModel, calibration: Calibration | None, record: Record, params: Params, progress: bool = True
) -> None:
    """Fill `record` with masks; no text is looked at. Raises BadParameter, SourceError for NaN or infinity."""
    pruning.Search(model, record, params, NAME, progress).by_size()
