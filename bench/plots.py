"""The pictures of bench/results/plots/, from the JSON files beside them: one message a picture.

    roofline       bytes of one layer against GB/s, every form at one row, under the ceiling of the same run
    rows           how many times as fast as the best dense path, from 1 row to 512
    embedder_depth where L3Prune cuts a text encoder: loss and retrieval by depth, bench/embedder.py
    quality        perplexity against bytes read, and against decode speed where bench/decode_speed.py has measured it;
                   of pruned models, pattern by pattern; of routed ones, by the groups that a token leaves out

`make plots` draws what it finds: CPU results, and the GPU report's once there is one. Dry reports are refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ParedError
from .pruning_plot import by_pattern
from .record import RESULTS

PLOTS = RESULTS / "plots"
COLORS = {  # told apart in grey and by the colour-blind (Okabe and Ito)
    "dense": "#000000",
    "F.linear": "#7f7f7f",
    "F.linear twice": "#b0a080",
    "pivoted 20 %": "#0072b2",
    "pivoted 50 %": "#d55e00",
    "factored 20 %": "#56b4e9",
    "factored 50 %": "#e69f00",
}
DPI = 150
OFFSET: dict[str, Any] = {"textcoords": "offset points"}
TITLE: dict[str, Any] = {"fontsize": 12, "fontweight": "bold", "pad": 24}


@dataclass(frozen=True)
class Point:
    """One form at one number of rows; rate in GB/s, ratio to the best dense path as quartiles."""

    side: str
    m: int
    bytes: int
    rate: float
    ratio: tuple[float, float, float]


@dataclass(frozen=True)
class Layers:
    """What one run measured of one layer of a model, and what memory gave in that run. where: device and dtype."""

    model: str
    where: str
    ceiling: float
    points: tuple[Point, ...]

    def sides(self) -> list[str]:
        """The forms in the order of the file."""
        return list(dict.fromkeys(point.side for point in self.points))


# --- reading -------------------------------------------------------------------------------------


def cpu_layers(path: Path) -> Layers:
    """A cpu_formats_*.json."""
    data = json.loads(path.read_text(encoding="utf-8"))
    where = f"{data['threads']} threads, {data['level']}, {data['dtype']}"
    return Layers(data["model"], where, data["ceiling_gb_per_s"], tuple(map(_point, data["cases"])))


def gpu_layers(path: Path) -> list[Layers]:
    """The sweep of a GPU report, one for each model. Raises ParedError for a dry report."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["dry"]:
        raise ParedError(f"{path} is a dry run: its numbers measure nothing and are not drawn")
    sweep = data["stages"].get("sweep", {"rows": []})
    rows = [row for row in sweep["rows"] if "ratio" in row]
    where = f"{data['environment'].get('gpu')}, bfloat16"
    return [
        Layers(model, where, sweep["ceiling_gb_per_s"], tuple(_point(row) for row in rows if row["model"] == model))
        for model in dict.fromkeys(row["model"] for row in rows)
    ]


def _point(row: Mapping[str, Any]) -> Point:
    low, middle, high = row["ratio"]
    side = row["side"].removeprefix("shared_basis ")
    return Point(side, row["m"], row["bytes"], row["gb_per_s"], (low, middle, high))


# --- drawing -------------------------------------------------------------------------------------


LANES = {"dense": 1.06, "F.linear": 0.26}  # height of a label over the ceiling; all others take turns
OTHER_LANES = (0.74, 0.5)


def roofline(found: Layers) -> Any:
    """GB/s against bytes at one row: the distance to the line is what a kernel leaves unused."""
    figure, axes = figure_and_axes()
    points = sorted((p for p in found.points if p.m == 1 and p.side != "F.linear twice"), key=lambda p: p.bytes)
    axes.axhline(found.ceiling, color="0.4", linewidth=1)
    axes.set(xlim=(0, 1.12 * max(p.bytes for p in points) / 1e6), ylim=(0, 1.25 * found.ceiling))
    axes.annotate(f"what memory gives: {_rate(found.ceiling)}", (0, found.ceiling), (6, 4), **OFFSET, color="0.3")
    others = iter(OTHER_LANES * len(points))
    for point, following in zip(points, [*points[1:], None], strict=True):
        height = LANES.get(point.side) or next(others)
        crowded = following is not None and point.bytes < following.bytes < point.bytes + 0.12 * points[-1].bytes
        _label(axes, point, found.ceiling, height, "right" if crowded else "center")
        axes.plot(point.bytes / 1e6, point.rate, "o", color=_color(point.side), markersize=8)
    shares = [100 * p.rate / found.ceiling for p in points if p.side != "F.linear"]
    axes.set(xlabel="weights that one token reads of a layer (MB)", ylabel="weights read per second (GB/s)")
    _title(
        axes, f"Bytes decide: every form reads at {min(shares):.0f} to {max(shares):.0f} % of what memory gives", found
    )
    return figure


