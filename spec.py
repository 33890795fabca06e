"""What a decoder is, as data: a `Spec` of plain switches, and the names and shapes of all its tensors.

families.py fills it from a `config.json`; converters, loader and decoder read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from .errors import UnsupportedModel

WIDTHS = "layer_widths"
"""The config's key, of ours, for layers that differ: one {"heads", "kv_heads", "ffn"} for each, in order."""


@dataclass(frozen=True)
class Names:
    """Where a family keeps its modules. Layer names are relative to `layer`, with the index in `{i}`."""

    layer: str
    qkv: tuple[str, ...]  # three modules, or one that is already fused
    out: str
    ffn_in: tuple[str, ...]  # gate and up, one fused gate|up, or one plain input matrix
    ffn_out: str
    attn_norm: str
    ffn_norm: str
    embed: str
    final_norm: str
    positions: str = ""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    project_in: str = ""
    project_out: str = ""
    head: str = "lm_head"
    ffn: str = "mlp"  # the whole FFN as one module; OPT has none of its own


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the first `dim` of each head are rotated. Fields beyond `kind` follow its paper.

    kind: default, linear, dynamic, llama3, yarn or longrope. `max_positions` is the trained (dynamic)
    and `original` the pre-scaling context in tokens; `attention_factor` multiplies cos and sin.
    """

    kind: str
    theta: float
    dim: int
    max_positions: int
    factor: float = 1.0
    original: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One block. `window` is the number of keys a query may see, itself included; 0 means all of them."""

    heads: int
    kv_heads: int
    ffn: int
    window: int
    scale: float  # multiplies q·k before the softmax


