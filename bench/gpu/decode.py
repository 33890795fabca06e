"""Whole models of random weights that decode: Llama-2-7B and Llama-3-8B, dense, over pivoted bases, or half zero.

The weights are made on the device and go through the loader that users' folders go through. No rate is given for a
model whose decode step does not agree with a prefill of the same tokens, which takes other kernels, or whose recorded
step does not give the bits of the eager one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from ... import families
from ...compact import UnitEntry
from ...converters.groups import kinds, runs
from ...converters.low_rank import pivoted_rank, rank
from ...errors import KernelError
from ...kernels import dense, dispatch, shared_basis
from ...runtime import accounting
from ...runtime.batch import Batch, build_batch
from ...runtime.cache import KVCache
from ...runtime.engine import EngineCore, Model
from ...runtime.graphs import GraphedDecoder
from ...runtime.loader import _Loading
from ...runtime.model import Decoder
from ...runtime.params import SamplingParams
from ...runtime.sequence import Chunk, Sequence
from ...spec import Spec
from .. import record
from . import ceilings, zeros
from .report import Part
from .setting import GROUP, RATIOS, Setting
from .timing import seconds_of
from .zeros import Zeros

PAGE = 16
ROUNDED_PER_LAYER = 8  # norm, q|k|v, attention, out, sum, gate|up, act, down: as tensors that a layer makes


# --- random weights ------------------------------------------------------------------------------


class RandomFolder:
    """As much of an open compact folder as the loader asks for; tensors are drawn when they are read."""

    def __init__(
        self, spec: Spec, units: list[UnitEntry], shapes: dict[str, tuple[int, ...]], setting: Setting
    ) -> None:
        plain = tuple(spec.plain())
        self.manifest = SimpleNamespace(units=tuple(units), plain=plain)
        self._shapes, self._setting = shapes | spec.plain(), setting

    def tensor(self, name: str) -> torch.Tensor:
        """Norm weights are 1, pivots distinct columns, all others normal with variance 1 / K."""
        shape, dtype, on = self._shapes[name], self._setting.dtype, self._setting.device
        sparse = zeros.tensor(name, shape, self._setting)
        if sparse is not None:
            return sparse
        if name.endswith(".pivots"):
            r, inputs = shape
            return torch.randperm(inputs, device=on)[:r].sort().values.int()
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=on)
        return torch.randn(shape, dtype=torch.float32, device=on).mul_(shape[1] ** -0.5).to(dtype)


@dataclass(frozen=True)
class Bases:
    """Pivoted bases for all linears: compression in percent, layers that share one, and the rule of the ranks."""

    percent: float
    group: int = GROUP
    ranks: str = "paper"

    def rank(self, n: int, k: int, size: int) -> int:
        """The rank of a group of `size` linears [n, k]."""
        return (rank if self.ranks == "paper" else pivoted_rank)(self.percent / 100, n, k, size)

    def units(self, spec: Spec, shapes: dict[str, tuple[int, ...]]) -> Iterator[UnitEntry]:
        """The shared bases of every layer by the paper's rules; adds their tensors' shapes to `shapes`."""
        linears = spec.linears()
        for run in runs(spec, self.group):
            for kind in kinds(spec):
                for group in run.groups(spec, kind, kind.shared):
                    first = group.paths[0]
                    n, k = linears[first].n, linears[first].k
                    r = self.rank(n, k, group.size)
                    names = {"basis": f"{first}.basis", "pivots": f"{first}.pivots"}
                    names |= {f"coefficients.{path}": f"{path}.coefficients" for path in group.paths}
                    shapes |= {names["basis"]: (r, k - r), names["pivots"]: (r, k)}
                    shapes |= {f"{path}.coefficients": (n, r) for path in group.paths}
                    yield UnitEntry(shared_basis.NAME, shared_basis.VERSION, dict.fromkeys(group.paths, (n, k)), names)

    def __str__(self) -> str:
        return f"pivoted {self.percent:g} %"


Form = Bases | Zeros | None


def random_decoder(spec: Spec, form: Form, setting: Setting) -> Decoder:
    """A decoder of random weights in `form`, dense without one."""
    shapes: dict[str, tuple[int, ...]] = {}
    units = [*form.units(spec, shapes)] if form else []
    if spec.tied:
        head = {spec.names.head: (spec.vocab, spec.embed_dim)}
        units.append(UnitEntry(dense.NAME, dense.VERSION, head, {"weight": f"{spec.names.embed}.weight"}))
    served = {path for unit in units for path in unit.modules}
    for path, linear in spec.linears().items():
        if path not in served:
            shapes[f"{path}.weight"] = (linear.n, linear.k)
            modules = {path: (linear.n, linear.k)}
            units.append(UnitEntry(dense.NAME, dense.VERSION, modules, {"weight": f"{path}.weight"}))
    folder: Any = RandomFolder(spec, units, shapes, setting)
    return Decoder(spec, _Loading(folder, spec, setting.device, setting.dtype).weights())


# --- one model -----------------------------------------------------------------------------------


class Subject:
    """A model with its cache, and the tokens of one sequence whose last one is to be decoded."""

    def __init__(self, spec: Spec, form: Form, setting: Setting) -> None:
        self.form, self.setting, self.spec = str(form or dense.NAME), setting, spec
        self.decoder = random_decoder(spec, form, setting)
        self.modes: dict[str, Model] = {"eager": self.decoder, "recorded": GraphedDecoder(self.decoder)}
        self.limit = setting.context + setting.tokens + 2
        blocks, heads = 2 + self.limit // PAGE, [layer.kv_heads for layer in spec.layers]
        self.cache = KVCache(heads, spec.head_dim, blocks, PAGE, setting.dtype, setting.device)
        self.tokens = torch.randint(spec.vocab, (setting.context + 1,)).tolist()

    def batch(self, start: int, stop: int) -> Batch:
        """Tokens start:stop of the sequence, the others before them in the cache."""
        sequence = Sequence(0, self.tokens[:stop], stop, SamplingParams(), frozenset(), self.limit, stop)
        sequence.blocks = list(range(1, self.cache.num_blocks))
        return build_batch([Chunk(sequence, start, stop)], PAGE, self.setting.device)

    def step(self) -> Batch:
        """The batch of one decode step at full context."""
        return self.batch(self.setting.context, self.setting.context + 1)

    def check(self) -> dict[str, Any]:
        """Hold decode against prefill, and every mode against the eager step. Raises KernelError.

        Prefill and decode round independently: every tensor that a layer makes, and in fp32 every sum on the way.
        """
        whole = self.decoder(self.batch(0, self.setting.context + 1), self.cache).clone()
        self.decoder(self.batch(0, self.setting.context), self.cache)
        step = self.decoder(self.step(), self.cache).clone()
        rounded = 2 * ROUNDED_PER_LAYER * len(self.spec.layers)
        sums = self.spec.hidden if self.setting.dtype == torch.float32 else 1
        allowed = torch.finfo(self.setting.dtype).eps / 2 * math.sqrt(rounded * sums)
        found: dict[str, Any] = {"decode_to_prefill": _apart(step, whole), "allowed": allowed}
        for mode, model in self.modes.items():
            for _ in range(3):  # a step is recorded, then verified, then played
                logits = model(self.step(), self.cache)
            found[f"{mode}_to_eager"] = _apart(logits, step)
        wrong = {name: value for name, value in found.items() if not value <= allowed}
        if wrong:
            raise KernelError(f"{self.form}: logits are apart by {wrong}, rounding explains {allowed:.3g}")
        return found

    def weight_bytes(self) -> int:
        """Bytes of weights that the ops of one decode step receive, in their prepared layout."""
        spy = accounting.WeightSpy(list(accounting._tensors(self.decoder.weights)))
        batch = self.step()
        with spy:
            self.decoder(batch, self.cache)
        return sum(spy.read.values())

    def kv_bytes(self) -> int:
        """Bytes of keys and values that a step at full context reads."""
        heads = sum(layer.kv_heads for layer in self.spec.layers)
        return 2 * heads * self.spec.head_dim * (self.setting.context + 1) * self.setting.dtype.itemsize

    def tokens_per_second(self, mode: str) -> float:
        """The engine's rate after the first token, sampling and scheduling included."""
        context, count = self.setting.context, self.setting.tokens
        core = EngineCore(
            self.modes[mode], self.cache, context=self.limit, eos=frozenset(), max_batch=1, chunk=context + 1
        )
        core.add(self.tokens[:context], SamplingParams(max_tokens=count + 1, ignore_eos=True))
        while not core.step():
            pass
        _wait(self.setting)
        start = time.perf_counter()
        while core.busy:
            core.step()
        _wait(self.setting)
        return count / (time.perf_counter() - start)

    def step_seconds(self, mode: str, repeats: int = 8) -> float:
        """One decode step, its batch made before."""
        batch, model = self.step(), self.modes[mode]

        def steps() -> None:
            for _ in range(repeats):
                model(batch, self.cache)

        return seconds_of(steps, self.setting.device) / repeats


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance; infinite where one of the two is not finite."""
    distance = float((one.double() - other.double()).norm() / other.double().norm())
    return distance if math.isfinite(distance) else math.inf


def _wait(setting: Setting) -> None:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


# --- the stage -----------------------------------------------------------------------------------


def run(part: Part, setting: Setting, model: str) -> None:
    """Dense and pivoted models, of Llama-3-8B also sparse ones, side by side, eager and recorded, in turns."""
    ceiling = ceilings.ceiling(setting)
    part.note(model=model, ceiling_gb_per_s=ceiling, context=setting.context, generated=setting.tokens)
    spec = families.read(setting.config(model))
    subjects: dict[str, Subject] = {}
    sparse = zeros.ZEROS if model == "llama-3-8b" else ()
    for form in (None, *map(Bases, RATIOS), *sparse):
        subject = Subject(spec, form, setting)
        try:
            checked = subject.check()
        except Exception as error:  # one broken form must not take the others' numbers along
            part.row(form=subject.form, failed=f"{type(error).__name__}: {error}"[:500])
            continue
        subjects[subject.form] = subject
        part.note(**{subject.form: {"check": checked, **_counts(subject)}})
    for mode in ("recorded", "eager"):
        for row in rates(subjects, mode, setting, ceiling):
            part.row(**row)


def rates(subjects: dict[str, Subject], mode: str, setting: Setting, ceiling: float) -> Iterator[dict[str, Any]]:
    """A row for every subject, which take turns; the first turn is warm-up."""
    forms, rounds = list(subjects), 2 if setting.dry else 4
    speeds: dict[str, list[float]] = {form: [] for form in forms}
    steps: dict[str, list[float]] = {form: [] for form in forms}
    for turn in range(rounds + 1):
        for form in forms if turn % 2 else reversed(forms):
            speed, step = subjects[form].tokens_per_second(mode), subjects[form].step_seconds(mode)
            if turn:
                speeds[form].append(speed)
                steps[form].append(step)
    for form in forms:
        nbytes = subjects[form].weight_bytes()
        rate = record.quartiles(speeds[form])[1] * nbytes / 1e9
        base = speeds.get(dense.NAME)
        yield {
            "form": form,
            "mode": mode,
            "tokens_per_second": record.quartiles(speeds[form]),
            "step_us": [1e6 * s for s in record.quartiles(steps[form])],
            "bytes_per_token": nbytes,
            "kv_bytes": subjects[form].kv_bytes(),
            "gb_per_s": rate,
            "percent_of_ceiling": 100 * rate / ceiling,
        } | ({"ratio_to_dense": record.ratios(base, speeds[form])} if base else {})


def _counts(subject: Subject) -> dict[str, Any]:
    """What a recorded step is made of: fall-backs everywhere; launches and waits of the host on a GPU alone."""
    found: dict[str, Any] = {"fallbacks": {" ".join(key): count for key, count in dispatch.FALLBACKS.items()}}
    if subject.setting.device.type != "cuda":
        return found
    batch = subject.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        subject.decoder(subject.step(), subject.cache).argmax(-1)
        found["host_waits_in_a_step"] = 0
    except RuntimeError as error:
        found["host_waits_in_a_step"] = f"at least one: {error}"[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return found | _launches(subject, batch)


def _launches(subject: Subject, batch: Batch) -> dict[str, Any]:
    """Kernels and copies of one eager step as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        subject.decoder(batch, subject.cache)
        torch.cuda.synchronize()
    events = [event for event in seen.events() or () if event.device_type.name == "CUDA"]
    return {
        "launches_in_a_step": len(events),
        "launches_per_layer": len(events) / len(subject.spec.layers),
        "busy_us": sum(event.device_time for event in events),
    }
