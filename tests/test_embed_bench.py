"""The measurements of encoders: both sides agree before they are timed, and retrieval by one command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from pared.bench import data, embed, record, retrieval
from pared.bench.end_to_end import Disagreement
from pared.errors import SourceError
from pared.runtime.packed import Packed
from pared.tests import trained
from pared.tests.test_cli import Run
from pared.tests.test_cli import pared as pared  # a fixture
from pared.tests.test_embed import encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    words = trained.words(300)
    monkeypatch.setattr(data, "boolq_passages", lambda split: [" ".join(words[i : i + 20]) for i in range(0, 200, 20)])
    monkeypatch.setattr(data, "boolq_questions", lambda: words[200:210])
    monkeypatch.setattr(embed, "TEXTS", 10)
    monkeypatch.setattr(embed, "BATCH", 4)


def test_all_sides_take_turns_and_agree(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["embed", str(folder), str(folder), "--rounds", "2"])
    embed.main()
    result = json.loads((tmp_path / "embed_cpu_float32.json").read_text())
    assert [row["count"] for row in result["rows"]] == [10, 10, 20, 20]
    for row in result["rows"]:
        assert row["layers"] == 6 and row["apart"] < 1e-5 and row["dtype"] == "float32"
        assert set(row["tokens_per_second"]) == set(embed.SIDES)
        assert all(len(quartiles) == 3 and min(quartiles) > 0 for quartiles in row["ratios"].values())
    assert result["rows"][0]["time_of_first"] == [1, 1, 1]
    printed = capsys.readouterr().out
    assert "against arrival" in printed and "questions and passages" in printed


def test_no_speed_where_the_vectors_differ(folder, monkeypatch):
    honest = Packed.__call__
    monkeypatch.setattr(Packed, "__call__", lambda self, texts: honest(self, texts) + 0.01)
    with pytest.raises(Disagreement, match=r"vectors are .* apart, float32 explains 1e-05"):
        embed.compare([folder], rounds=1)


def test_bench_of_an_encoder(pared: Run, folder: Path, tmp_path: Path) -> None:
    code, out, _ = pared("bench", folder, "--rounds", 1, "--out", tmp_path / "out.json")
    assert code == 0 and "Encoders in float32" in out
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["texts"] == "passages"


def test_retrieval_of_folders_by_one_command(folder, tmp_path, monkeypatch, capsys):
    words = trained.words(600, seed=3)
    texts = [" ".join(words[i : i + 12]) for i in range(0, 480, 12)]
    ratings = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)).tolist()
    for name in ("boolq_dev_pairs", "xsum_pairs", "fiqa_pairs"):
        monkeypatch.setattr(data, name, lambda: [(one[:20].rpartition(" ")[0], one) for one in texts])
    monkeypatch.setattr(data, "lee_similarities", lambda: (texts, ratings))
    monkeypatch.setattr(data, "minilm_path", lambda: folder)  # through the other engine: the same vectors
    monkeypatch.setattr(sys, "argv", ["retrieval", str(folder), "--length", "20", "--out", str(tmp_path / "out.json")])
    retrieval.main()
    ours, theirs = json.loads((tmp_path / "out.json").read_text())["rows"].values()
    assert ours == pytest.approx(theirs, abs=1e-3) and ours["boolq R@10"] > 0.3
    assert data.ENCODER_PACKAGE in capsys.readouterr().out

    def missing() -> Path:
        raise SourceError("not installed")

    monkeypatch.setattr(data, "minilm_path", missing)
    retrieval.main()
    assert data.ENCODER_PACKAGE not in capsys.readouterr().out
