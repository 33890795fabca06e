"""Open questions of kernel design that only a GPU answers: each checks its probe against plain torch, then times it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from ...errors import KernelError
from ...kernels import tuning
from .. import record
from . import ceilings, triton_probes
from .layers import TORCH, lone, sides_of
from .measuring import measure_sets
from .report import Part
from .setting import Setting
from .timing import Recorded, in_turns, microseconds

SIX_SHAPES = ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (28672, 4096), (128256, 4096))
CHAIN = 200  # launches in a row
INTEGER = ("IADD", "IMAD", "LOP3", "SHF", "LEA", "ISETP", "PRMT", "SEL", "BFE", "I2I", "VIADD", "UIADD")


def bubble(part: Part, setting: Setting) -> None:
    """Time from one launch to the next in a graph, with and without programmatic dependent launch."""
    count = 3 if setting.dry else CHAIN
    name = tuning.target()
    x = torch.zeros(256 * tuning.MULTIPROCESSORS.get(name, 132), device=setting.device)
    modes = (False, True) if tuning.overlaps(name) else (False,)
    sides = {"overlapping" if early else "plain": _chain(x, count, early, setting) for early in modes}
    seconds = in_turns(sides, setting.rounds)
    for side, taken in seconds.items():
        part.row(side=side, launches=count, us_per_launch=[us / count for us in microseconds(taken)])


def _chain(x: torch.Tensor, count: int, early: bool, setting: Setting) -> Recorded:
    buffers = [torch.zeros_like(x) for _ in range(2)]

    def run() -> None:
        triton_probes.step(x, buffers[0], early)
        for i in range(1, count):
            triton_probes.step(buffers[(i + 1) % 2], buffers[i % 2], early)

    recorded = Recorded([run], setting.device)
    recorded()
    if not torch.equal(buffers[(count - 1) % 2], x + count):
        raise KernelError(f"a chain of {count} launches, early={early}, lost one")
    return recorded


def cublas(part: Part, setting: Setting) -> None:
    """F.linear at the six shapes of 7B and 8B models, M = 1 to 64: the baseline as it really is."""
    ceiling = ceilings.ceiling(setting)
    shapes = ((64, 64), (96, 64)) if setting.dry else SIX_SHAPES
    for n, k in shapes:
        for m in (1, 2) if setting.dry else (1, 2, 4, 8, 16, 32, 64):
            for row in measure_sets([[lone(n, k)]], m, sides_of((TORCH,)), setting, ceiling):
                part.row(n=n, k=k, **row)


def early_exit(part: Part, setting: Setting) -> None:
    """A static grid whose programs read a count on the device and stop, 20 % active, against a grid of that size."""
    piece = triton_probes.READ_BLOCK * triton_probes.READ_STEPS
    pieces = 5 if setting.dry else 20480  # 2.7 GB of fp32
    active = pieces // 5
    x = torch.ones(pieces * piece, device=setting.device)
    count = torch.tensor([active], dtype=torch.int32, device=setting.device)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "static grid, early exit": lambda: triton_probes.read(x, count),
        "grid of the active": lambda: triton_probes.read(x, count, active),
    }
    for name, call in calls.items():
        if not bool((call()[:active] == piece).all()):
            raise KernelError(f"{name}: a piece was not read")
    seconds = in_turns({name: Recorded([call], setting.device) for name, call in calls.items()}, setting.rounds)
    exact = seconds["grid of the active"]
    for name, taken in seconds.items():
        ratio = record.ratios(taken, exact)
        part.row(side=name, programs=pieces, active=active, time_us=microseconds(taken), ratio_to_exact=ratio)


def ell(part: Part, setting: Setting) -> None:
    """Row-lane ELL at half the weights: bytes per second, and integer instructions for each weight kept."""
    n, k, splits = (triton_probes.ELL_ROWS, 64, 2) if setting.dry else (4096, 4096, 32)
    columns = torch.rand(n, k // 2, 2, device=setting.device).argmax(-1) + 2 * torch.arange(k // 2).to(setting.device)
    values = torch.randn(n, k // 2, device=setting.device).to(setting.dtype)
    x = torch.randn(k, device=setting.device).to(setting.dtype)
    packed = [t.contiguous() for t in pack_ell(columns, values, splits)]
    out, kernel = triton_probes.ell(x, *packed)
    truth = (values.double() * x.double()[columns]).sum(1)
    _check("row-lane ELL", out.double().sum(0), truth, setting)
    nbytes = sum(t.nbytes for t in packed)
    copies = [[t.clone() for t in packed] for _ in range(triton.cdiv(setting.rotated, nbytes))]
    seconds = _rates(part, {"row-lane ELL": [_ell_call(x, tensors) for tensors in copies]}, nbytes, n * k, setting)
    part.note(integer_ops_per_weight=integer_ops(kernel), seconds_per_call=record.quartiles(seconds["row-lane ELL"]))


def _ell_call(x: torch.Tensor, tensors: list[torch.Tensor]) -> Callable[[], Any]:
    return lambda: triton_probes.ell(x, *tensors)


def pack_ell(columns: torch.Tensor, values: torch.Tensor, splits: int) -> tuple[torch.Tensor, ...]:
    """(values, words, starts) as triton_probes.ell reads them, of ascending columns and values [N, nnz]."""
    n, kept = columns.shape
    pieces = columns.view(n, splits, kept // splits)
    starts = pieces[:, :, 0]
    deltas = pieces.diff(dim=2, prepend=starts[:, :, None]).reshape(n, -1, triton_probes.DELTAS)
    if int(deltas.max()) > 15:
        raise ValueError(f"a gap of {int(deltas.max())} columns does not fit in 4 bits")
    shifts = 4 * torch.arange(triton_probes.DELTAS, device=columns.device)
    words = (deltas << shifts).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    return values.t(), words.t(), starts.t().int()


def integer_ops(kernel: Any) -> float | None:
    """Integer instructions of a compiled ELL kernel's loop for each weight that a thread reads; None if not read."""
    from ..compile_only import report

    if not hasattr(kernel, "asm"):
        return None
    loop = report(kernel).loop
    count = sum(times for name, times in loop.items() if name.startswith(INTEGER))
    return count / (triton_probes.DELTAS * triton_probes.ELL_ROWS / 64) if loop else None


