"""A report's JSON as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import targets

Data = dict[str, Any]
LEFT_OUT = ("dry", "error_rms", "format", "kv_bytes")
UNITS = {"bytes": "MB", "bytes_per_token": "MB per token", "gb_per_s": "GB/s", "percent_of_ceiling": "% of ceiling"}


def render(data: Data) -> str:
    """The whole report. Quartiles are written as: median (lower to upper)."""
    dry = data["dry"]
    lines = [f"# GPU report{' (DRY RUN: tiny shapes on a CPU, no number here is a measurement)' if dry else ''}", ""]
    lines += [f"- {name}: {value}" for name, value in data["environment"].items()]
    lines += ["", "## Targets", "", *_table(_judged(data))]
    lines += ["", "## Stages", "", *_table(_stages(data))]
    for name, stage in data["stages"].items():
        lines += ["", f"## {name}{' (dry)' if dry else ''}", ""]
        lines += [
            *_notes(stage),
            *_table([{k: v for k, v in row.items() if k not in LEFT_OUT} for row in stage["rows"]]),
        ]
        if "error" in stage:
            lines += ["", "```", stage["error"].strip(), "```"]
    return "\n".join(lines) + "\n"


def _judged(data: Data) -> list[Data]:
    return [{k: row[k] for k in ("id", "what", "target", "value", "state")} for row in targets.judge(data)]


def _stages(data: Data) -> list[Data]:
    keys = ("state", "seconds", "budget_s", "date", "commit")
    return [{"stage": name, **{key: stage.get(key) for key in keys}} for name, stage in data["stages"].items()]


def _notes(stage: Data) -> Iterator[str]:
    """What a stage says beside its rows."""
    known = ("state", "seconds", "budget_s", "date", "commit", "rows", "error", "dry")
    for key, value in stage.items():
        if key not in known:
            yield f"- {key}: {_cell(key, value)}"
    yield ""


def _table(rows: list[Data]) -> Iterator[str]:
    """Markdown of rows with different keys."""
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield "| " + " | ".join(UNITS.get(column, column.replace("_", " ")) for column in columns) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield "| " + " | ".join(_cell(column, row.get(column)) for column in columns) + " |"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return "; ".join(f"{name} {_cell(name, inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list) and len(value) == 3 and all(isinstance(v, float) for v in value):
        low, middle, high = (_number(v) for v in value)
        return f"{middle} ({low} to {high})"
    if UNITS.get(key, "").startswith("MB"):
        return f"{value / 1e6:.1f}"
    if isinstance(value, float):
        return _number(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    """Three figures and more."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
