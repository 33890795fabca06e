"""The pictures: drawn from the committed results, complete, labelled, and never of a dry run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from pared.bench import decode_speed, plots
from pared.errors import ParedError

MODEL = "llama-2-7b"


def words(figure: object) -> str:
    """Every text that a figure shows."""
    (axes,) = figure.axes
    shown = [
        axes.get_title(loc="left"),
        axes.get_xlabel(),
        axes.get_ylabel(),
        *(text.get_text() for text in axes.texts),
    ]
    return "\n".join(shown)


@pytest.fixture
def layers() -> plots.Layers:
    return plots.cpu_layers(plots.RESULTS / f"cpu_formats_{MODEL}_bfloat16.json")


def test_the_roofline_names_every_form_and_the_ceiling(layers: plots.Layers) -> None:
    text = words(plots.roofline(layers))
    assert all(side in text for side in layers.sides())
    assert f"{layers.ceiling:.1f} GB/s" in text
    assert "(MB)" in text and "(GB/s)" in text


def test_the_rows_show_medians_over_a_logarithmic_axis(layers: plots.Layers) -> None:
    figure = plots.rows(layers)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    drawn = {tuple(line.get_ydata()) for line in axes.lines}
    for side in (side for side in layers.sides() if side not in ("dense", "F.linear")):
        points = sorted((p for p in layers.points if p.side == side), key=lambda p: p.m)
        assert tuple(p.ratio[1] for p in points) in drawn
        assert side in words(figure)


def test_quality_needs_a_row_measured_both_ways() -> None:
    settings = {"ratio": 20, "group": 1}
    table = {
        "rows": {"dense": {"perplexity": 20.0}, "20-g1": {"perplexity": 80, "recovered": 40, "settings": settings}}
    }
    table["rows"]["30-g1"] = {"perplexity": 99, "read": 0.6, "settings": {"ratio": 30, "group": 1}}
    table["rows"]["20-g1"]["read"] = 0.7
    speeds = {key: {"ratio_to_dense": [1.1, 1.2, 1.3]} for key in ("dense", "20-g1", "30-g1")}
    drawn = plots.quality_speed(table, {"rows": speeds, "threads": 2, "dtype": "bfloat16"}), plots.quality_bytes(table)
    for text in map(words, drawn):
        assert "\n20 %" in text
        assert "30 %" not in text


def test_pruned_models_are_drawn_pattern_by_pattern(tmp_path: Path) -> None:
    def row(boolq: float) -> dict[str, object]:
        return {"perplexity": {"boolq": boolq, "xsum": 1.5 * boolq}}

    rows = {
        "dense": row(20.0),
        "wanda-2:4": row(123.0),
        "magnitude-2:4": row(4567.0),
        "gblm-l1-unstructured": row(41.0),
    }
    (tmp_path / "quality_pruning.json").write_text(json.dumps({"rows": rows}))
    ((name, figure),) = plots.figures(tmp_path)
    (axes,) = figure.axes
    assert name == "quality_pruning"
    assert {"123", "4567", "41", "dense 20.0"} <= set(words(figure).splitlines())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["unstructured", "4:8", "2:4"]
    assert axes.get_yscale() == "log"
    assert {y for line in axes.lines for y in line.get_ydata()} >= {123.0, 184.5, 4567.0, 41.0, 20.0}


def test_every_result_gets_its_picture(tmp_path: Path) -> None:
    names = {name for name, _ in plots.figures(plots.RESULTS)}
    for path in plots.RESULTS.glob("cpu_formats_*.json"):
        model = json.loads(path.read_text())["model"]
        assert {f"cpu_roofline_{model}", f"cpu_rows_{model}"} <= names
    assert names == {path.stem for path in plots.PLOTS.glob("*.png")}, "run `make plots` and commit the pictures"
    assert list(plots.figures(tmp_path)) == []


def test_a_gpu_report_is_drawn_and_a_dry_one_is_not(tmp_path: Path) -> None:
    row = {"model": MODEL, "m": 1, "bytes": 4e8, "gb_per_s": 2700.0, "ratio": [1.0, 1.0, 1.0]}
    rows = [{**row, "side": "dense"}, {**row, "side": "shared_basis pivoted 20 %"}, {"model": MODEL, "failed": "no"}]
    data = {"dry": False, "environment": {"gpu": "some GPU"}}
    data["stages"] = {"sweep": {"rows": rows, "ceiling_gb_per_s": 3000.0}}
    file = tmp_path / "gpu_report.json"
    file.write_text(json.dumps(data))
    drawn = dict(plots.figures(tmp_path))
    assert drawn.keys() == {f"gpu_roofline_{MODEL}", f"gpu_rows_{MODEL}"}
    assert "3.00 TB/s" in words(drawn[f"gpu_roofline_{MODEL}"])
    assert "some GPU" in words(drawn[f"gpu_rows_{MODEL}"])
    file.write_text(json.dumps(data | {"dry": True}))
    with pytest.raises(ParedError, match="dry run"):
        dict(plots.figures(tmp_path))


def test_labels_keep_their_distance() -> None:
    placed = plots._apart({"a": 1.0, "b": 1.01, "c": 3.0}, 0.5)
    assert placed == {"a": 1.0, "b": 1.5, "c": 3.0}


def test_decode_speed_is_measured_for_rows_of_the_quality_table() -> None:
    keys = decode_speed.comparable()
    assert {"20-g1", "20-g1-pivoted"} <= set(keys)
    assert not {"20-g2", "20-g4"} & set(keys)
    measured = plots.RESULTS / "decode_basis_sharing_cpu.json"
    if measured.exists():
        rows = json.loads(measured.read_text())["rows"]
        dense = rows["dense"]["bytes_per_token"]
        assert all(rows[key]["bytes_per_token"] < dense for key in rows if key != "dense")


def test_the_depth_picture_names_both_choices(tmp_path: Path) -> None:
    curve = {"loss": [3.0, 2.0, 2.5, 1.5, 1.8, 1.9], "R@10": [0.1, 0.2, 0.2, 0.3, 0.4, 0.3], "small": 2, "large": 4}
    rows = json.dumps({"rows": {"curve": curve}})
    (tmp_path / "embedder_l3prune.json").write_text(rows)
    ((name, figure),) = plots.figures(tmp_path)
    loss, recall = figure.axes
    assert name == "embedder_depth"
    assert {text.get_text() for text in loss.texts} >= {"small: 2", "large: 4"}
    assert list(loss.lines[0].get_ydata()) == curve["loss"]
    assert recall.lines[0].get_ydata() == pytest.approx([100 * share for share in curve["R@10"]])
