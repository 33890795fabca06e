"""An FFN of which each token wakes only some groups of neurons: what LTE puts in the place of a family's own MLP.

    soft    FFN(x) = sum_g G_g(x) E_g(x)         G = sigmoid(W x), W [groups, hidden] fp32: all groups are computed
    hard    FFN(x) = sum_{g: G_g(x) > tau} E_g(x)    a group is in or out, its score no longer counts

E_g are the neurons g * size to (g + 1) * size - 1 behind the family's activation; neurons are reordered once, which
changes nothing but the order of a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import BadParameter
from ..kernels.fused import ACTIVATIONS
from ..kernels.unit import Unit
from ..spec import Spec

Rule = Callable[["RoutedMlp", torch.Tensor, torch.Tensor], torch.Tensor]
"""(module, x [..., K], neurons [..., F]) -> how much of each group counts, [..., groups]."""


def soft(mlp: RoutedMlp, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The scores themselves, between 0 and 1: what gradients flow through."""
    return mlp.logits(x).sigmoid()


def hard(mlp: RoutedMlp, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """1 where the score is above tau, else 0."""
    return (mlp.logits(x) > mlp.threshold).float()


@dataclass(frozen=True)
class Groups:
    """How an FFN is routed. size: neurons of a group. tau: the score above which a group is in."""

    size: int
    tau: float

    def __post_init__(self) -> None:
        if not 0 < self.tau < 1:
            raise BadParameter(f"tau={self.tau} is not between 0 and 1, where scores lie; the paper's is 0.5")


class RoutedMlp(nn.Module):
    """gate: None where the FFN has two matrices. Weights as Hugging Face has them: gate, up [F, K], down [N, F].

    rule: `soft`, `hard`, or another. shares: [..., groups], what the last call gave to each group. turned: what
    `routed_training.steady` saw in it.
    """

    def __init__(self, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear, act: str, groups: Groups) -> None:
        super().__init__()
        if up.out_features % groups.size:
            raise BadParameter(f"groups of {groups.size} do not divide {up.out_features} neurons; choose another size")
        self.gate, self.up, self.down, self.act, self.groups = gate, up, down, act, groups
        self.router = nn.Linear(up.in_features, up.out_features // groups.size, bias=False, dtype=torch.float32)
        self.threshold = math.log(groups.tau / (1 - groups.tau))
        self.rule: Rule = soft
        self.shares, self.turned = torch.empty(0), torch.empty(0)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """W x in fp32, whatever else runs in bf16."""
        with torch.autocast(x.device.type, enabled=False):
            return self.router(x.float())

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """What the output matrix reads, [..., F]."""
        act = ACTIVATIONS[self.act]
        return act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)

    def energies(self, neurons: torch.Tensor) -> torch.Tensor:
        """The square of what each group adds, fp32 [..., groups], as if columns of down were at right angles."""
        with torch.autocast(neurons.device.type, enabled=False):
            squares = neurons.float().square() * self.down.weight.float().square().sum(0)
        return squares.unflatten(-1, (-1, self.groups.size)).sum(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        neurons = self.neurons(x)
        self.shares = self.rule(self, x, neurons)
        grouped = neurons.unflatten(-1, (-1, self.groups.size))
        return self.down((grouped * self.shares.to(neurons.dtype).unsqueeze(-1)).flatten(-2))


def routed(model: nn.Module) -> dict[str, RoutedMlp]:
    """The routed FFNs of a model by path, in its order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, RoutedMlp)}


def place(spec: Spec, i: int) -> str:
    """The module of layer i that a RoutedMlp replaces: OPT has none for its FFN, so its first matrix has to serve."""
    return spec.path(i, spec.names.ffn if "." in spec.names.ffn_in[0] else spec.names.ffn_in[0])


@torch.no_grad()
def awake(model: PreTrainedModel, windows: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Which groups each token wakes under the model's rules: path of a routed FFN -> bool [tokens, groups].

    windows: batches of tokens, int64 [B, T].
    """
    found: dict[str, list[torch.Tensor]] = {}
    for tokens in windows:
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
        for path, module in routed(model).items():
            found.setdefault(path, []).append(
                (module.shares > module.groups.tau).view(-1, module.shares.shape[-1]).cpu()
            )
    return {path: torch.cat(parts) for path, parts in found.items()}


def routed_units(model: nn.Module, spec: Spec) -> dict[str, Unit]:
    """The routed FFNs of a model as units of the format routed_ffn, by the modules that they are in the model."""
    found = routed(model)
    places = {place(spec, i): path for i, path in enumerate(spec.ffns())}
    return {at: _unit(places[at], module) for at, module in found.items()}


def _unit(path: str, module: RoutedMlp) -> Unit:
    tensors = {"router": module.router.weight.detach()}
    for role in ("gate", "up", "down"):
        linear = getattr(module, role)
        if linear is not None:
            tensors[role] = linear.weight.detach()
            if linear.bias is not None:
                tensors[f"{role}_bias"] = linear.bias.detach()
    hidden = module.up.in_features
    params = {"group_size": module.groups.size, "tau": module.groups.tau, "activation": module.act}
    return Unit({path: (hidden, hidden)}, tensors, params)
