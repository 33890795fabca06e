"""Structured pruning that was saved as zeros: neurons and heads that contribute exactly nothing are left out.

A neuron contributes nothing when its column of the output matrix is zero, or when what feeds it is zero, biases
included. A head contributes nothing when its columns of the output projection are zero, or the values that it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from .. import families
from ..spec import Layer, Linear, Spec
from .finite import refuse_bad
from .sources.source import Skip, Source
from .widths import Cut, Kept, cuts, described, whole
from .zeros import violation

ALIGNED = 8
"""Widths of FFNs stay multiples of this, 16 bytes of bf16, so that kernels read whole vectors: a lone dead neuron in a
dense model is no reason to give it another shape."""

_FIRST = 64  # inputs that are looked at before a whole matrix is read
_ROWS = 8  # of a matrix that show whether it is 2:4


def drop_zeros(source: Source) -> Source:
    """`source` without what contributes exactly zero, its config saying so; `source` itself where all contributes.

    Reads little of weights that are not zero. What a compressed unit serves is left alone, and so is GGUF, which would
    be dequantised a second time for it.
    """
    if source.kind == "gguf":
        return source
    spec = families.read(source.config)
    seen = _Seen(spec)
    for name, tensor in source.tensors(lambda name: not seen.wants(name)):
        seen.look(name, tensor)
    layers = [seen.kept(i) for i in range(len(spec.layers))]
    found, notes = dict[str, Cut](), dict(source.notes)
    for i, kept in enumerate(layers):
        for path, cut in cuts(spec, i, kept).items():
            found[path] = cut
            notes[path] = _note(spec.layers[i], kept, path.endswith((*spec.names.ffn_in, spec.names.ffn_out)))
    if not found:
        return source
    config = described(source.config, spec.hidden, spec.head_dim, (kept.counts for kept in layers))

    def tensors(skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in source.tensors(skip):
            cut = found.get((spec.canonical(name) or "").rpartition(".")[0])
            if cut is None:
                yield name, tensor
            else:
                refuse_bad(name, tensor)  # also in what goes
                yield name, cut.take(tensor, spec.transposed)

    return replace(source, config=config, tensors=tensors, notes=notes)


def _note(layer: Layer, kept: Kept, ffn: bool) -> str:
    heads, kv_heads, neurons = kept.counts
    if ffn:
        return f"removed {layer.ffn - neurons} of {layer.ffn} neurons"
    removed = f"removed {layer.heads - heads} of {layer.heads} heads"
    groups = layer.kv_heads - kv_heads
    return removed + (f" in {groups} of {layer.kv_heads} groups" if groups and layer.heads > layer.kv_heads else "")


@dataclass
class _Seen:
    """Which rows and columns of a model's linears are zero, as far as that decides what can go."""

    spec: Spec
    _rows: dict[str, torch.Tensor] = field(default_factory=dict)  # path -> bool [N]
    _columns: dict[str, torch.Tensor] = field(default_factory=dict)  # path -> bool [K]
    _silent: dict[str, torch.Tensor] = field(default_factory=dict)  # path -> bool [N], where a zero row stays silent
    _two_four: set[str] = field(default_factory=set)
    _linears: dict[str, Linear] = field(default_factory=dict)

    def __post_init__(self) -> None:
        linears = self.spec.linears()
        self._linears = {path: linears[path] for path in self.spec.in_layers()}

    def wants(self, name: str) -> bool:
        """Whether this tensor has a say."""
        return (self.spec.canonical(name) or "").rpartition(".")[0] in self._linears

    def look(self, name: str, tensor: torch.Tensor) -> None:
        """Note what is zero; a tensor of a wrong shape is left to those who name it."""
        path, _, role = (self.spec.canonical(name) or "").rpartition(".")
        linear, names = self._linears[path], self.spec.names
        if role == "bias" and tuple(tensor.shape) == (linear.n,):
            below = self.spec.act == "relu" and path.endswith(names.ffn_in[0])  # which the activation reads
            self._silent[path] = tensor <= 0 if below else tensor == 0
        if role != "weight" or tensor.dim() != 2:
            return
        weight = tensor.t() if linear.transposed else tensor
        if tuple(weight.shape) != (linear.n, linear.k):
            return
        if path.endswith((names.out, names.ffn_out)):
            self._columns[path] = _zero_rows(weight.t())
            if violation(weight[:_ROWS] != 0) is None:
                self._two_four.add(path)
        else:
            self._rows[path] = _zero_rows(weight)

    def kept(self, i: int) -> Kept:
        """What of layer `i` contributes, and what has to stay for the shapes' sake."""
        layer, names = self.spec.layers[i], self.spec.names
        heads, kv_heads, neurons = whole(layer).heads, whole(layer).kv_heads, whole(layer).neurons
        values, unread = self._dead(i, names.qkv), self._columns.get(self.spec.path(i, names.out))
        if values is not None and unread is not None:
            heads, kv_heads = _heads(layer, unread, values[-layer.kv_heads * self.spec.head_dim :])
        inputs, unread = self._dead(i, names.ffn_in), self._columns.get(self.spec.path(i, names.ffn_out))
        if inputs is not None and unread is not None:
            dead = unread | inputs.view(-1, layer.ffn).any(0)
            if self.spec.path(i, names.ffn_out) in self._two_four:  # and would no longer be with columns shifted
                dead = dead.view(-1, 4).all(1).repeat_interleave(4)
            neurons = _aligned(dead)
        return Kept(heads, kv_heads, neurons)

    def _dead(self, i: int, names: tuple[str, ...]) -> torch.Tensor | None:
        """Outputs that are always zero, of these modules side by side; None where they are not all there."""
        found = []
        for path in (self.spec.path(i, name) for name in names):
            rows, silent = self._rows.get(path), self._silent.get(path)
            if rows is None or (self._linears[path].bias and silent is None):
                return None
            found.append(rows if silent is None else rows & silent)
        return torch.cat(found)


def _zero_rows(weight: torch.Tensor) -> torch.Tensor:
    """bool [N]: which rows of [N, K] are zero throughout. Only rows that begin with zeros are read."""
    left = torch.nonzero(weight[:, 0] == 0).flatten()
    for width in (_FIRST, weight.shape[1]):
        if len(left):
            left = left[(weight[left, :width] == 0).all(1)]
    found = torch.zeros(weight.shape[0], dtype=torch.bool)
    found[left] = True
    return found


def _heads(layer: Layer, columns: torch.Tensor, values: torch.Tensor) -> tuple[list[int], list[int]]:
    """(heads, key/value heads) that stay: whole groups go, and as many heads of each other group as all can spare.

    columns: bool [H D], zero columns of the output projection; values: bool [KV D], values that are always zero.
    """
    dead = columns.view(layer.kv_heads, layer.heads // layer.kv_heads, -1).all(2)
    dead = dead | values.view(layer.kv_heads, -1).all(1)[:, None]
    groups = torch.nonzero(~dead.all(1)).flatten().tolist() or [0]
    size = dead.shape[1] - min(int(dead[g].sum()) for g in groups)
    first = [sorted(torch.argsort(dead[g].int(), stable=True)[: max(1, size)].tolist()) for g in groups]
    return [g * dead.shape[1] + h for g, heads in zip(groups, first, strict=True) for h in heads], groups


def _aligned(dead: torch.Tensor) -> list[int]:
    """The neurons that are not dead, and as many dead ones as the alignment wants."""
    alive = int((~dead).sum())
    width = min(len(dead), -(-max(1, alive) // ALIGNED) * ALIGNED)
    return sorted(torch.argsort(dead.int(), stable=True)[:width].tolist())
