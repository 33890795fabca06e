"""A routed FFN and what stands around it against the same neurons dense, from one row to many, over cold weights.

Rows are independent and each wakes a known share of the groups, so that what several of them wake together is the
worst case. Bytes are those of the groups that the kernels themselves counted as read. TEAL's design (triton_peers.py),
at one row, reads as many weights as the routed half does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
"""Sparsity in percent -> share of the groups that a row wakes."""
GATHERING = "TEAL's design, half of the inputs"
ROWS = (1, 2, 4, 8, 16, 64, 256)
EPS = 1e-5
PATH = "m"

Tensor = torch.Tensor


class Subject:
    """The FFN of `model` at M rows. Every side is a function that gives a call on weights of its own."""

    def __init__(self, model: str, m: int, setting: Setting) -> None:
        config = setting.config(model)
        self.setting, self.hidden, self.neurons = setting, config["hidden_size"], config["intermediate_size"]
        self.size = 8 if setting.dry else 32
        self.x = self._random(m, self.hidden, scale=1.0)
        self.gate_up, self.down = self._random(2 * self.neurons, self.hidden), self._random(self.hidden, self.neurons)
        self.router = torch.randn(self.neurons // self.size, self.hidden, device=setting.device) * self.hidden**-0.5
        self.norm = torch.ones(self.hidden, device=setting.device)
        self.normed = fused.rms_norm_reference(self.x, self.norm, EPS)  # logits are near N(0, 1)

    def _random(self, *shape: int, scale: float | None = None) -> Tensor:
        drawn = torch.randn(shape, device=self.setting.device)
        return drawn.mul_(shape[-1] ** -0.5 if scale is None else scale).to(self.setting.dtype)

    def torchs(self) -> Call:
        """Two products of cuBLAS and our small steps between them."""
        gate_up, down = self.gate_up.clone(), self.down.clone()

        def call() -> Tensor:
            h = fused.gated_act(F.linear(fused.rms_norm(self.x, self.norm, EPS), gate_up), "silu")
            return torch.addmm(self.x, h, down.t())

        return call

    def dense(self) -> Call:
        """As the decoder runs it."""
        units = (Unit({PATH: (w.shape[0], w.shape[1])}, {"weight": w.clone()}) for w in (self.gate_up, self.down))
        ins, out = (Projection(((dense.prepare(dense.encode(unit), self.x.device), PATH),)) for unit in units)
        ffn, norm = Ffn(ins, out, "silu", gated=True), Norm("rms", EPS, self.norm, self.norm)
        slots = torch.ones(len(self.x), dtype=torch.int64, device=self.x.device)

        def call() -> Tensor:
            stream = ffn.onto(Stream(self.x), norm, slots)
            return stream.total if stream.branch is None else stream.total + stream.branch

        return call

    def packed(self, share: float) -> Packed:
        """The FFN routed, so that a row wakes that share of the groups."""
        gate, up = self.gate_up.chunk(2)
        tau = torch.special.ndtri(torch.tensor(1 - share)).sigmoid().item()
        tensors = {"gate": gate, "up": up, "down": self.down, "router": self.router}
        params = {"group_size": self.size, "tau": tau, "activation": "silu"}
        return routed_ffn.encode(Unit({PATH: (self.hidden, self.hidden)}, tensors, params))

    def routed(self, prepared: Prepared) -> Call:
        """As the decoder runs it; on a CPU step by step."""
        around = Around(self.norm, EPS, residual=self.x)

        def call() -> Tensor:
            y = routed_ffn.apply_around(self.x, prepared, PATH, around)
            return reference(self.x, lambda x: routed_ffn.apply(x, prepared, PATH), around) if y is None else y

        return call

    def gathering(self) -> Call:
        """Half of x skipped in gate | up, half of h in down; M = 1."""
        from .triton_peers import gather_gemv

        gate_up, down = self.gate_up.t().contiguous(), self.down.t().contiguous()
        least = self.normed.abs().float().median().item()
        h = fused.gated_act(gather_gemv(self.normed, gate_up, least), "silu")
        least_h = h.abs().float().median().item()

        def call() -> Tensor:
            x = fused.rms_norm(self.x, self.norm, EPS)
            h = fused.gated_act(gather_gemv(x, gate_up, least), "silu")
            return gather_gemv(h, down, least_h) + self.x

        return call

    def check(self, name: str, y: Tensor, packed: Packed | None) -> dict[str, float]:
        """RMS errors against the unrounded result. Raises KernelError if ours is larger than plain torch's."""

        def ffn(x: Tensor) -> Tensor:
            if packed is not None:
                return routed_ffn.reference(x, packed, PATH)
            h = fused.gated_act_reference(F.linear(x, self.gate_up.to(x.dtype)), "silu")
            return F.linear(h, self.down.to(x.dtype))

        own, truth = ffn(self.normed) + self.x, ffn(self.normed.float()) + self.x.float()
        error, bound = rms_error(y, own, truth)
        if name != TORCH and not error <= bound:
            raise KernelError(f"{name}: error {error:.3g}, torch's own allows {bound:.3g}")
        return {"ours": error, "torch": bound}


