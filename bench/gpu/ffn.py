"""A routed FFN and what stands around it against the same neurons dense, from one row to many, over cold weights.

Rows are independent and wake a known share of the groups, so that what several of them wake together is the worst
case. Bytes are those of the groups that the kernels themselves counted as read. TEAL's design (triton_peers.py), at
one row, reads as many bytes as the routed half does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...errors import KernelError
from ...kernels import dense, fused, routed_ffn
from ...kernels.around import reference
from ...kernels.unit import Around, Packed, Prepared, Unit
from ...runtime.model import Ffn, Norm, Projection, Stream
from .. import record
from ..truth import rms_error
from . import ceilings
from .layers import TORCH
from .measuring import compare, summary
from .report import Part
from .setting import MODELS, Setting
from .timing import Call, Recorded, in_turns

SHARES = {50: 0.5, 80: 0.2}
"""Sparsity in percent, share of the groups that a row wakes."""
GATHERING = "TEAL's design, half of the inputs"
EPS = 1e-5
ROWS, DRY_ROWS = (1, 2, 4, 8, 16, 64, 256), (1, 2, 33)
PATH = "m"

Tensor = torch.Tensor


class Shape(NamedTuple):
    hidden: int
    neurons: int
    size: int

    @classmethod
    def of(cls, model: str, setting: Setting) -> Shape:
        """The FFN of `model`, in groups of the paper's size or in dry mode of eight."""
        config = setting.config(model)
        return cls(config["hidden_size"], config["intermediate_size"], 8 if setting.dry else 32)


class Subject:
    """One FFN at M rows of a setting, and a call for each side on fresh copies of its weights."""

    def __init__(self, shape: Shape, m: int, setting: Setting) -> None:
        self.shape = shape
        self._setting = setting
        hidden, neurons, size = shape
        self.x, self.norm = self._random(m, hidden, scale=1.0), torch.ones(hidden, device=setting.device)
        self.gate_up, self.down = self._random(2 * neurons, hidden), self._random(hidden, neurons)
        self.router = torch.randn(neurons // size, hidden, device=setting.device) * hidden**-0.5  # logits near N(0, 1)
        self.around = Around(self.norm, EPS, residual=self.x)
        self.normed = fused.rms_norm_reference(self.x, self.norm, EPS)

    def _random(self, *shape: int, scale: float | None = None) -> Tensor:
        drawn = torch.randn(shape, device=self._setting.device)
        return drawn.mul_(shape[-1] ** -0.5 if scale is None else scale).to(self._setting.dtype)

    # --- sides: a function that gives a call on fresh weights -------------------------------------

    def torchs(self) -> Call:
        gate_up, down = self.gate_up.clone(), self.down.clone()

        def call() -> Tensor:
            h = fused.gated_act(F.linear(fused.rms_norm(self.x, self.norm, EPS), gate_up), "silu")
            return torch.addmm(self.x, h, down.t())

        return call

    def dense(self) -> Call:
        """As the decoder runs it."""
        ins, out = (_linear(weight.clone()) for weight in (self.gate_up, self.down))
        ffn = Ffn(Projection(((ins, PATH),)), Projection(((out, PATH),)), "silu", gated=True)
        norm = Norm("rms", EPS, self.norm, self.norm)

        def call() -> Tensor:
            stream = ffn.onto(Stream(self.x), norm)
            return stream.total if stream.branch is None else stream.total + stream.branch

        return call

    def packed(self, sparsity: int) -> Packed:
        """The routed FFN whose rows wake a share of SHARES."""
        gate, up = self.gate_up.chunk(2)
        tau = torch.special.ndtr(torch.tensor(0.0)).item()  # sigmoid(0) = 0.5
        if SHARES[sparsity] != tau:
            tau = torch.special.ndtri(torch.tensor(1 - SHARES[sparsity])).sigmoid().item()
        tensors = {"gate": gate, "up": up, "down": self.down, "router": self.router}
        params = {"group_size": self.shape.size, "tau": tau, "activation": "silu"}
        k = self.shape.hidden
        return routed_ffn.encode(Unit({PATH: (k, k)}, tensors, params))

    def routed(self, packed: Packed) -> tuple[Call, Tensor]:
        """A call, and the counts that it adds to."""
        prepared: Prepared = routed_ffn.prepare(packed, self.x.device)
        prepared = prepared._replace_tensors() if False else prepared
        counts = prepared.tensors[-1]
        assert counts is not None

        def call() -> Tensor:
            y = routed_ffn.apply_around(self.x, prepared, PATH, self.around)
            return reference(self.x, lambda x: routed_ffn.apply(x, prepared, PATH), self.around) if y is None else y

        return call, counts
