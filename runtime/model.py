"""The decoder: one forward pass for every family, obeying the switches of its `Spec`.

It works on ragged rows: all tokens of all sequences of a step stand one below the other, [T, hidden],
whether a sequence prefills a chunk or decodes one token. Only attention looks at who belongs to whom,
through the block tables of the batch.

    tokens -> embed -> ( norm -> q|k|v -> rotary + cache -> attention -> out
                         -> + -> norm -> FFN -> + ) x layers -> norm -> head -> logits

Steps that stand side by side here run as one kernel where there is one: a Projection offers its format what stands
around it, and attention takes the rotation along. What is not taken runs step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import EngineError
from ..kernels import attention, decode, formats, fused, routed_ffn
from ..kernels.unit import Around, Prepared
from ..spec import Layer, Spec
from .batch import Batch
from .cache import KVCache
from .rope import RotaryTable

Pools = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Stream:
    """The sum [M, width] that every layer adds to: total + branch, if there is one that the next norm will add."""

    total: torch.Tensor
    branch: torch.Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm where there is a bias or no weight at all. Parameters are fp32 [width]."""

    kind: str
    eps: float
    weight: torch.Tensor
    bias: torch.Tensor

    def of(self, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the stream, and its sum."""
        x, branch = stream.total, stream.branch
        if self.kind == "rms":
            if branch is None:
                return fused.rms_norm(x, self.weight, self.eps), x
            return fused.add_rms_norm(branch, x, self.weight, self.eps)
        if branch is None:
            return fused.layer_norm(x, self.weight, self.bias, self.eps), x
        return fused.add_layer_norm(branch, x, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Projection:
    """Linear modules that read the same input, in as few launches as their formats allow: [M, K] -> [M, sum N]."""

    parts: tuple[tuple[Prepared, str], ...]

    def __call__(self, x: torch.Tensor, wide: bool = False) -> torch.Tensor:
        """wide: in fp32, whatever x has."""
        outputs = [formats.by_name(prepared.format).apply(x, prepared, path, wide) for prepared, path in self.parts]
        return outputs[0] if len(outputs) == 1 else fused.concat(outputs)

    def of(self, norm: Norm | None, stream: Stream, act: str | None = None) -> tuple[torch.Tensor, Stream]:
        """self(norm(stream)), through a gated `act` if named; and the stream, its sum made."""
        if norm is not None and norm.kind == "rms" and stream.branch is None:
            y = self._with(stream.total, Around(norm.weight, norm.eps, act))
            if y is not None:
                return y, stream
        normed, total = (stream.total, stream.total) if norm is None else norm.of(stream)
        y = self(normed)
        return fused.gated_act(y, act) if act else y, Stream(total)

    def onto(self, stream: Stream, x: torch.Tensor) -> Stream:
        """stream + self(x)."""
        y = self._with(x, Around(residual=stream.total))
        return Stream(stream.total, self(x)) if y is None else Stream(y)

    def _with(self, x: torch.Tensor, around: Around) -> torch.Tensor | None:
        """The linear and what stands around it, where one format takes both."""
        if len(self.parts) > 1:
            return None
        prepared, path = self.parts[0]
        return formats.by_name(prepared.format).apply_around(x, prepared, path, around)


@dataclass(frozen=True)
class Ffn:
    """act(gate) * up, then down; or act(in), then out."""

    inputs: Projection
    output: Projection
    act: str
    gated: bool

    def onto(self, stream: Stream, norm: Norm | None, slots: torch.Tensor) -> Stream:
        """stream + self(norm(stream)); slots: of the batch, whose padding costs a dense FFN as much as other rows."""
        hidden, stream = self.inputs.of(norm, stream, self.act if self.gated else None)
        return self.output.onto(stream, hidden if self.gated else fused.act(hidden, self.act))


@dataclass(frozen=True)
class RoutedFfn:
    """An FFN that is one unit, of which every row wakes some groups (kernels/routed_ffn.py)."""

    prepared: Prepared
    path: str

    def onto(self, stream: Stream, norm: Norm | None, slots: torch.Tensor) -> Stream:
        """stream + self(norm(stream)); rows that only pad a batch, those of slot 0, wake nothing."""
        if norm is not None and norm.kind == "rms" and stream.branch is None:
            around = Around(norm.weight, norm.eps, residual=stream.total)
            y = routed_ffn.apply_around(stream.total, self.prepared, self.path, around, slots)
            if y is not None:
                return Stream(y)
        x, total = (stream.total, stream.total) if norm is None else norm.of(stream)
        return Stream(total, routed_ffn.apply(x, self.prepared, self.path, awake=slots))

    @property
    def use(self) -> FfnUse:
        """What it has done so far. On a GPU this waits for the device."""
        counts = self.prepared.tensors[-1]
        assert counts is not None
        return FfnUse(routed_ffn.groups_of(self.prepared), *counts.tolist())


class FfnUse(NamedTuple):
    """A routed FFN since it was loaded: its groups, the rows that it has seen, the groups that these woke.

    read: groups whose weights were read, once for all rows of a call.
    """

    groups: int
    rows: int
    woken: int
    read: int

    @property
    def sparsity(self) -> float:
        """Share of the groups that slept, over all rows; 0 before the first."""
        return 1 - self.woken / (self.groups * self.rows) if self.rows else 0.0


@dataclass(frozen=True)
class Block:
    """The weights of one decoder layer."""

    layer: Layer
    attn_norm: Norm
    qkv: Projection
    out: Projection
    ffn_norm: Norm
    ffn: Ffn | RoutedFfn
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class Weights:
    """Everything the decoder holds, on one device in one dtype (norms and rotary tables in fp32)."""

    embed: torch.Tensor  # [vocab, embed_dim]
    positions: torch.Tensor | None  # [max_positions + offset, hidden]
    project_in: Projection | None
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    project_out: Projection | None
    head: Projection | None  # an encoder is loaded without


@dataclass(frozen=True)
class Rows:
    """What the layers start from: the embedded tokens [T, hidden] and their rotary tables, fp32 [T, rotated / 2]."""

    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class _Step:
    """What every layer of one forward pass needs beside its weights."""

    batch: Batch
    cos: torch.Tensor
    sin: torch.Tensor


class Decoder:
    """A model ready to run. Calling it with a batch and its cache gives logits; `states` what the head would read."""

    def __init__(self, spec: Spec, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self.device = weights.embed.device
        self.dtype = weights.embed.dtype
        self._rotary = RotaryTable(spec.rope, self.device) if spec.rope else None

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Logits of the rows that the batch asks for: fp32 [R, vocab]. Writes K and V of all rows to the cache."""
        return self.run_layers(self.embed(batch), batch, cache)

    @torch.inference_mode()
    def states(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """The last hidden states of the rows that the batch asks for: [R, embed_dim] in the model's dtype."""
        return self._states(self.embed(batch), batch, cache)

    def embed(self, batch: Batch) -> Rows:
        """The first half of a call: whatever looks at tokens and positions."""
        hidden = self.weights.embed[batch.tokens]
        if self.weights.project_in:
            hidden = self.weights.project_in(hidden)
        if self.weights.positions is not None:
            hidden = hidden + self.weights.positions[batch.positions + self.spec.position_offset]
        return Rows(hidden, *self._rotary_rows(batch))

    def run_layers(self, rows: Rows, batch: Batch, cache: KVCache) -> torch.Tensor:
        """The second half: all that reads weights, cache, slots and block tables; logits as `__call__` gives them."""
        if self.weights.head is None:
            raise EngineError("the model was loaded without its head and gives no logits; load it with the head")
        return self.weights.head(self._states(rows, batch, cache), wide=True)

    def ffn_use(self) -> tuple[FfnUse | None, ...]:
        """Of every layer what its routed FFN has done so far, None where it is not routed."""
        ffns = (block.ffn for block in self.weights.blocks)
        return tuple(ffn.use if isinstance(ffn, RoutedFfn) else None for ffn in ffns)

    def _states(self, rows: Rows, batch: Batch, cache: KVCache) -> torch.Tensor:
        step = _Step(batch, rows.cos, rows.sin)
        layers = self._pre_norm if self.spec.pre_norm else self._post_norm
        hidden = layers(rows.hidden, step, cache)
        return self.weights.project_out(hidden) if self.weights.project_out else hidden

    def _rotary_rows(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self._rotary:
            return self._rotary(batch.positions, batch.rope_lens)
        none = torch.empty(len(batch.tokens), 0, dtype=torch.float32, device=self.device)
        return none, none

    def _pre_norm(self, hidden: torch.Tensor, step: _Step, cache: KVCache) -> torch.Tensor:
        """Each branch reads the norm of the sum so far; the sum itself is carried unnormalised."""
        stream = Stream(hidden)
        for block, pools in zip(self.weights.blocks, cache.layers, strict=True):
            stream = self._attend(stream, block.attn_norm, block, pools, step)
            stream = block.ffn.onto(stream, block.ffn_norm, step.batch.slots)
        return self._last_norm(stream, step.batch.logit_rows)

    def _last_norm(self, stream: Stream, rows: torch.Tensor) -> torch.Tensor:
        """The final norm of the last sum, of the rows asked for."""
        total, branch = stream.total, stream.branch
        if len(rows) < len(total):
            stream = Stream(total[rows], None if branch is None else branch[rows])
        if self.weights.final_norm is not None:
            return self.weights.final_norm.of(stream)[0]
        # The sum alone, by a kernel that gives it too.
        return stream.total if branch is None else self.weights.blocks[-1].ffn_norm.of(stream)[1]

    def _post_norm(self, hidden: torch.Tensor, step: _Step, cache: KVCache) -> torch.Tensor:
        """OPT-350m: every sum is normalised before it goes on."""
        stream = Stream(hidden)
        for block, pools in zip(self.weights.blocks, cache.layers, strict=True):
            stream = Stream(block.attn_norm.of(self._attend(stream, None, block, pools, step))[0])
            stream = Stream(block.ffn_norm.of(block.ffn.onto(stream, None, step.batch.slots))[0])
        rows = step.batch.logit_rows
        return stream.total[rows] if len(rows) < len(stream.total) else stream.total

    def _attend(self, stream: Stream, norm: Norm | None, block: Block, pools: Pools, step: _Step) -> Stream:
        """stream + attention(norm(stream))."""
        layer, batch, head_dim = block.layer, step.batch, self.spec.head_dim
        qkv, stream = block.qkv.of(norm, stream)
        norms = (block.q_norm.weight, block.k_norm.weight) if block.q_norm and block.k_norm else None
        turned = (step.cos, step.sin, *pools, batch.slots)
        heads = (layer.heads, layer.kv_heads, head_dim)
        told, how = (batch.context_lens, batch.block_tables), (layer.scale, layer.window)
        seen = None
        if batch.max_query == 1:
            seen = decode.decode(qkv, *turned, *told, *heads, norms, self.spec.norm_eps, *how)
        if seen is None:
            q = fused.rotary_cache(qkv, *turned, *heads, norms, self.spec.norm_eps)  # [T, H, D]
            seen = attention.paged_attention(q, *pools, batch.query_starts, *told, batch.max_query, *how)
        return block.out.onto(stream, seen.view(len(qkv), layer.heads * head_dim))
