"""Wanda (arXiv 2306.11695): a weight counts as much as it is large and its input is loud, |W_ij| ||X_j||_2.

Weights are compared within a row, and pruned layer by layer under the inputs that the pruned layers before give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from .. import pruning
from ..calibration import Calibration
from ..record import Record

NAME = "wanda"
apply, summary = pruning.apply, pruning.summary


@dataclass(frozen=True)
class Params(pruning.Params):
    """samples windows of length tokens are looked at, drawn by seed. The others: see pruning.Params."""

    samples: int = 128
    length: int = 2048
    seed: int = 0

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        **pruning.Params.LIMITS,
        "samples": (1, 1 << 20),
        "length": (2, 1 << 20),
        "seed": (0, 2**63 - 1),
    }


def search(
    model: PreTrainedModel, calibration: Calibration, record: Record, params: Params, progress: bool = True
) -> None:
    """Fill `record` with masks, layer by layer; what it holds already is kept. The model stays dense.

    model: frozen, in the dtype to compute in. Raises BadParameter for layers, modules or patterns that it has not,
    SourceError for too little text, or for NaN and infinity.
    """
    tokens = calibration.windows(params.samples, params.length, params.seed)

    def score(_: pruning.Target, weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        return weight.abs() * (squares / params.samples).float().sqrt()

    pruning.Search(model, record, params, NAME, progress).by_inputs(tokens, score)
