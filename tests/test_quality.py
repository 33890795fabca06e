"""The quality tables: their rows name recipes that exist, and are kept only while the protocol is the same."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from pared.bench import pruning, quality
from pared.bench.data import TEXTS_WHEEL
from pared.converters import recipe


def test_every_row_is_a_recipe_of_its_own():
    steps = {setting.name: recipe.parse([setting.recipe])[0].params for setting in quality.SETTINGS}
    assert len(steps) == len(quality.SETTINGS) == len(set(steps.values()))
    assert {(p.ratio, p.group) for p in steps.values()} >= {(r, g) for r in (10, 20, 30, 40, 50) for g in (1, 2)}
    assert steps["20-g4"].group == 4
    assert steps["20-g2-auto"].share == "auto"


def test_rows_are_kept_and_another_protocol_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality")
    results = quality.load()
    assert results["rows"] == {}
    quality.save(results, "dense", {"perplexity": 20.0})
    quality.save(results, "20-g2", {"perplexity": 80.6, "read": 0.725, "stored": 0.69})
    quality.save(results, "20-g2", {"recovered": 40.25})
    assert quality.load()["rows"]["20-g2"] == {"perplexity": 80.6, "read": 0.725, "stored": 0.69, "recovered": 40.25}
    table = (tmp_path / "quality.md").read_text().splitlines()
    assert table[-2:] == [
        "| 0 % | - | - | - | 20.00 | - | 100.0 % | 100.0 % |",
        "| 20 % | 2 | paper | paper | 80.60 | 40.25 | 72.5 % | 69.0 % |",
    ]
    stored = json.loads((tmp_path / "quality.json").read_text())
    (tmp_path / "quality.json").write_text(json.dumps(stored | {"protocol": "another"}))
    assert quality.load()["rows"] == {}


def test_an_unknown_row_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quality", "--rows", "20-g2,25-g3"])
    with pytest.raises(SystemExit, match="no row is called '25-g3'; known are 10-g1"):
        quality.main()


# --- pruning -----------------------------------------------------------------------------------------


def test_every_pruning_row_is_a_recipe_of_its_own():
    steps = {setting.name: recipe.parse([setting.recipe])[0] for setting in pruning.SETTINGS}
    assert len(steps) == len(pruning.SETTINGS) == len({step.params for step in steps.values()}) == 12
    assert {step.method.NAME for step in steps.values()} == {"gblm", "wanda", "magnitude"}
    assert all(step.params.pattern == name.rpartition("-")[2] for name, step in steps.items())
    assert steps["gblm-l2-2:4"].params.norm == "l2"
    assert steps["gblm-l2-2:4"].params.gradients == str(pruning.gradient_file("l2"))


def row(boolq: float, xsum: float) -> dict[str, object]:
    return {"perplexity": {"boolq": boolq, "xsum": xsum}, "zeroed": 0.5}


def test_the_pruning_table_says_whether_the_papers_order_holds(tmp_path):
    table = replace(pruning.TABLE, path=tmp_path / "pruning")
    results = table.load()
    table.save(results, "dense", row(20, 30))
    table.save(results, "dense", {"accuracy": {"piqa": 0.608, "commonsense_qa": 0.292}})
    rows = {"gblm-l1": row(38, 62), "gblm-l2": row(39, 61), "wanda": row(40, 60), "magnitude": row(400, 90)}
    for name, found in rows.items():
        assert pruning.order(results) == []
        table.save(results, f"{name}-4:8", found)
    text = (tmp_path / "pruning.md").read_text().splitlines()
    assert text[-8:] == [
        "| dense | - | 0.0 % | 20.00 | 30.00 | 60.8 % | 29.2 % |",
        "| gblm-l1 | 4:8 | 50.0 % | 38.00 | 62.00 | - | - |",
        "| gblm-l2 | 4:8 | 50.0 % | 39.00 | 61.00 | - | - |",
        "| wanda | 4:8 | 50.0 % | 40.00 | 60.00 | - | - |",
        "| magnitude | 4:8 | 50.0 % | 400.00 | 90.00 | - | - |",
        "",
        "- 4:8, boolq: gblm-l1 is at or below wanda (0.950 of its perplexity), magnitude at 10.0 times wanda's.",
        "- 4:8, xsum: gblm-l2 is above wanda (1.017 of its perplexity), magnitude at 1.5 times wanda's.",
    ]


def test_questions_are_asked_of_the_packed_model(smollm2_gguf, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    if not TEXTS_WHEEL.exists():
        pytest.skip("the texts are not in .data/; `make test` fetches them")
    monkeypatch.setattr(quality, "WORK", tmp_path)
    monkeypatch.setattr(pruning, "QUESTIONS", 4)
    found = pruning.accuracies(quality.fresh())
    assert set(found) == set(pruning.TASKS)
    assert {4 * share % 1 for share in found.values()} == {0}
    assert not list(tmp_path.iterdir())
