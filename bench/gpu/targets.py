"""The speed targets that apply to what is built today, held against a report: reached, not, or not measured.

The value of a target is the worst of the cases that it names; where it names a whole stage, all of it must be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Data = dict[str, Any]
REACHED, MISSED, UNMEASURED = "reached", "not", "not measured"


@dataclass(frozen=True)
class Target:
    """`value` reads a report; it gives None where the report lacks the rows. most: the value must not be above it."""

    id: str
    what: str
    target: float
    value: Callable[[Data], float | None]
    most: bool = False

    def judge(self, data: Data) -> dict[str, Any]:
        """The target as a row of the report."""
        value = self.value(data)
        if value is None or data["dry"]:
            state = UNMEASURED
        else:
            state = REACHED if (value <= self.target if self.most else value >= self.target) else MISSED
        return {"id": self.id, "what": self.what, "target": self.target, "value": value, "state": state}


def judge(data: Data) -> list[dict[str, Any]]:
    """Every target, in order."""
    return [target.judge(data) for target in TARGETS]


def rows_of(data: Data, stage: str, whole: bool = False, **wanted: Any) -> Iterator[dict[str, Any]]:
    """Rows of a stage that hold these values and a time. whole: none, unless the stage ended and no side failed."""
    found = data["stages"].get(stage, {"rows": []})
    if whole and (found.get("state") != "done" or any("failed" in row for row in found["rows"])):
        return
    for row in found["rows"]:
        if "failed" not in row and all(row.get(key) == value for key, value in wanted.items()):
            yield row


def _least(values: Iterable[float]) -> float | None:
    return min(values, default=None)


def _share(least: int, most: int) -> Callable[[Data], float | None]:
    """The worst share of the ceiling among dense kernels at one row whose weights have so many megabytes."""

    def value(data: Data) -> float | None:
        rows = rows_of(data, "kernels", whole=True, side="dense", m=1)
        return _least(row["percent_of_ceiling"] / 100 for row in rows if least <= row["bytes"] / 1e6 < most)

    return value


def _layer_ratio(model: str, side: str) -> Callable[[Data], float | None]:
    def value(data: Data) -> float | None:
        return _least(row["ratio"][1] for row in rows_of(data, "sweep", model=model, side=side, m=1))

    return value


def _to_twice(data: Data) -> float | None:
    """The pivoted layer against the factored one as two of cuBLAS's products a module, medians."""
    of_model: Data = {"model": "llama-2-7b", "m": 1}
    ours = _least(r["time_us"][1] for r in rows_of(data, "sweep", side="shared_basis pivoted 20 %", **of_model))
    theirs = _least(r["time_us"][1] for r in rows_of(data, "sweep", side="F.linear twice", **of_model))
    return None if ours is None or theirs is None else theirs / ours


def _to_torch(side: str) -> Callable[[Data], float | None]:
    """The worst layer of `side` at one row against cuBLAS."""

    def value(data: Data) -> float | None:
        rows = rows_of(data, "sweep", side=side, m=1)
        return _least(row["ratio_to_torch"][1] for row in rows if "ratio_to_torch" in row)

    return value


def _decode(key: str, form: str, index: int | None = 1, scale: float = 1.0) -> Callable[[Data], float | None]:
    def value(data: Data) -> float | None:
        rows = rows_of(data, "decode-llama-3-8b", form=form, mode="recorded")
        found = (row.get(key) for row in rows)
        return _least(scale * (v if index is None else v[index]) for v in found if v is not None)

    return value


def _peer(side: str) -> Callable[[Data], float | None]:
    def value(data: Data) -> float | None:
        return _least(row["ratio"][1] for row in rows_of(data, "peers", side=side))

    return value


def _note(key: str, form: str) -> Callable[[Data], float | None]:
    def value(data: Data) -> float | None:
        stage = data["stages"].get("decode-llama-3-8b", {})
        found = stage.get(form, {}).get(key)
        return float(found) if isinstance(found, (int, float)) else None

    return value


def _idle(data: Data) -> float | None:
    """What a recorded dense step takes beyond the time that its kernels were seen busy."""
    busy = _note("busy_us", "dense")(data)
    step = _decode("step_us", "dense")(data)
    return None if busy is None or step is None else max(0.0, 1 - busy / step)


def _sweep_floor(data: Data) -> float | None:
    """The worst ratio to cuBLAS of any format's best form, M = 1 to 64: sides that must win, so dense and pivoted."""
    rows = rows_of(data, "sweep", whole=True)
    own = (row for row in rows if row["format"] != "torch" and "factored" not in row["side"] and row["m"] <= 64)
    return _least(row["ratio_to_torch"][1] for row in own if "ratio_to_torch" in row)


