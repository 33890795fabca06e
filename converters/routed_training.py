"""What training a routed model takes: the two losses that make it sparse, and what of it may change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from .routed import Rule, hard, routed
from .training import adapters

EDGE = 0.1
"""How near to tau a score still feels where it is: nearer the separability loss is constant and pushes nobody, so that
a score may cross, and its gradient is never larger than 2 / EDGE^3."""

Trained = Literal["full", "lora", "router"]


def efficiency(scores: Sequence[torch.Tensor]) -> torch.Tensor:
    """L_eff: the mean of G^2 over tokens and groups of a layer, then over layers. scores: [..., groups] for each."""
    return torch.stack([layer.square().mean() for layer in scores]).mean()


def separability(scores: Sequence[torch.Tensor], tau: float) -> torch.Tensor:
    """L_sep: the mean of 1 / (G - tau)^2, which is infinite at tau; |G - tau| counts as EDGE at least."""
    return torch.stack([(layer - tau).square().clamp(min=EDGE**2).reciprocal().mean() for layer in scores]).mean()


@contextlib.contextmanager
def opened(model: PreTrainedModel, what: Trained, routers: bool, r: int, alpha: float, seed: int) -> Iterator[None]:
    """While open, `what` can be trained, and routers only if asked for; then all is frozen and adapters are merged.

    full: every parameter. lora: adapters of rank r on the matrices of routed FFNs. router: nothing else.
    """
    try:
        if what == "lora":
            names = [name for path in routed(model) for name in _matrices(model, path)]
            with adapters(model, names, r, alpha, 0.0, seed) as factors:
                _free_routers(model, routers)
                yield
                found = {name: factors(name) for name in names}
            for name, (a, b) in found.items():
                model.get_parameter(f"{name}.weight").data += alpha / r * b @ a
        else:
            model.requires_grad_(what == "full")
            _free_routers(model, routers)
            yield
    finally:
        model.requires_grad_(False)
        under(model, hard)


def _matrices(model: PreTrainedModel, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children() if name != "router"]


def _free_routers(model: PreTrainedModel, free: bool) -> None:
    for module in routed(model).values():
        module.router.requires_grad_(free)


def under(model: PreTrainedModel, rule: Rule) -> PreTrainedModel:
    """The model with this rule in all of its routed FFNs; nothing is left of their last call."""
    for module in routed(model).values():
        module.rule, module.shares = rule, torch.empty(0)
    return model


def live(model: PreTrainedModel) -> dict[str, str]:
    """For the progress bar: the share of groups that the last call let in, averaged over layers."""
    shares = [(module.shares > module.groups.tau).float().mean().item() for module in routed(model).values()]
    return {"open": f"{sum(shares) / len(shares):.1%}"} if shares else {}


def changed(model: PreTrainedModel, what: Trained) -> dict[str, torch.Tensor]:
    """What training of `what` changes, by name: everything, or the routed FFNs, or their routers alone."""
    inside = {
        "full": ("",),
        "lora": tuple(f"{path}." for path in routed(model)),
        "router": tuple(f"{path}.router." for path in routed(model)),
    }[what]
    return {name: p.detach() for name, p in model.named_parameters() if name.startswith(inside)}