def _label(axes: Any, point: Point, ceiling: float, height: float, side: str) -> None:
    share, time = 100 * point.rate / ceiling, point.bytes / point.rate / 1e6
    text = (
        f"{point.side}\n{share:.0f} %, {time:.1f} ms"
        if time >= 1
        else f"{point.side}\n{share:.0f} %, {1e3 * time:.0f} µs"
    )
    x, color = point.bytes / 1e6, _color(point.side)
    line = {"arrowstyle": "-", "color": "0.75", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5}
    place = {"ha": side, "va": "bottom" if height > 1 else "top", "fontsize": 9, "color": color}
    axes.annotate(text, (x, point.rate), (x, height * ceiling), arrowprops=line, **place)


def rows(found: Layers) -> Any:
    """The ratio to the best dense path against M; bands are quartiles."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure, axes = figure_and_axes()
    last = max(p.m for p in found.points)
    axes.plot((0.9, last), (1, 1), color="0.4", linewidth=1)
    ends: dict[str, float] = {}
    for side in found.sides():
        points = sorted((p for p in found.points if p.side == side), key=lambda p: p.m)
        if side not in ("dense", "F.linear", "F.linear twice"):
            _curve(axes, points)
            ends[side] = points[-1].ratio[1]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({p.m for p in found.points})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlim=(0.9, last * 3.4), ylim=(0, None), xlabel="tokens multiplied at once (M)")
    axes.set_ylabel("speed, best dense path of the same run = 1")
    for side, y in _apart(ends, 0.06 * axes.get_ylim()[1]).items():
        axes.text(last * 1.15, y, side, color=_color(side), va="center")
    pivoted = [p.ratio[1] for p in found.points if p.side.startswith("pivoted")]
    _title(
        axes, f"Pivoted layers are {min(pivoted):.2f} to {max(pivoted):.2f} times as fast as the best dense path", found
    )
    return figure


def _curve(axes: Any, points: list[Point]) -> None:
    xs, side = [p.m for p in points], points[0].side
    style = "-" if side.startswith("pivoted") else "--"
    axes.plot(xs, [p.ratio[1] for p in points], style, marker="o", markersize=4, color=_color(side))
    axes.fill_between(xs, [p.ratio[0] for p in points], [p.ratio[2] for p in points], color=_color(side), alpha=0.12)


RULES = {"paper": ("ranks by the paper's formula", "#0072b2"), "pivoted": ("ranks that fill the storage", "#d55e00")}


def quality_bytes(table: Mapping[str, Any]) -> Any:
    """Perplexity against the bytes that a token reads of the block linears."""
    xs = {key: 100 * row["read"] for key, row in table["rows"].items() if "read" in row}
    label = "bytes that one token reads of the block linears, dense = 100 (%)"
    return _quality(table, xs | {"dense": 100.0}, label, "evaluated in fp32, bytes in bf16", "right")


def quality_speed(table: Mapping[str, Any], speeds: Mapping[str, Any]) -> Any:
    """Perplexity against decode speed."""
    xs = {key: row["ratio_to_dense"][1] for key, row in speeds["rows"].items()}
    where = f"speed: {speeds['threads']} threads, {speeds['dtype']}, random weights of the same shapes"
    return _quality(table, xs, "decode speed, dense model = 1", where, "left")


def _quality(table: Mapping[str, Any], xs: Mapping[str, float], label: str, where: str, free: str) -> Any:
    """Perplexity of groups of one over `xs` of the same keys: arrows are what recovery brings back. free: the side
    on which the upper corner is."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure, axes = figure_and_axes()
    reference = table["rows"]["dense"]["perplexity"]
    axes.axhline(reference, color="0.4", linewidth=1)
    axes.plot(xs["dense"], reference, "s", color="black", markersize=8)
    axes.annotate("dense", (xs["dense"], reference), (0, -8), **OFFSET, ha="center", va="top")
    for key, row in table["rows"].items():
        if key in xs and row.get("settings", {}).get("group") == 1 and "recovered" in row:
            _arrow(axes, row, xs[key])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([20, 30, 40, 60, 80, 120]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set(ylim=(0.85 * reference, 1.15 * axes.get_ylim()[1]), xlabel=label, ylabel="perplexity (lower is better)")
    lines = [*RULES.values(), ("hollow: as compressed", "0.3"), ("full: after LoRA, which dense did not get", "0.3")]
    for i, (text, color) in enumerate(lines):
        place = (0.99 if free == "right" else 0.02, 0.98 - 0.055 * i)
        axes.text(*place, text, color=color, transform=axes.transAxes, ha=free, va="top", fontsize=9)
    axes.set_title("What the weights taken away cost: Basis Sharing on SmolLM2-135M", loc="left", **TITLE)
    axes.text(0, 1.02, f"a basis for every linear; {where}", transform=axes.transAxes, color="0.4", fontsize=9)
    return figure


def _arrow(axes: Any, row: Mapping[str, Any], x: float) -> None:
    given, color = row["settings"], RULES[row["settings"].get("ranks", "paper")][1]
    arrow = {"arrowstyle": "->", "color": color, "alpha": 0.5}
    axes.annotate("", (x, row["recovered"]), (x, row["perplexity"]), arrowprops=arrow)
    axes.plot(x, row["perplexity"], "o", color=color, markerfacecolor="white")
    axes.plot(x, row["recovered"], "o", color=color)
    axes.annotate(f"{given['ratio']:g} %", (x, row["perplexity"]), (0, 6), **OFFSET, ha="center", color=color)


def figure_and_axes() -> tuple[Any, Any]:
    """An empty picture in the house's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    return figure, axes


def _title(axes: Any, text: str, found: Layers) -> None:
    axes.set_title(text, loc="left", **TITLE)
    under = f"all linears of one {found.model} layer, weights not in cache, {found.where}"
    axes.text(0, 1.02, under, transform=axes.transAxes, color="0.4", fontsize=9)


def _color(side: str) -> str:
    return COLORS.get(side, "#009e73")


def _rate(value: float) -> str:
    return f"{value / 1000:.2f} TB/s" if value >= 1000 else f"{value:.1f} GB/s"


def _apart(ends: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights of labels in the order of `ends`' values, no two nearer than `gap`."""
    placed: dict[str, float] = {}
    for side, y in sorted(ends.items(), key=lambda item: item[1]):
        placed[side] = max(y, max(placed.values(), default=y - gap) + gap)
    return placed


# --- files ---------------------------------------------------------------------------------------


def figures(results: Path) -> Iterator[tuple[str, Any]]:
    """(file name, figure) for everything that `results` has the numbers for."""
    measured = [("cpu", cpu_layers(path)) for path in sorted(results.glob("cpu_formats_*.json"))]
    if (results / "gpu_report.json").exists():
        measured += [("gpu", layers) for layers in gpu_layers(results / "gpu_report.json")]
    for kind, layers in measured:
        yield f"{kind}_roofline_{layers.model}", roofline(layers)
        yield f"{kind}_rows_{layers.model}", rows(layers)
    table, speeds = (_read(results / f"{name}.json") for name in ("quality_basis_sharing", "decode_basis_sharing_cpu"))
    if curve := _read(results / "embedder_l3prune.json").get("rows", {}).get("curve"):
        from .plot_depth import by_depth  # draws with what is here

        yield "embedder_depth", by_depth(curve)
    if table:
        yield "quality_bytes", quality_bytes(table)
    if table and speeds:
        yield "quality_speed", quality_speed(table, speeds)
    if pruned := _read(results / "quality_pruning.json"):
        yield "quality_pruning", by_pattern(pruned, *figure_and_axes())
    if routed := _read(results / "quality_routed.json"):
        from .routed_plot import pictures

        yield from pictures(routed)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file, empty where there is none."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def main() -> None:
    """`make plots`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=PLOTS, help="folder of the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(options.results):
        path = options.out / f"{name}.png"
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        print(path)


if __name__ == "__main__":
    main()
