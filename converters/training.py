"""A short LoRA training that survives being killed: adapters through peft, saved steps, and what they add up to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import BadParameter
from .record import Record

SAVE_EVERY = 25  # steps
_ADAPTER = "default"
Factors = Callable[[str], tuple[torch.Tensor, torch.Tensor]]


@contextlib.contextmanager
def adapters(
    model: PreTrainedModel, names: Sequence[str], r: int, alpha: float, dropout: float, seed: int, flip: bool = False
) -> Iterator[Factors]:
    """While open, the linear modules `names` carry fresh adapters, the only things that train.

    flip: weights are stored [K, N]. Gives a function from a name to its factors A [r, K] and B [N, r], fp32: merged,
    the weight is W + (alpha / r) B A. Raises BadParameter without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise BadParameter("training needs peft; pip install 'pared[train]'") from None
    closed = {name: model.get_submodule(name) for name in names}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(
                r=r, lora_alpha=alpha, target_modules=list(names), lora_dropout=dropout, fan_in_fan_out=flip
            )
            inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
        yield lambda name: _factors(model.get_submodule(name))
    finally:
        for name, module in closed.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)
        model.__dict__.pop("peft_config", None)  # else the next training would think these adapters still there


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (factor[_ADAPTER].weight.detach().float().contiguous() for factor in (layer.lora_A, layer.lora_B))
    return a, b


def train(
    model: PreTrainedModel,
    steps: int,
    loss_of: Callable[[int], torch.Tensor],
    record: Record,
    lr: float,
    rising: int,
    progress: bool,
    title: str,
) -> tuple[list[float], str | None]:
    """`steps` steps of AdamW on loss_of(step): the losses, and why it ended early, if so.

    The learning rate rises to `lr` over `rising` steps, then falls to zero. A killed run goes on from its last saved
    step. A loss that is not finite ends the training, with the adapters as they were last good.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    losses = _resume(record, trained, optimizer)
    good = {name: p.detach().clone() for name, p in trained.items()}
    bar = tqdm(range(len(losses), steps), title, unit="step", disable=not progress)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * _share_of_peak(step, steps, max(1, rising))
        loss = loss_of(step)
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


def tenths(losses: Sequence[float]) -> list[float | None]:
    """The loss averaged over the first and over the last tenth of the steps."""
    tenth = max(1, len(losses) // 10)
    return [sum(part) / len(part) if part else None for part in (losses[:tenth], losses[-tenth:])]


def fast_products(model: PreTrainedModel) -> Any:
    """While open, products are bf16 where the machine has instructions for them, which halves the time of a step."""
    fast = model.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(model.device.type, torch.bfloat16, enabled=fast)


def _share_of_peak(step: int, steps: int, rising: int) -> float:
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
