"""LoRA recovery of a model that `basis_sharing` has compressed: a short training, merged back exactly.

Adapters sit on the coefficients alone: C_i + (alpha / r) A_i B_i is again a coefficient matrix of the same shape,
so bases stay shared and the model as small as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ...errors import BadParameter
from ..calibration import Calibration
from ..modelling import BasisLinear, replace_linear
from ..record import Record
from ..training import adapters, next_token_loss, tenths, train

NAME = "recover"
WARM_UP = 0.1  # share of the steps over which the learning rate rises; after it, it falls to zero


@dataclass(frozen=True)
class Params:
    """r, alpha: of LoRA. lr: peak learning rate. tokens: training budget, batch windows of `length` tokens a step."""

    r: int = 8
    alpha: float = 32.0
    lr: float = 1e-4
    tokens: int = 262144
    length: int = 512
    batch: int = 2
    seed: int = 0

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "r": (1, 4096),
        "alpha": (1e-3, 1e4),
        "lr": (1e-8, 1),
        "tokens": (1, 1 << 40),
        "length": (2, 1 << 20),
        "batch": (1, 1 << 16),
        "seed": (0, 2**63 - 1),
    }

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.length * self.batch))


class _Open(nn.Module):
    """A BasisLinear whose coefficients are a linear layer, which is what adapters attach to."""

    def __init__(self, closed: BasisLinear) -> None:
        super().__init__()
        outputs, rank = closed.coefficients.shape
        self.basis = closed.basis
        self.coefficients = nn.Linear(rank, outputs, bias=closed.bias is not None, device="meta")
        self.coefficients.weight = closed.coefficients
        if closed.bias is not None:
            self.coefficients.bias = closed.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.coefficients(F.linear(x, self.basis))


def search(
    model: PreTrainedModel, calibration: Calibration, record: Record, params: Params, progress: bool = True
) -> None:
    """Train, and fill `record` with the merged coefficients. The model is left as it was.

    A killed run goes on from its last saved step. A loss that is not finite ends the training with the last good
    adapters. Raises BadParameter for a model without compressed layers, SourceError for too little text.
    """
    if record.holds("merged"):
        return
    paths = [path for path, module in model.named_modules() if isinstance(module, BasisLinear)]
    if not paths:
        raise BadParameter("recover trains compressed layers and the model has none; give --method basis_sharing first")
    windows = calibration.windows(params.steps * params.batch, params.length, params.seed)
    batches = windows.view(params.steps, params.batch, -1)
    rising = int(WARM_UP * params.steps)
    names = [f"{path}.coefficients" for path in paths]
    with _opened(model, paths), adapters(model, names, params.r, params.alpha, 0.0, params.seed) as factors:
        losses, complaint = train(
            model,
            params.steps,
            lambda step: next_token_loss(model, batches[step]),
            record,
            params.lr,
            rising,
            progress,
            NAME,
        )
        scale = params.alpha / params.r
        merged = {path: _merged(model.get_submodule(path), scale, *factors(f"{path}.coefficients")) for path in paths}
    record.save("merged", merged, {"loss": losses, "stopped": complaint})


def apply(model: PreTrainedModel, record: Record) -> None:
    """Put the merged coefficients in place."""
    for path, coefficients in record.tensors("merged").items():
        model.get_submodule(path).coefficients.data = coefficients.to(model.dtype)


def summary(record: Record) -> dict[str, Any]:
    """The training loss, averaged over the first and the last tenth of the steps, and why it ended early, if so."""
    facts = record.facts("merged")
    losses = facts["loss"]
    return {"steps": len(losses), "loss": tenths(losses), "stopped": facts["stopped"]}


@contextlib.contextmanager
def _opened(model: PreTrainedModel, paths: list[str]) -> Iterator[None]:
    """While open, the compressed layers can carry adapters."""
    closed = {path: model.get_submodule(path) for path in paths}
    for path, module in closed.items():
        replace_linear(model, path, _Open(module))
    try:
        yield
    finally:
        for path, module in closed.items():
            replace_linear(model, path, module)


def _merged(opened: Any, scale: float, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Coefficients [N, R] and adapter in one matrix."""
    weight: torch.Tensor = opened.coefficients.base_layer.weight.detach()
    return (weight + scale * b @ a).float().contiguous()
