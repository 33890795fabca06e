"""The picture of the LTE table: perplexity by share of groups left out, and what a batch leaves of that share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from .plots import OFFSET, TITLE, figure_and_axes
from .routed import CURVE, KINDS

COLORS = {"router": "#0072b2", "static_trained": "#d55e00", "static": "#e69f00", "oracle": "#7f7f7f"}
TEXT = "boolq"
BESIDE: dict[str, Any] = {"xytext": (7, 0), "va": "center"}
ABOVE: dict[str, Any] = {"xytext": (-7, 7), "ha": "right"}
HIGHEST = 2000  # of the axis: a choice that is worse everywhere is named, not drawn


def pictures(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(file name, figure) of each."""
    yield "quality_routed", by_sparsity(results)
    yield "routed_batches", by_batch(results)


def by_sparsity(results: Mapping[str, Any]) -> Any:
    """Perplexity on BoolQ dev against the share of groups that are out, choice by choice, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator

    rows = results["rows"]
    points = sorted((rows[s.name] for s in CURVE if s.name in rows), key=lambda row: row["sparsity"])
    figure, axes = figure_and_axes()
    beyond: list[str] = []
    for kind, said in KINDS.items():
        found = [(100 * row["sparsity"], row[kind][TEXT]) for row in points if kind in row]
        best = min((perplexity for _, perplexity in found), default=math.inf)
        if HIGHEST < best < math.inf:
            beyond.append(f"{said}: {best:,.0f} and more")
        elif found:
            axes.plot(*zip(*found, strict=True), "-o", color=COLORS[kind], markersize=5)
            named = next(point for point in reversed(found) if point[1] <= HIGHEST)
            place = BESIDE if named[0] > 80 else ABOVE
            axes.annotate(said, named, **place, **OFFSET, color=COLORS[kind], fontsize=9)
    reference = rows["finetuned"]["perplexity"][TEXT]
    axes.axhline(reference, color="0.4", linewidth=1)
    axes.annotate(
        f"fine-tuned as long: {reference:.1f}", (100, reference), (-4, 4), **OFFSET, ha="right", color="0.3", fontsize=9
    )
    axes.annotate("\n".join(beyond), (0, HIGHEST), (6, -16), **OFFSET, color=COLORS["static"], fontsize=9)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.set(
        xlim=(0, 100),
        ylim=(None, HIGHEST),
        xlabel="groups of an FFN that a token leaves out (%)",
        ylabel="perplexity (lower is better)",
    )
    axes.set_title("Which groups a token does without: SmolLM2-135M, LTE", loc="left", **TITLE)
    under = "BoolQ dev passages; every choice has the router's number of groups in each layer"
    axes.text(0, 1.02, under, transform=axes.transAxes, color="0.4", fontsize=9)
    return figure


def by_batch(results: Mapping[str, Any]) -> Any:
    """Share of groups that none of a batch wakes, from 1 text to 64."""
    figure, axes = figure_and_axes()
    for setting in CURVE:
        if row := results["rows"].get(setting.name):
            sizes, shares = [int(size) for size in row["union"]], [100 * share for share in row["union"].values()]
            axes.plot(sizes, shares, "-o", color=COLORS["router"], markersize=4)
            axes.annotate(f"eta {setting.eta:g}", (sizes[0], shares[0]), (-6, 0), **OFFSET, ha="right", va="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes := [1, 2, 4, 8, 16, 32, 64], [str(size) for size in sizes])
    axes.set(xlim=(0.5, 80), ylim=(0, None), xlabel="texts decoded together")
    axes.set_ylabel("groups that none of them wakes (%)")
    axes.set_title("A batch wakes what any of its tokens wakes", loc="left", **TITLE)
    under = "SmolLM2-135M, LTE, BoolQ dev tokens at the same position, over all layers"
    axes.text(0, 1.02, under, transform=axes.transAxes, color="0.4", fontsize=9)
    return figure
