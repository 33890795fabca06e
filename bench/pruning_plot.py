"""The picture of the pruning table: perplexity of every method, pattern by pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .pruning import METHODS, PATTERNS, TEXTS

COLORS = {"gblm-l1": "#0072b2", "gblm-l2": "#56b4e9", "wanda": "#d55e00", "magnitude": "#7f7f7f"}
MARKERS = {"boolq": "o", "xsum": "D"}  # filled and hollow
STEP = 0.19  # between the methods of a pattern


def by_pattern(results: Mapping[str, Any], figure: Any, axes: Any) -> Any:
    """Perplexity on a logarithmic axis; BoolQ dev filled with its value beside it, XSum hollow."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    rows = results["rows"]
    for p, pattern in enumerate(PATTERNS):
        for m, method in enumerate(METHODS):
            if row := rows.get(f"{method}-{pattern}"):
                _dots(axes, p + STEP * (m - (len(METHODS) - 1) / 2), method, row["perplexity"])
    reference = rows["dense"]["perplexity"][TEXTS[0]]
    axes.axhline(reference, color="0.4", linewidth=1)
    axes.annotate(
        f"dense {reference:.1f}", (len(PATTERNS) - 0.5, reference), (0, 4), ha="right", va="bottom", **_OFFSET
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.set(xlim=(-0.5, len(PATTERNS) - 0.5), ylabel="perplexity (lower is better)")
    axes.set_xticks(range(len(PATTERNS)), PATTERNS)
    axes.set_ylim(0.8 * reference, 1.6 * axes.get_ylim()[1])
    for i, method in enumerate(METHODS):
        axes.text(0.01, 0.97 - 0.055 * i, method, color=COLORS[method], transform=axes.transAxes, va="top")
    axes.set_title(
        "Half of the weights zeroed, nothing trained after", loc="left", fontsize=12, fontweight="bold", pad=24
    )
    under = "SmolLM2-135M-Instruct in fp32; full: BoolQ passages, hollow: XSum articles"
    axes.text(0, 1.02, under, transform=axes.transAxes, color="0.4", fontsize=9)
    return figure


_OFFSET: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}


def _dots(axes: Any, x: float, method: str, perplexity: Mapping[str, float]) -> None:
    for text, marker in MARKERS.items():
        face = COLORS[method] if text == TEXTS[0] else "white"
        axes.plot(x, perplexity[text], marker, color=COLORS[method], markerfacecolor=face, markersize=7)
    value = perplexity[TEXTS[0]]
    axes.annotate(f"{value:.0f}", (x, value), (7, 0), ha="left", va="center", color=COLORS[method], **_OFFSET)