def gather(part: Part, setting: Setting) -> None:
    """Half of the weights under a bitmap, put in place by tl.gather; and the same work without putting them."""
    n, k = (16, 128) if setting.dry else (11008, 4096)
    tile = triton_probes.TILE
    order = torch.rand(n, k // tile, tile, device=setting.device).argsort(-1)[..., : tile // 2].sort(-1).values
    values = torch.randn(n, k // 2, device=setting.device).to(setting.dtype)
    bits = (torch.ones_like(order) << order).sum(-1)
    x = torch.randn(k, device=setting.device).to(setting.dtype)
    columns = (order + tile * torch.arange(k // tile, device=setting.device)[:, None]).view(n, -1)
    truth = (values.double() * x.double()[columns]).sum(1)
    _check("tl.gather", triton_probes.expand(x, values, bits).double(), truth, setting)
    nbytes = values.nbytes + bits.nbytes
    copies = [(values.clone(), bits.clone()) for _ in range(triton.cdiv(setting.rotated, nbytes))]
    sides = {
        name: [_expand_call(x, *tensors, name == "tl.gather") for tensors in copies]
        for name in ("tl.gather", "without placing")
    }
    _rates(part, sides, nbytes, n * k, setting)


def _expand_call(x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, gathers: bool) -> Callable[[], Any]:
    return lambda: triton_probes.expand(x, values, bits, gathers)


def _rates(
    part: Part, sides: dict[str, list[Callable[[], Any]]], nbytes: int, weights: int, setting: Setting
) -> dict[str, list[float]]:
    """A row for each side: its own bytes, and what a dense matrix of 2-byte weights would have read in that time."""
    ceiling = ceilings.ceiling(setting)
    repeats = {name: triton.cdiv(setting.recorded, nbytes * len(calls)) for name, calls in sides.items()}
    runs = {name: Recorded(calls * repeats[name], setting.device) for name, calls in sides.items()}
    seconds = in_turns(runs, setting.rounds)
    for name, taken in seconds.items():
        middle = record.quartiles(taken)[1]
        part.row(
            side=name,
            time_us=microseconds(taken),
            bytes=nbytes,
            gb_per_s=nbytes / middle / 1e9,
            percent_of_ceiling=100 * nbytes / middle / 1e9 / ceiling,
            dense_equivalent_gb_per_s=2 * weights / middle / 1e9,
        )
    return seconds


def _check(name: str, result: torch.Tensor, truth: torch.Tensor, setting: Setting) -> None:
    """Products of the dtype are exact in fp32: what remains is the order of some thousand sums."""
    error = float((result - truth).abs().max() / truth.abs().max())
    if not error < 1e-4:
        raise KernelError(f"{name} in {setting.name}: relative error {error:.3g}")
