"""An FFN of which each token wakes only some groups of neurons: what LTE puts in the place of a family's own MLP.

    soft    FFN(x) = sum_g G_g(x) E_g(x)         G = sigmoid(W x), W [groups, hidden] fp32: all groups are computed
    hard    FFN(x) = sum_{g: G_g(x) > tau} E_g(x)    a group is in or out, its score no longer counts

E_g are the neurons g * size to (g + 1) * size - 1 behind the family's activation; neurons are reordered once, which
changes nothing but the order of a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import BadParameter
from ..kernels.fused import ACTIVATIONS
from ..spec import Spec
from .modelling import replace_linear, weight_of

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

    rule: `soft`, `hard`, or another. shares: [..., groups], what the last call gave to each group.
    """

    def __init__(self, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear, act: str, groups: Groups) -> None:
        super().__init__()
        if up.out_features % groups.size:
            raise BadParameter(f"groups of {groups.size} do not divide {up.out_features} neurons; choose another size")
        self.gate, self.up, self.down, self.act, self.groups = gate, up, down, act, groups
        self.router = nn.Linear(up.in_features, up.out_features // groups.size, bias=False, dtype=torch.float32)
        self.threshold = math.log(groups.tau / (1 - groups.tau))
        self.rule: Rule = soft
        self.shares = torch.empty(0)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """W x in fp32, whatever else runs in bf16."""
        with torch.autocast(x.device.type, enabled=False):
            return self.router(x.float())

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """What the output matrix reads, [..., F]."""
        act = ACTIVATIONS[self.act]
        return act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        neurons = self.neurons(x)
        self.shares = self.rule(self, x, neurons)
        grouped = neurons.unflatten(-1, (-1, self.groups.size))
        return self.down((grouped * self.shares.to(neurons.dtype).unsqueeze(-1)).flatten(-2))


def routed(model: nn.Module) -> dict[str, RoutedMlp]:
    """The routed FFNs of a model by path, in its order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, RoutedMlp)}


def ffn_path(spec: Spec, i: int) -> str:
    """The module that a layer's FFN is, and that a RoutedMlp replaces: OPT has none, its first matrix stands for it."""
    first = spec.path(i, spec.names.ffn_in[0])
    return first.rpartition(".")[0] if "." in spec.names.ffn_in[0] else first


def first_weight(model: PreTrainedModel, spec: Spec, i: int) -> torch.Tensor:
    """The matrix [F, K] whose rows say which neurons are alike: the gate, or the only one of the first step."""
    return next(iter(_inputs(model, spec, i)))[0]


def route(model: PreTrainedModel, spec: Spec, i: int, order: torch.Tensor, groups: Groups) -> RoutedMlp:
    """Put a RoutedMlp in the place of layer i's FFN, its neurons in `order`, int64 [F]; new parameters are copies.

    Raises BadParameter where the FFN is compressed already, or groups do not divide it.
    """
    *gate, up = [_linear(weight[order], bias if bias is None else bias[order]) for weight, bias in _inputs(model, spec, i)]
    path = spec.path(i, spec.names.ffn_out)
    bias = model.get_parameter(f"{path}.bias").detach() if spec.ffn_out_bias else None
    down = _linear(weight_of(model, path, spec.transposed)[:, order], bias)
    module = RoutedMlp(gate[0] if gate else None, up, down, spec.act, groups)
    replace_linear(model, ffn_path(spec, i), module)
    if ffn_path(spec, i) == spec.path(i, spec.names.ffn_in[0]):
        for name in (spec.names.ffn_out, "activation_fn"):
            replace_linear(model, spec.path(i, name), nn.Identity())
    return module


def _inputs(model: PreTrainedModel, spec: Spec, i: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(weight [F, K], bias [F]) of gate and up, or of the one matrix that is there, however the family stores them."""
    for name in spec.names.ffn_in:
        path = spec.path(i, name)
        if not hasattr(model.get_submodule(path), "weight"):
            raise BadParameter(f"{path} is compressed already; give --method lte before the one that did it")
        weight = weight_of(model, path, spec.transposed)
        bias = model.get_parameter(f"{path}.bias").detach() if spec.ffn_in_bias else None
        parts = len(weight) // spec.layers[i].ffn
        biases = bias.chunk(parts) if bias is not None else [None] * parts
        yield from zip(weight.chunk(parts), biases, strict=True)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear of these tensors [N, K] and [N]."""
    outputs, inputs = weight.shape
    made = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return made