def _routed(percent: int, m: int, key: str = "ratio") -> Callable[[Data], float | None]:
    """The worst model's median ratio of the routed FFN of that sparsity."""

    def value(data: Data) -> float | None:
        rows = rows_of(data, "ffn", side=f"routed {percent} %", m=m)
        return _least(row[key][1] for row in rows if key in row)

    return value


def _routed_share(data: Data) -> float | None:
    rows = rows_of(data, "ffn", whole=True, m=1)
    return _least(row["percent_of_ceiling"] / 100 for row in rows if row["side"].startswith("routed"))


def _routed_floor(data: Data) -> float | None:
    rows = rows_of(data, "ffn", whole=True)
    return _least(row["ratio"][1] for row in rows if row["side"].startswith("routed"))


def _nothing(data: Data) -> None:
    """Its format or method is not built yet."""


COMPILED = "transformers static cache, compiled"
TARGETS = (
    Target("P0a", "dense GEMV, share of the ceiling, 64 MB and more", 0.90, _share(64, 10**6)),
    Target("P0a", "dense GEMV, share of the ceiling, 33 MB", 0.80, _share(30, 64)),
    Target("P0a", "dense GEMV, share of the ceiling, 8 MB", 0.70, _share(8, 30)),
    Target(
        "P0b",
        "dense Llama-3-8B decode, share of ceiling / bytes",
        0.85,
        _decode("percent_of_ceiling", "dense", None, 0.01),
    ),
    Target("P0c", "dense decode against the best compiled engine of the run", 1.05, _peer(COMPILED)),
    Target("P1a", "routed FFN at one row, share of the ceiling on what is awake", 0.85, _routed_share),
    Target("P1b", "routed FFN at one row against best dense, 50 %", 1.7, _routed(50, 1)),
    Target("P1b", "routed FFN at one row against best dense, 80 %", 3.5, _routed(80, 1)),
    Target("P1c", "routed FFN against TEAL's design at as many bytes", 1.15, _routed(50, 1, "ratio_to_gathering")),
    Target("P1d", "routed FFN at 2 rows against best dense, 50 %", 1.15, _routed(50, 2)),
    Target("P1d", "routed FFN at 4 rows against best dense, 80 %", 1.35, _routed(80, 4)),
    Target("P1d", "routed FFN, worst ratio to best dense at any M", 0.95, _routed_floor),
    Target(
        "P2a",
        "pivoted layer against best dense, 20 %, Llama-2-7B",
        1.20,
        _layer_ratio("llama-2-7b", "shared_basis pivoted 20 %"),
    ),
    Target(
        "P2a",
        "pivoted layer against best dense, 50 %, Llama-2-7B",
        1.75,
        _layer_ratio("llama-2-7b", "shared_basis pivoted 50 %"),
    ),
    Target("P2b", "pivoted layer against two of cuBLAS's products, 20 %", 1.25, _to_twice),
    Target("P3", "unstructured 50 %, one row against cuBLAS", 1.35, _to_torch("bitmap half zero")),
    Target("P4", "2:4, one row against cuBLAS", 1.5, _to_torch("two_four 2:4")),
    Target("P5", "Llama-3-8B decode, pivoted 20 % against own dense", 1.22, _decode("ratio_to_dense", "pivoted 20 %")),
    Target("P5", "Llama-3-8B decode, pivoted 50 % against own dense", 1.70, _decode("ratio_to_dense", "pivoted 50 %")),
    Target("P5", "Llama-3-8B decode, half zero against own dense", 1.35, _decode("ratio_to_dense", "half zero")),
    Target("P5", "Llama-3-8B decode, 2:4 against own dense", 1.50, _decode("ratio_to_dense", "2:4")),
    Target("P5b", "dense decode against transformers, eager", 4.0, _peer("transformers eager")),
    Target("P5b", "dense decode against transformers, static cache and compile", 1.2, _peer(COMPILED)),
    Target("P6", "embeddings", 1.25, _nothing),
    Target("P7", "waits of the host in a decode step", 0, _note("host_waits_in_a_step", "dense"), most=True),
    Target("P7", "launches per layer, dense", 6, _note("launches_per_layer", "dense"), most=True),
    Target("P7", "launches per layer, shared basis", 10, _note("launches_per_layer", "pivoted 20 %"), most=True),
    Target("P7", "launches per layer, 2:4", 6, _note("launches_per_layer", "2:4"), most=True),
    Target("P7", "launches per layer, half zero", 6, _note("launches_per_layer", "half zero"), most=True),
    Target("P7", "idle share of a recorded dense step", 0.05, _idle, most=True),
    Target("P8", "worst ratio to cuBLAS, M = 1 to 64", 0.95, _sweep_floor),
)
