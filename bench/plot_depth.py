"""The picture of L3Prune's choice: the loss of the untrained model at every depth, and how well each retrieves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .plots import OFFSET, TITLE, figure_and_axes

LOSS, RECALL = "#0072b2", "#d55e00"


def by_depth(curve: Mapping[str, Any]) -> Any:
    """`curve`: what bench/embedder.py keeps of the untrained model."""
    figure, axes = figure_and_axes()
    depths = range(1, len(curve["loss"]) + 1)
    axes.plot(depths, curve["loss"], "-o", color=LOSS, markersize=4)
    axes.set(xlabel="layers kept", ylim=(0, None))
    axes.set_ylabel("contrastive loss", color=LOSS)
    for name in ("small", "large"):
        depth = curve[name]
        point = (depth, curve["loss"][depth - 1])
        axes.plot(*point, "o", color=LOSS, markersize=10, markerfacecolor="white")
        axes.annotate(f"{name}: {depth}", point, (0, -16), **OFFSET, ha="center", color=LOSS)
    other = axes.twinx()
    other.spines["top"].set_visible(False)
    other.plot(depths, [100 * share for share in curve["R@10"]], "--", color=RECALL)
    other.set_ylim(0, None)
    other.set_ylabel("right passage among the first ten (%)", color=RECALL)
    axes.set_title("Where the lower layers know enough: SmolLM2-135M, untrained", loc="left", **TITLE)
    under = "loss on BoolQ train pairs decides the depth; retrieval (dashed) among BoolQ dev passages"
    axes.text(0, 1.02, under, transform=axes.transAxes, color="0.4", fontsize=9)
    return figure
