"""Dense FFNs become routed ones: neurons into groups, matrices into their order, and a router before them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .. import families
from ..errors import BadParameter
from ..spec import Spec
from .clustering import balanced_order
from .modelling import replace_linear, weight_of
from .record import Record
from .routed import Groups, RoutedMlp, place, routed
from .router_start import start_routers


def begin(
    model: PreTrainedModel,
    layers: Sequence[int],
    groups: Groups,
    windows: Sequence[torch.Tensor],
    share: float,
    seed: int,
    record: Record,
    progress: bool,
) -> None:
    """Route the FFNs of these layers, about `share` of their groups in; `record` keeps all of it in its part `start`.

    windows: batches of tokens, int64 [B, T], for the routers to begin with.
    """
    spec = families.read(model.config.to_dict())
    if record.holds("start"):
        saved = record.tensors("start")
        _route(model, spec, layers, saved, groups)
        for path, module in routed(model).items():
            module.router.weight.data.copy_(saved[f"router.{path}"])
        return
    weights = ((i, first_weight(model, spec, i)) for i in layers)
    bar = tqdm(weights, "grouping", len(layers), unit="layer", disable=not progress)
    orders = {f"order.{place(spec, i)}": balanced_order(weight.cpu(), groups.size, seed) for i, weight in bar}
    _route(model, spec, layers, orders, groups)
    start_routers(model, windows, share, progress)
    routers = {f"router.{path}": module.router.weight for path, module in routed(model).items()}
    record.save("start", orders | routers, {"size": groups.size, "tau": groups.tau})


def _route(
    model: PreTrainedModel, spec: Spec, layers: Sequence[int], orders: Mapping[str, torch.Tensor], groups: Groups
) -> None:
    for i in layers:
        route(model, spec, i, orders[f"order.{place(spec, i)}"], groups)
    model.requires_grad_(False)


def first_weight(model: PreTrainedModel, spec: Spec, i: int) -> torch.Tensor:
    """The matrix [F, K] whose rows say which neurons are alike: the gate, or the only one of the first step."""
    return next(iter(_inputs(model, spec, i)))[0]


def route(model: PreTrainedModel, spec: Spec, i: int, order: torch.Tensor, groups: Groups) -> RoutedMlp:
    """Put a RoutedMlp in the place of layer i's FFN, its neurons in `order`, int64 [F]; new parameters are copies.

    Raises BadParameter where the FFN is compressed already, or groups do not divide it.
    """
    inputs = _inputs(model, spec, i)
    *gate, up = [_linear(weight[order], None if bias is None else bias[order]) for weight, bias in inputs]
    path = spec.path(i, spec.names.ffn_out)
    bias = model.get_parameter(f"{path}.bias").detach() if spec.ffn_out_bias else None
    down = _linear(weight_of(model, path, spec.transposed)[:, order], bias)
    module = RoutedMlp(gate[0] if gate else None, up, down, spec.act, groups)
    replace_linear(model, place(spec, i), module)
    if place(spec, i) == spec.path(i, spec.names.ffn_in[0]):
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
