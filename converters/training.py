"""A training that survives being killed: adapters through peft, saved steps, and what they add up to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import BadParameter
from ..kernels.native.build import BuildFailed, compiler
from .record import Record

SAVE_EVERY = 25  # steps
WORTH_COMPILING = 60  # steps: compiling costs about as long as it saves in thirty
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
    lr: float | Callable[[str], float],
    rising: int,
    progress: bool,
    title: str,
    parts: int = 1,
    live: Callable[[], dict[str, str]] = dict,
) -> tuple[list[float], str | None]:
    """`steps` steps of AdamW on what requires a gradient: the losses, and why it ended early, if so.

    loss_of(i): a step takes the mean over i = step * parts ... step * parts + parts - 1, one backward pass each. lr:
    for all, or by the name of a parameter; it rises over `rising` steps, then falls to zero. live(): what the progress
    bar shows beside the loss. A killed run goes on from its last saved step. A loss that is not finite ends the
    training, with the parameters as they were last good.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(trained, {name: lr(name) if callable(lr) else lr for name in trained})
    losses = _resume(record, trained, optimizer)
    good = {name: p.detach().clone() for name, p in trained.items()}
    bar = tqdm(range(len(losses), steps), title, unit="step", disable=not progress)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _share_of_peak(step, steps, max(1, rising))
        loss = _backward(loss_of, range(step * parts, (step + 1) * parts))
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            _copy(good, trained)
            optimizer.zero_grad()
            return losses, f"the loss of step {step} was {loss}, its gradient {norm.item()}; try a smaller lr"
        _copy(trained, good)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        bar.set_postfix(loss=f"{loss:.3f}", **live())
        if (step + 1) % SAVE_EVERY == 0:
            record.save("step", _state(trained, optimizer), {"losses": losses})
    return losses, None


def _optimizer(trained: Mapping[str, nn.Parameter], peaks: Mapping[str, float]) -> torch.optim.Optimizer:
    """AdamW without decay; each group keeps its highest rate as `peak`."""
    by_peak: dict[float, list[nn.Parameter]] = {}
    for name, p in trained.items():
        by_peak.setdefault(peaks[name], []).append(p)
    groups = [{"params": alike, "peak": peak} for peak, alike in by_peak.items()]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def _backward(loss_of: Callable[[int], torch.Tensor], parts: range) -> float:
    """Gradients of the mean loss, which it gives."""
    total = 0.0
    for i in parts:
        loss = loss_of(i) / len(parts)
        loss.backward()
        total += loss.item()
    return total


def next_token_loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token over windows [B, T]."""
    with fast_products(model):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss


@contextlib.contextmanager
def compiled(model: PreTrainedModel, layers: Sequence[nn.Module], steps: int) -> Iterator[None]:
    """While open, decoder layers and the loss are fused by torch.compile, where `steps` are many enough to pay for it.

    All layers share one graph. What cannot be compiled runs as it is.
    """
    if steps < WORTH_COMPILING or (model.device.type == "cpu" and not _has_compiler()):
        yield
        return
    loss_function = model.loss_function
    with torch._dynamo.config.patch(suppress_errors=True):
        try:
            model.loss_function = torch.compile(loss_function, dynamic=False)
            for layer in layers:
                layer.compile(dynamic=False)
            yield
        finally:
            model.loss_function = loss_function
            for layer in layers:
                layer._compiled_call_impl = None


def _has_compiler() -> bool:
    try:
        return bool(compiler())
    except BuildFailed:
        return False


def tenths(losses: Sequence[float]) -> list[float | None]:
    """The loss averaged over the first and over the last tenth of the steps."""
    tenth = max(1, len(losses) // 10)
    return [sum(part) / len(part) if part else None for part in (losses[:tenth], losses[-tenth:])]


def fastest_device() -> torch.device:
    """The accelerator, where this machine has one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def fast_products(model: PreTrainedModel) -> Any:
    """While open, products are bf16 where the machine has instructions for them, which halves the time of a step."""
    fast = model.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(model.device.type, torch.bfloat16, enabled=fast)


def _share_of_peak(step: int, steps: int, rising: int) -> float:
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def _state(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What trains and the optimizer's moments, flat."""
    flat = {f"trained/{name}": p.detach() for name, p in trained.items()}
    for name, p in trained.items():
        flat |= {f"{key}/{name}": value for key, value in optimizer.state[p].items()}
    return flat


def _resume(record: Record, trained: dict[str, nn.Parameter], optimizer: Any) -> list[float]:
    """Take up the last saved step, if there is one; returns the losses so far."""
    if not record.holds("step"):
        return []
    saved, losses = record.tensors("step"), record.facts("step")["losses"]
    for name, p in trained.items():
        p.data.copy_(saved[f"trained/{name}"])
        moments = {key: saved[f"{key}/{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": saved[f"step/{name}"], **moments}
    return losses


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, p in source.items():
        target[name].copy_(p)
