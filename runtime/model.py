"""The decoder: one forward pass for every family, obeying the switches of its `Spec`.

It works on ragged rows: all tokens of all sequences of a step stand one below the other, [T, hidden],
whether a sequence prefills a chunk or decodes one token. Only attention looks at who belongs to whom,
through the block tables of the batch.

    tokens -> embed -> ( norm -> q|k|v -> rotary + cache -> attention -> out
                         -> + -> norm -> FFN -> + ) x layers -> norm -> head -> logits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import attention, formats, fused
from ..kernels.unit import Prepared
from ..spec import Layer, Spec
from .batch import Batch
from .cache import KVCache
from .rope import RotaryTable

Pools = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Projection:
    """Linear modules that read the same input, in as few launches as their formats allow: [M, K] -> [M, sum N]."""

    parts: tuple[tuple[Prepared, str], ...]

    def __call__(self, x: torch.Tensor, wide: bool = False) -> torch.Tensor:
        """wide: in fp32, whatever x has."""
        outputs = [formats.by_name(prepared.format).apply(x, prepared, path, wide) for prepared, path in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm where there is a bias or no weight at all. Parameters are fp32 [width]."""

    kind: str
    eps: float
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "rms":
            return fused.rms_norm(x, self.weight, self.eps)
        return fused.layer_norm(x, self.weight, self.bias, self.eps)

    def after_sum(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and that sum."""
        if self.kind == "rms":
            return fused.add_rms_norm(x, residual, self.weight, self.eps)
        total = residual + x
        return self(total), total


@dataclass(frozen=True)
class Ffn:
    """act(gate) * up, then down; or act(in), then out."""

    inputs: Projection
    output: Projection
    act: str
    gated: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inputs(x)
        return self.output(fused.gated_act(hidden, self.act) if self.gated else fused.act(hidden, self.act))


@dataclass(frozen=True)
class Block:
    """The weights of one decoder layer."""

    layer: Layer
    attn_norm: Norm
    qkv: Projection
    out: Projection
    ffn_norm: Norm
    ffn: Ffn
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
    head: Projection


@dataclass(frozen=True)
class _Step:
    """What every layer of one forward pass needs beside its weights."""

    batch: Batch
    cos: torch.Tensor
    sin: torch.Tensor


class Decoder:
    """A model ready to run. Calling it with a batch and its cache gives logits."""

    def __init__(self, spec: Spec, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self.device = weights.embed.device
        self.dtype = weights.embed.dtype
        self._rotary = RotaryTable(spec.rope, self.device) if spec.rope else None

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Logits of the rows that the batch asks for: fp32 [R, vocab]. Writes K and V of all rows to the cache."""
        hidden = self._embed(batch)
        step = _Step(batch, *self._rotary_rows(batch))
        layers = self._pre_norm if self.spec.pre_norm else self._post_norm
        hidden = layers(hidden, step, cache)
        if self.weights.project_out:
            hidden = self.weights.project_out(hidden)
        return self.weights.head(hidden, wide=True)

    def _embed(self, batch: Batch) -> torch.Tensor:
        hidden = self.weights.embed[batch.tokens]
        if self.weights.project_in:
            hidden = self.weights.project_in(hidden)
        if self.weights.positions is not None:
            hidden = hidden + self.weights.positions[batch.positions + self.spec.position_offset]
        return hidden

    def _rotary_rows(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self._rotary:
            return self._rotary(batch.positions, batch.rope_lens)
        none = torch.empty(len(batch.tokens), 0, dtype=torch.float32, device=self.device)
        return none, none

    def _pre_norm(self, hidden: torch.Tensor, step: _Step, cache: KVCache) -> torch.Tensor:
        """Each branch reads the norm of the sum so far; the sum itself is carried unnormalised."""
        branch: torch.Tensor | None = None
        for block, pools in zip(self.weights.blocks, cache.layers, strict=True):
            if branch is None:
                normed = block.attn_norm(hidden)
            else:
                normed, hidden = block.attn_norm.after_sum(branch, hidden)
            branch = self._attend(normed, block, pools, step)
            normed, hidden = block.ffn_norm.after_sum(branch, hidden)
            branch = block.ffn(normed)
        rows = step.batch.logit_rows
        total = hidden[rows] if branch is None else hidden[rows] + branch[rows]
        return self.weights.final_norm(total) if self.weights.final_norm else total

    def _post_norm(self, hidden: torch.Tensor, step: _Step, cache: KVCache) -> torch.Tensor:
        """OPT-350m: every sum is normalised before it goes on."""
        for block, pools in zip(self.weights.blocks, cache.layers, strict=True):
            hidden = block.attn_norm(hidden + self._attend(hidden, block, pools, step))
            hidden = block.ffn_norm(hidden + block.ffn(hidden))
        return hidden[step.batch.logit_rows]

    def _attend(self, x: torch.Tensor, block: Block, pools: Pools, step: _Step) -> torch.Tensor:
        layer, batch, head_dim = block.layer, step.batch, self.spec.head_dim
        qkv = block.qkv(x)
        if block.q_norm and block.k_norm:
            qkv = self._norm_heads(qkv, block, block.q_norm, block.k_norm)
        q = fused.rotary_cache(
            qkv, step.cos, step.sin, *pools, batch.slots, layer.heads, layer.kv_heads, head_dim
        )  # [T, H, D]
        seen = attention.paged_attention(
            q,
            *pools,
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            batch.max_query,
            layer.scale,
            layer.window,
        )
        return block.out(seen.view(len(x), layer.heads * head_dim))

    def _norm_heads(self, qkv: torch.Tensor, block: Block, q_norm: Norm, k_norm: Norm) -> torch.Tensor:
        """Qwen3 normalises every head of q and k on its own."""
        head_dim = self.spec.head_dim
        widths = [block.layer.heads * head_dim, block.layer.kv_heads * head_dim, block.layer.kv_heads * head_dim]
        q, k, v = qkv.split(widths, dim=-1)
        q = q_norm(q.reshape(-1, head_dim)).view(q.shape)
        k = k_norm(k.reshape(-1, head_dim)).view(k.shape)
        return torch.cat([q, k, v], dim=-1)
