"""GBLM-Pruner (arXiv 2311.04902): Wanda's score with gradients, |W| ||X_j||_2 + alpha |W| ||G_ij||_p.

X_j is an input over all calibration tokens, G_ij the gradient of a weight over the samples: of the dense model, never
refreshed. Two forms, which differ in what weighs more:

    code   as the published code computes it, so that masks can be compared bit for bit: ||X_j|| / sqrt(samples), and
           alpha multiplies each gradient before the sum over samples (fp16 for l1, fp32 for l2)
    paper  the formula above in fp32; at equal alpha the gradients weigh sqrt(samples) times less than in the code
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel

from .. import pruning
from ..calibration import Calibration
from ..gradients import PUBLISHED_SCALE, Norm, collect, open_published
from ..record import Record
from . import wanda

NAME = "gblm"
apply, summary = pruning.apply, pruning.summary


@dataclass(frozen=True)
class Params(wanda.Params):
    """norm: of a weight's gradient over the samples. form: see the module. alpha: the gradients' weight.

    gradients: a published GBLM gradient file to take instead of computing them; its norm is then what it holds. The
    others: see wanda.Params.
    """

    norm: Literal["l1", "l2"] = "l1"
    form: Literal["code", "paper"] = "code"
    alpha: float = PUBLISHED_SCALE
    gradients: str | None = None

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {**wanda.Params.LIMITS, "alpha": (0, 1e9)}

    @property
    def files(self) -> tuple[Path, ...]:
        """The gradient file."""
        return () if self.gradients is None else (Path(self.gradients),)


def search(
    model: PreTrainedModel, calibration: Calibration, record: Record, params: Params, progress: bool = True
) -> None:
    """Fill `record` with gradients, block by block, then with masks; what it holds already is kept.

    model: frozen, in the dtype to compute in; it stays dense. Raises BadParameter for layers, modules or patterns that
    it has not, SourceError for too little text, a gradient file of another model, or NaN and infinity.
    """
    tokens = calibration.windows(params.samples, params.length, params.seed)
    pruner = pruning.Search(model, record, params, NAME, progress)
    gradient = _gradient(pruner, tokens, params, progress)
    in_code = params.form == "code"

    def score(target: pruning.Target, weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        loud = (squares / params.samples if in_code else squares).float().sqrt()
        return (weight.abs() * loud).float() + (weight.abs() * gradient(target.path)).float()

    pruner.by_inputs(tokens, score)


def _gradient(
    pruner: pruning.Search, tokens: torch.Tensor, params: Params, progress: bool
) -> Callable[[str], torch.Tensor]:
    """path -> the gradient term of its weight [N, K], alpha in it."""
    model, record = pruner.model, pruner.record
    wanted = {i: [target.path for target in layer] for i, layer in pruner.targets.items()}
    if params.gradients is not None:
        published = open_published(Path(params.gradients), model, wanted)
        return lambda path: published(path) * (params.alpha / PUBLISHED_SCALE)
    if params.form == "code":
        return collect(model, tokens, wanted, Norm(params.norm, params.alpha, half=True), record, progress)
    plain = collect(model, tokens, wanted, Norm(params.norm, 1.0, half=False), record, progress)
    return lambda path: plain(path) * params.alpha
