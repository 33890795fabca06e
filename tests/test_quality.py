"""The quality table: its rows name recipes that exist, and are kept only while the protocol is the same."""

from __future__ import annotations

import json
import sys

import pytest

from pared.bench import quality
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
