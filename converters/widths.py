"""Layers that are narrower than the config says: fewer attention heads, fewer FFN neurons, by layer.

A cut says which outputs or inputs of a linear are left. The config of such a model keeps one number for each width, as
transformers wants it, and lists what the layers have under `layer_widths` (spec.py) where they differ from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import families
from ..errors import SourceError
from ..spec import WIDTHS, Layer, Spec

HEADS = {"gpt2": "n_head"}
FFN = {"gpt2": "n_inner", "opt": "ffn_dim"}
"""The config's key by family, where it is not num_attention_heads and intermediate_size."""


@dataclass(frozen=True)
class Kept:
    """What is left of a layer, as indices of what the config's own widths would be, ascending."""

    heads: Sequence[int]
    kv_heads: Sequence[int]
    neurons: Sequence[int]

    @property
    def counts(self) -> tuple[int, int, int]:
        """(heads, kv_heads, neurons)"""
        return len(self.heads), len(self.kv_heads), len(self.neurons)


@dataclass(frozen=True)
class Cut:
    """Outputs (dim 0) or inputs (dim 1) of a linear [N, K]. index: i64, those that are left of `width`."""

    dim: int
    index: torch.Tensor
    width: int

    def take(self, tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
        """What is left of a weight, stored [K, N] if transposed, or of a bias [N]."""
        if tensor.dim() == 1:
            return tensor if self.dim else tensor[self.index]
        return tensor.index_select(self.dim ^ transposed, self.index)

    def pad(self, tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
        """The reverse: zeros where something was cut."""
        if tensor.dim() == 1 and self.dim:
            return tensor
        dim = self.dim ^ transposed if tensor.dim() > 1 else 0
        shape = [self.width if i == dim else size for i, size in enumerate(tensor.shape)]
        return tensor.new_zeros(shape).index_copy(dim, self.index, tensor)


def whole(layer: Layer) -> Kept:
    """Nothing is cut."""
    return Kept(range(layer.heads), range(layer.kv_heads), range(layer.ffn))


def cuts(spec: Spec, i: int, kept: Kept) -> dict[str, Cut]:
    """Module path -> the cut of its weight, for the linears of layer `i` that lose something."""
    layer, names = spec.layers[i], spec.names
    q, kv = _rows(kept.heads, spec.head_dim), _rows(kept.kv_heads, spec.head_dim)
    widths = layer.heads * spec.head_dim, layer.kv_heads * spec.head_dim
    neurons = torch.tensor(kept.neurons)
    inputs = _outputs(names.qkv, (q, kv, kv), (widths[0], widths[1], widths[1])) | _outputs(
        names.ffn_in, (neurons, neurons)[: 1 + spec.gated], (layer.ffn, layer.ffn)[: 1 + spec.gated]
    )
    found = inputs | {names.out: Cut(1, q, widths[0]), names.ffn_out: Cut(1, neurons, layer.ffn)}
    return {spec.path(i, name): cut for name, cut in found.items() if len(cut.index) < cut.width}


def _rows(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _outputs(names: tuple[str, ...], parts: tuple[torch.Tensor, ...], widths: tuple[int, ...]) -> dict[str, Cut]:
    """The cuts of modules that stand side by side; of the one in which all are fused."""
    if len(names) > 1:
        return {name: Cut(0, part, width) for name, part, width in zip(names, parts, widths, strict=True)}
    starts = [sum(widths[:i]) for i in range(len(widths))]
    fused = torch.cat([part + start for part, start in zip(parts, starts, strict=True)])
    return {names[0]: Cut(0, fused, sum(widths))}


def within(spec: Spec, layer: Layer) -> list[Kept]:
    """Where each layer of `spec` stands in a model whose layers are all as wide as `layer`, which is none narrower."""
    wide, found = layer.heads // layer.kv_heads, []
    for own in spec.layers:
        group = own.heads // own.kv_heads
        heads = [kv * wide + j for kv in range(own.kv_heads) for j in range(group)]
        found.append(Kept(heads, range(own.kv_heads), range(own.ffn)))
    return found


def described(
    config: dict[str, Any], hidden: int, head_dim: int, layers: Iterable[tuple[int, int, int]]
) -> dict[str, Any]:
    """The config of a model with these (heads, kv_heads, ffn): one number where all layers agree, else a list too.

    The one number is the largest, so that what is cut can be padded again. Raises SourceError where no number of heads
    suits the family.
    """
    found = list(layers)
    family = str(config.get("model_type"))
    kv_heads, group = max(kv for _, kv, _ in found), max(heads // kv for heads, kv, _ in found)
    full = hidden // head_dim
    options = [(kv_heads * group, kv_heads), (full, max(1, full // group))]
    fixed = family in ("opt", "gpt2")  # whose head size is hidden / heads
    suits = [
        (heads, kv)
        for heads, kv in options
        if kv >= kv_heads and kv * group == heads and hidden % heads == 0 and (not fixed or heads * head_dim == hidden)
    ]
    if not suits:
        raise SourceError(
            f"layers of up to {kv_heads} key/value heads of {head_dim} with {group} heads each do not suit a {family} "
            f"model of hidden size {hidden}"
        )
    heads, kv = suits[0]
    ffn = max(ffn for _, _, ffn in found)
    changed = {HEADS.get(family, "num_attention_heads"): heads, FFN.get(family, "intermediate_size"): ffn}
    if not fixed:
        changed |= {"num_key_value_heads": kv, "head_dim": head_dim}
    stock = {key: value for key, value in config.items() if key not in (WIDTHS, "per_layer_config")} | changed
    if all(counts == (heads, kv, ffn) for counts in found):
        return stock
    names = ("heads", "kv_heads", "ffn")
    return stock | {WIDTHS: [dict(zip(names, counts, strict=True)) for counts in found]}


def stock_spec(config: dict[str, Any]) -> Spec:
    """The spec without what the layers lack."""
    return families.read({key: value for key, value in config.items() if key != WIDTHS})
