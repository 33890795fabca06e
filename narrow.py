"""A transformers model whose layers have their own widths: it is built with all layers alike, and then cut to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from .spec import Layer, Linear, Spec


def narrow(model: nn.Module, spec: Spec, inside: Callable[[str], str] = lambda path: path) -> None:
    """Give every layer of `model` the heads and FFN width of `spec`; parameters that change are left empty.

    inside: the path that a module has in this model, by the path in the spec.
    """
    for i, layer in enumerate(spec.layers):
        out = inside(spec.path(i, spec.names.out))
        _set_heads(model.get_submodule(out.rpartition(".")[0]), layer, spec)
    linears = spec.linears()
    for path in spec.in_layers():
        _resize(model.get_submodule(inside(path)), linears[path])


def _set_heads(attention: nn.Module, layer: Layer, spec: Spec) -> None:
    own = {
        "num_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "num_key_value_groups": layer.heads // layer.kv_heads,
        "split_size": layer.heads * spec.head_dim,
    }
    for name in own.keys() & vars(attention).keys():
        setattr(attention, name, own[name])
    if spec.family == "phi3":  # which asks the config where q ends
        config: Any = copy.copy(attention.config)
        config.num_attention_heads = layer.heads
        attention.config = config


def _resize(module: nn.Module, linear: Linear) -> None:
    shape = (linear.k, linear.n) if linear.transposed else (linear.n, linear.k)
    for name, size in (("weight", shape), ("bias", (linear.n,))):
        old = getattr(module, name, None)
        if old is not None and old.shape != size:
            setattr(module, name, nn.Parameter(old.new_empty(size), requires_grad=False))
    for name, count in (("out_features", linear.n), ("in_features", linear.k), ("nf", linear.n), ("nx", linear.k)):
        if hasattr(module, name):
            setattr(module, name, count)
