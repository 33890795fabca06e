"""What training a routed model takes: the losses that make it sparse and steady, and what of it may change."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from .routed import RoutedMlp, Rule, hard, routed
from .training import adapters

EDGE = 0.1
"""How near to tau a score still feels where it is: nearer the separability loss is constant and pushes nobody, so that
a score may cross, and its gradient is never larger than 2 / EDGE^3."""

NOISE = 0.2
"""Of an FFN's input, relative: what decisions are to withstand. Many times what bf16 leaves, so that scores some way
off the threshold feel it too."""

_TINY = 1e-30  # where zero has no quotient and no root with a gradient

Trained = Literal["full", "lora", "router"]


def efficiency(scores: Sequence[torch.Tensor]) -> torch.Tensor:
    """L_eff: the mean of G^2 over tokens and groups of a layer, then over layers. scores: [..., groups] for each."""
    return torch.stack([layer.square().mean() for layer in scores]).mean()


def separability(scores: Sequence[torch.Tensor], tau: float) -> torch.Tensor:
    """L_sep: the mean of 1 / (G - tau)^2, which is infinite at tau; |G - tau| counts as EDGE at least."""
    return torch.stack([(layer - tau).square().clamp(min=EDGE**2).reciprocal().mean() for layer in scores]).mean()


def steady(rule: Rule) -> Rule:
    """The same rule, whose FFNs keep in `turned`, a scalar, what NOISE may be expected to change of their output.

    Noise of x, alike in every direction, moves the logit of group g by a normal error of deviation
    s = NOISE |w_g| rms(x), and turns its decision with a chance of Phi(-|w_g x - threshold| / s). What counts is the
    share of those groups in the squares of what all groups add, the mean over tokens. Larger weights do not make it
    smaller, as s grows with them: only scores further off than noise reaches, or groups that add little at the
    threshold, do.
    """

    def watched(mlp: RoutedMlp, x: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        margins = (mlp.logits(x) - mlp.threshold).abs()
        with torch.autocast(x.device.type, enabled=False):
            rms = (x.float().square().mean(-1, keepdim=True) + _TINY).sqrt()
            deviations = NOISE * rms * mlp.router.weight.norm(dim=1)
            chances = torch.special.erfc(margins / (math.sqrt(2) * deviations).clamp(min=_TINY)) / 2
            energies = mlp.energies(neurons)
            whole = energies.detach().sum(-1).clamp(min=_TINY)
            mlp.turned = ((chances * energies).sum(-1) / whole).mean()
        return rule(mlp, x, neurons)

    return watched


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
        module.rule, module.shares, module.turned = rule, torch.empty(0), torch.empty(0)
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
