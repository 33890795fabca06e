"""The picture of a sweep: what a client waits for at each request rate, and what the server gets done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .serving import PERCENTILES, TIMES, title

STYLES = {50: ("#0072b2", "-"), 90: ("#e69f00", "--"), 99: ("#d55e00", ":")}  # told apart in grey, too
NAMES = {"ttft": "time to first token", "tpot": "time per output token", "itl": "between pieces", "e2el": "end to end"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a sweep as an image of the kind that `path` ends in."""
    picture(result).savefig(path, dpi=150)


def picture(result: Mapping[str, Any]) -> Any:
    """Six panels over the rates, evenly spaced: four latencies, tokens, requests."""
    rows = result["rates"]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, name in zip(panels.flat, TIMES, strict=False):
        for p in PERCENTILES:
            color, style = STYLES[p]
            _line(axes, [row[f"p{p}_{name}_ms"] for row in rows], f"p{p}", color, style)
        axes.set_title(f"{TIMES[name]}: {NAMES[name]} (ms)", loc="left", fontsize=10)
    tokens, requests = panels.flat[4:]
    _line(tokens, [row["output_throughput"] for row in rows], "", "#009e73", "-")
    tokens.set_title("output tokens/s", loc="left", fontsize=10)
    _line(requests, [row["request_throughput"] for row in rows], "done", "#009e73", "-")
    if result["goodput"]:
        _line(requests, [row["request_goodput"] for row in rows], "good", "#cc79a7", "--")
    requests.set_title("requests/s", loc="left", fontsize=10)
    for axes in panels.flat:
        axes.set_xticks(range(len(rows)), [_rate(row["request_rate"]) for row in rows])
        axes.set(ylim=(0, None), xlabel="requests/s that came")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    panels.flat[0].legend(frameon=False)
    if result["goodput"]:
        requests.legend(frameon=False)
    figure.suptitle(title(result), x=0.01, ha="left", fontsize=11)
    return figure


def _line(axes: Any, values: list[float | None], label: str, color: str, style: str) -> None:
    ys = [float("nan") if value is None else value for value in values]
    axes.plot(range(len(ys)), ys, style, color=color, label=label, marker="o", clip_on=False)


def _rate(rate: float | str) -> str:
    return "all at once" if isinstance(rate, str) else f"{rate:g}"