def run(part: Part, setting: Setting) -> None:
    """Every side in turns, from one row on: the most telling first."""
    ceiling = ceilings.ceiling(setting)
    part.note(ceiling_gb_per_s=ceiling)
    for m in setting.rows if setting.dry else ROWS:
        for model in MODELS:
            for row in _measured(Subject(model, m, setting), m, ceiling):
                part.row(model=model, **row)


def compile_all(model: str, m: int, setting: Setting) -> None:
    """Compile what `run` launches."""
    subject = Subject(model, m, setting)
    subject.dense()()
    for share in SHARES.values():
        subject.routed(routed_ffn.prepare(subject.packed(share), setting.device))()


def _measured(subject: Subject, m: int, ceiling: float) -> list[dict[str, Any]]:
    setting = subject.setting
    whole = subject.gate_up.nbytes + subject.down.nbytes
    makers: dict[str, tuple[Callable[[], Call], int]] = {
        TORCH: (subject.torchs, whole),
        dense.NAME: (subject.dense, whole),
    }
    rows: dict[str, dict[str, Any]] = {}
    packs: dict[str, Packed] = {}
    for percent, share in SHARES.items():
        name = f"routed {percent} %"
        packs[name] = packed = subject.packed(share)
        prepared = routed_ffn.prepare(packed, setting.device)
        subject.routed(prepared)()
        read = _groups_read(prepared)
        nbytes = int(whole * read / len(subject.router)) + subject.router.nbytes
        makers[name] = (_fresh(subject, packed), nbytes)
        rows[name] = {"share_read": read / len(subject.router)}
    if m == 1 and setting.device.type == "cuda":
        makers[GATHERING] = (subject.gathering, whole // 2)
    runs: dict[str, Recorded] = {}
    for name, (make, nbytes) in makers.items():
        rows[name] = {"side": name, "m": m, "bytes": nbytes} | rows.get(name, {})
        try:
            if name != GATHERING:
                rows[name]["error_rms"] = subject.check(name, make()(), packs.get(name))
            runs[name] = _recorded(make, nbytes, setting)
        except Exception as error:  # one broken kernel must not take the others' numbers along
            rows[name]["failed"] = f"{type(error).__name__}: {error}"[:500]
    seconds = in_turns(runs, setting.rounds)
    for name, taken in seconds.items():
        rows[name] |= summary(rows[name]["bytes"], taken, ceiling)
        if GATHERING in seconds:
            rows[name]["ratio_to_gathering"] = record.ratios(taken, seconds[GATHERING])
    compare(rows, seconds)
    return [rows[name] for name in makers]


def _fresh(subject: Subject, packed: Packed) -> Callable[[], Call]:
    """Makes a call on a layout of its own: `prepare` copies on a GPU."""
    return lambda: subject.routed(routed_ffn.prepare(packed, subject.x.device))


def _groups_read(prepared: Prepared) -> int:
    counts = prepared.tensors[-1]
    assert counts is not None
    return int(counts[2])


def _recorded(make: Callable[[], Call], nbytes: int, setting: Setting) -> Recorded:
    copies = [make() for _ in range(-(-setting.rotated // nbytes))]
    return Recorded(copies * -(-setting.recorded // (nbytes * len(copies))), setting.device)
