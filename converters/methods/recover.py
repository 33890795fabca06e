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
from tqdm import tqdm
from transformers import PreTrainedModel

from ...errors import BadParameter
from ..calibration import Calibration
from ..modelling import BasisLinear, replace_linear
from ..record import Record

NAME = "recover"
SAVE_EVERY = 25  # steps
WARM_UP = 0.1  # share of the steps over which the learning rate rises; after it, it falls to zero
ADAPTER = "default"


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
    with _adapters(model, paths, params):
        losses, complaint = _train(model, windows.view(params.steps, params.batch, -1), record, params, progress)
        merged = {path: _merged(model.get_submodule(f"{path}.coefficients")) for path in paths}
    record.save("merged", merged, {"loss": losses, "stopped": complaint})


def apply(model: PreTrainedModel, record: Record) -> None:
    """Put the merged coefficients in place."""
    for path, coefficients in record.tensors("merged").items():
        model.get_submodule(path).coefficients.data = coefficients.to(model.dtype)


def summary(record: Record) -> dict[str, Any]:
    """The training loss, averaged over the first and the last tenth of the steps, and why it ended early, if so."""
    facts = record.facts("merged")
    losses = facts["loss"]
    tenth = max(1, len(losses) // 10)
    means = [sum(part) / len(part) if part else None for part in (losses[:tenth], losses[-tenth:])]
    return {"steps": len(losses), "loss": means, "stopped": facts["stopped"]}


@contextlib.contextmanager
def _adapters(model: PreTrainedModel, paths: list[str], params: Params) -> Iterator[None]:
    """While open, the compressed layers carry fresh adapters, the only things that train."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise BadParameter("recover needs peft; pip install 'pared[train]'") from None
    closed = {path: model.get_submodule(path) for path in paths}
    for path, module in closed.items():
        replace_linear(model, path, _Open(module))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(params.seed)
            names = [f"{path}.coefficients" for path in paths]
            config = LoraConfig(r=params.r, lora_alpha=params.alpha, target_modules=names, lora_dropout=0.0)
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        yield
    finally:
        for path, module in closed.items():
            replace_linear(model, path, module)
        model.__dict__.pop("peft_config", None)  # else the next training would think these adapters still there


def _merged(layer: Any) -> torch.Tensor:
    """Coefficients [N, R] and adapter in one matrix."""
    return (layer.base_layer.weight + layer.get_delta_weight(ADAPTER)).detach().float().contiguous()


def _train(
    model: PreTrainedModel, batches: torch.Tensor, record: Record, params: Params, progress: bool
) -> tuple[list[float], str | None]:
    """One pass over batches [S, B, T]: the losses, and why it ended early. Adapters end as their last good state."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=params.lr, weight_decay=0.0)
    losses = _resume(record, trained, optimizer)
    good = {name: p.detach().clone() for name, p in trained.items()}
    bar = tqdm(range(len(losses), len(batches)), "recovering", unit="step", disable=not progress)
    for step in bar:
        optimizer.param_groups[0]["lr"] = params.lr * _share_of_peak(step, len(batches))
        loss = _loss(model, batches[step])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            _restore(trained, good)
            return losses, f"the loss of step {step} was {loss.item()}, its gradient {norm.item()}; try a smaller lr"
        good = {name: p.detach().clone() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            record.save("step", _state(trained, optimizer), {"losses": losses})
    return losses, None


def _loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token over windows [B, T].

    Products are bf16 where the machine has instructions for them, which halves the time of a step.
    """
    fast = model.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _share_of_peak(step: int, steps: int) -> float:
    rising = max(1, int(WARM_UP * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def _state(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adapters and the optimizer's moments, flat."""
    flat = {f"adapter/{name}": p.detach() for name, p in trained.items()}
    for name, p in trained.items():
        flat |= {f"{key}/{name}": value for key, value in optimizer.state[p].items()}
    return flat


def _resume(record: Record, trained: dict[str, nn.Parameter], optimizer: Any) -> list[float]:
    """Take up the last saved step, if there is one; returns the losses so far."""
    if not record.holds("step"):
        return []
    saved, losses = record.tensors("step"), record.facts("step")["losses"]
    for name, p in trained.items():
        p.data.copy_(saved[f"adapter/{name}"])
        optimizer.state[p] = {key: saved[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return losses


def _restore(trained: dict[str, nn.Parameter], good: dict[str, torch.Tensor]) -> None:
    for name, p in trained.items():
        p.data.copy_(good[name])
