"""The vocabulary that every format shares: what a unit is before, on and after the disk.

Letters, here and in every kernel: M tokens (rows of x), N outputs, K inputs, R rank, T sequence,
H heads, D head size. Weights are [N, K] row-major, activations [M, K], whatever a checkpoint does.

    Unit (logical) --encode--> Packed (disk) --stack, prepare--> Prepared (device) --apply--> y
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Shapes = dict[str, tuple[int, int]]

FP32_ROLES = frozenset({"router"})
"""Tensors that stay fp32 whatever dtype a model is loaded in: they decide, and half a digit would decide otherwise."""


@dataclass(frozen=True)
class Unit:
    """The weights that one format stores together, under their logical names.

    modules: module path -> (N outputs, K inputs), in output order.
    tensors: a linear has `weight` [N, K] and perhaps `bias` [N]. An FFN is one module [N, K] and has `up` [F, K],
    `down` [N, F], perhaps `gate` [F, K] and biases of each, and a `router` [G, K], fp32 in models of any dtype.
    params: what the tensors do not say, JSON values only; a linear has none, an FFN its activation and its routing.
    """

    modules: Shapes
    tensors: dict[str, torch.Tensor]
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed:
    """A unit as it lies on disk: the smallest exact form, independent of any device.

    tensors: role -> tensor; on disk a role is stored as `<first module path>.<role>`.
    params: everything else that `decode` needs, JSON values only.
    """

    format: str
    version: int
    modules: Shapes
    tensors: dict[str, torch.Tensor]
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A unit laid out for one device: flat tensors and numbers, the only things that reach an op.

    outputs: for every path that `apply` takes, the widths of the fused outputs in order:
    q|k|v stacked under q's path has three widths, a lone linear one.
    """

    format: str
    outputs: dict[str, tuple[int, ...]]
    tensors: tuple[torch.Tensor | None, ...]
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()


class Around(NamedTuple):
    """What stands around a linear, each where it is given: y = act(linear(rms_norm(x))) + residual.

    norm: fp32 weight [K] of an RMSNorm with `eps`. act: one of fused.ACTIVATIONS, over outputs gate | up [M, 2 F], so
    that act(gate) * up [M, F] is left. residual: [M, N] or [M, F] contiguous, of x's dtype.
    """

    norm: torch.Tensor | None = None
    eps: float = 0.0
    act: str | None = None
    residual: torch.Tensor | None = None


@dataclass(frozen=True)
class Traffic:
    """What one application of a unit to M rows costs: bytes of weights read, and flops."""

    weight_bytes: int
    flops: int