@dataclass(frozen=True)
class Linear:
    """A linear module: `n` outputs, `k` inputs. `splits` are the widths of what is fused in its outputs.

    transposed: the checkpoint stores [k, n] (GPT-2's Conv1D).
    """

    path: str
    n: int
    k: int
    bias: bool
    transposed: bool = False
    splits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spec:
    """Everything the decoder must know about a model, as plain switches."""

    family: str
    names: Names
    vocab: int
    hidden: int
    embed_dim: int  # differs from hidden where OPT projects its embeddings
    head_dim: int
    layers: tuple[Layer, ...]
    max_positions: int
    tied: bool
    norm: str  # "rms" or "layer"
    norm_eps: float
    norm_affine: bool
    pre_norm: bool  # False: OPT-350m normalises after each residual sum
    final_norm: bool
    gated: bool
    act: str
    qkv_bias: bool
    out_bias: bool
    ffn_in_bias: bool
    ffn_out_bias: bool
    qk_norm: bool
    rope: Rope | None
    position_offset: int = 0  # learned positions start at this row
    transposed: bool = False
    causal: bool = True  # False: a token sees those after it too, as encoders' tokens may

    @property
    def rope_switch(self) -> int | None:
        """Context in tokens beyond which a growing sequence is recomputed with longrope's long factors.

        Phi-3 alone does that in transformers; elsewhere keys that were written before keep their rotation.
        """
        longrope = self.family == "phi3" and self.rope is not None and self.rope.kind == "longrope"
        return self.rope.original if longrope and self.rope else None

    @property
    def projected(self) -> bool:
        return self.embed_dim != self.hidden

    def path(self, layer: int, name: str) -> str:
        """The full module path of a layer-relative name."""
        return self.names.layer.format(i=layer) + name

    def narrowed(self, widths: Any) -> Spec:
        """The spec whose layers have the widths that a config lists under WIDTHS. Raises UnsupportedModel."""
        if not isinstance(widths, list) or len(widths) != len(self.layers):
            raise UnsupportedModel(f"{WIDTHS} must list {len(self.layers)} layers, got {widths!r}")
        layers = []
        for i, (layer, given) in enumerate(zip(self.layers, widths, strict=True)):
            own = given if isinstance(given, dict) else {}
            counts: list[Any] = [own.get(key) for key in ("heads", "kv_heads", "ffn")]
            if not all(isinstance(count, int) and count > 0 for count in counts) or counts[0] % counts[1]:
                raise UnsupportedModel(
                    f"{WIDTHS} gives layer {i} {given!r}; it needs positive heads, kv_heads and ffn, "
                    "and heads in multiples of kv_heads"
                )
            heads, kv_heads, ffn = counts
            layers.append(replace(layer, heads=heads, kv_heads=kv_heads, ffn=ffn))
        return replace(self, layers=tuple(layers))

    def linears(self) -> dict[str, Linear]:
        """Every linear module, in the order of the forward pass; the head is included when it is its own."""
        found = [linear for i in range(len(self.layers)) for linear in self._layer_linears(i)]
        if self.projected:
            found.insert(0, Linear(self.names.project_in, self.hidden, self.embed_dim, bias=False))
            found.append(Linear(self.names.project_out, self.embed_dim, self.hidden, bias=False))
        if not self.tied:
            found.append(Linear(self.names.head, self.vocab, self.embed_dim, bias=False))
        return {linear.path: linear for linear in found}

    def in_layers(self) -> set[str]:
        """The paths of the linears inside the layers: all but the head and the projections of embeddings."""
        return {linear.path for i in range(len(self.layers)) for linear in self._layer_linears(i)}

    def ffns(self) -> dict[str, dict[str, Linear]]:
        """Path of each layer's FFN as one module [hidden, hidden] -> the linears that it consists of."""
        found = {}
        for i in range(len(self.layers)):
            own = {self.path(i, name) for name in (*self.names.ffn_in, self.names.ffn_out)}
            found[self.path(i, self.names.ffn)] = {
                linear.path: linear for linear in self._layer_linears(i) if linear.path in own
            }
        return found

    def _layer_linears(self, i: int) -> list[Linear]:
        layer = self.layers[i]
        q, kv = layer.heads * self.head_dim, layer.kv_heads * self.head_dim
        ffn_widths = (layer.ffn, layer.ffn) if self.gated else (layer.ffn,)

        def fused(names: tuple[str, ...], widths: tuple[int, ...], bias: bool) -> list[Linear]:
            parts = [widths] if len(names) == 1 else [(w,) for w in widths]
            return [
                Linear(self.path(i, name), sum(part), self.hidden, bias, self.transposed, part)
                for name, part in zip(names, parts, strict=True)
            ]

        def lone(name: str, k: int, bias: bool) -> Linear:
            return Linear(self.path(i, name), self.hidden, k, bias, self.transposed, (self.hidden,))

        return [
            *fused(self.names.qkv, (q, kv, kv), self.qkv_bias),
            lone(self.names.out, q, self.out_bias),
            *fused(self.names.ffn_in, ffn_widths, self.ffn_in_bias),
            lone(self.names.ffn_out, layer.ffn, self.ffn_out_bias),
        ]

    def plain(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that belongs to no linear module: embeddings and norms, name -> shape."""
        found: dict[str, tuple[int, ...]] = {f"{self.names.embed}.weight": (self.vocab, self.embed_dim)}
        if self.names.positions:
            rows = self.max_positions + self.position_offset
            found[f"{self.names.positions}.weight"] = (rows, self.hidden)
        for i in range(len(self.layers)):
            for name in (self.names.attn_norm, self.names.ffn_norm):
                found |= self._norm(self.path(i, name), self.hidden)
            if self.qk_norm:
                for name in (self.names.q_norm, self.names.k_norm):
                    found |= self._norm(self.path(i, name), self.head_dim)
        if self.final_norm:
            found |= self._norm(self.names.final_norm, self.hidden)
        return found

    def _norm(self, path: str, width: int) -> dict[str, tuple[int, ...]]:
        if not self.norm_affine:
            return {}
        parts = ("weight", "bias") if self.norm == "layer" else ("weight",)
        return {f"{path}.{part}": (width,) for part in parts}

    def canonical(self, name: str) -> str | None:
        """The name this model gives to a checkpoint's tensor; None for a buffer that holds no weight.

        Checkpoints of the bare backbone lack the leading module. A tied head stored a second time is
        named like the embedding: whoever reads both must find them equal.
        """
        if re.search(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|(^|\.)decoder\.version)$", name):
            return None
        if self.tied and name == f"{self.names.head}.weight":
            return f"{self.names.embed}.weight"
        if name.startswith(f"{self.names.head}."):
            return name
        prefix, _, rest = self.names.embed.rpartition(".")[0].partition(".")
        if not name.startswith(f"{prefix}."):
            name = f"{prefix}.{name}"
        if rest and not name.startswith(f"{prefix}.{rest}."):
            return f"{prefix}.{rest}.{name.removeprefix(prefix + '.')}"
        return name
