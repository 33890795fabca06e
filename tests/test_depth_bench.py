"""The measurements of depth: scores by hand, sums of work, and both commands on a model that takes no time."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from pared import families
from pared.bench import data, depth, embedder, quality, retrieval
from pared.converters.sources.detect import open_source
from pared.embedding import Embedding
from pared.errors import SourceError
from pared.tests import tiny, trained


def test_retrieval_by_hand():
    queries = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    documents = torch.tensor([[2.0, 0.1], [0.5, 3], [-1, 0]])
    found = retrieval.ranked(queries, documents, torch.tensor([0, 2, 1]))
    assert found["R@1"] == pytest.approx(2 / 3)  # places 1, 3 and 1
    assert found["R@10"] == 1.0
    assert found["MRR@10"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    many = torch.eye(12)
    last = retrieval.ranked(many[:1], torch.cat([many[:1]] * 11 + [many[1:2]]), torch.tensor([11]))
    assert last == {"R@1": 0.0, "R@10": 0.0, "MRR@10": 0.0}


def test_a_vector_that_equals_its_rivals_has_not_found_anything():
    same = torch.ones(4, 3)
    assert retrieval.ranked(same, same, torch.arange(4)) == {"R@1": 0.0, "R@10": 1.0, "MRR@10": 0.25}


def test_rank_correlation_with_ties():
    vectors = torch.tensor([[1.0, 0], [0.9, 0.1], [0.5, 0.5], [0, 1]])
    normal = vectors / vectors.norm(dim=1, keepdim=True)
    cosines = normal @ normal.t()
    assert retrieval.agreement(vectors, cosines) == pytest.approx(1.0)
    assert retrieval.agreement(vectors, -cosines) == pytest.approx(-1.0)
    assert retrieval._ranks(torch.tensor([0.2, 0.5, 0.2, 0.1])).tolist() == [2.5, 4.0, 2.5, 1.0]


def test_the_pairs_are_those_that_numbers_are_published_on(real_prompts):
    train = data.boolq_pairs()
    assert len(train) == 7993
    assert not {passage for _, passage in train} & set(data.boolq_passages("dev"))
    assert len({passage for _, passage in data.boolq_dev_pairs()[:1000]}) == 951
    assert (len(data.xsum_pairs()), len(data.fiqa_pairs())) == (999, 648)


def test_the_news_items():
    try:
        texts, ratings = data.lee_similarities()
    except SourceError as missing:
        pytest.skip(str(missing))
    assert len(texts) == len(ratings) == 50 and all(len(row) == 50 for row in ratings)
    assert all(ratings[i][i] == 1 for i in range(50))


def test_work_of_a_prefill_by_hand():
    spec = families.read(tiny.CONFIGS["llama"].to_dict())
    linears = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24  # q, k and v, o, the FFN
    attention = 4 * 4 * (1 + 2 + 3)  # heads x head_dim x pairs, twice: scores and values
    assert depth.prefill_flops(spec, 3) == 2 * (2 * 3 * linears + 4 * attention) + 2 * 40 * 16


def encode(texts):
    """Bags of words: a query of the first words of a text finds it."""
    return torch.stack([torch.bincount(torch.tensor([int(w[1:]) for w in t.split()]), minlength=97) for t in texts])


def test_scores_name_every_measure(monkeypatch):
    pairs = [(f"w{i} w{i + 1}", f"w{i} w{i + 1} w{i + 2}") for i in range(0, 60, 3)]
    for name in ("boolq_dev_pairs", "xsum_pairs", "fiqa_pairs"):
        monkeypatch.setattr(data, name, lambda: pairs)
    monkeypatch.setattr(data, "lee_similarities", lambda: ([p for _, p in pairs], torch.rand(20, 20).tolist()))
    found = retrieval.scores(encode)
    assert set(embedder.SCORES) <= set(found)
    assert found["boolq R@10"] > 0.9


def length_of_a_vector(encode):
    """Something that differs between encoders."""
    return dict.fromkeys(embedder.SCORES, encode(["w3 w4"]).norm().item())


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Both commands in an empty place, on a trained model of six small layers."""
    src = trained.checkpoint(tmp_path / "src")
    for module in (depth, embedder):
        monkeypatch.setattr(module, "WORK", tmp_path / module.__name__)
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results" / module.__name__.rpartition(".")[2])
    monkeypatch.setattr(data, "gguf_path", lambda: src)
    monkeypatch.setattr(quality, "source", lambda: open_source(src))
    monkeypatch.setattr(quality, "calibration", lambda: trained.CALIBRATION)
    monkeypatch.setattr(quality, "LENGTH", 32)
    stream = trained.words(2200, seed=2)
    passages = [" ".join(stream[i : i + 30]) for i in range(0, 2100, 30)]
    monkeypatch.setattr(data, "boolq_passages", lambda split: passages)
    monkeypatch.setattr(data, "boolq_pairs", lambda: [(p[:20].rpartition(" ")[0], p) for p in passages])
    monkeypatch.setattr(data, "boolq_dev_pairs", data.boolq_pairs)
    monkeypatch.setattr(
        retrieval, "scores", lambda encode: dict.fromkeys(embedder.SCORES, encode(["w3 w4"]).norm().item())
    )
    return tmp_path


def test_depth_command(small, monkeypatch, capsys):
    for name, value in {"SAMPLES": 2, "LENGTH": 16, "PROMPT_TOKENS": 12, "NEW_TOKENS": 4, "ROUNDS": 2}.items():
        monkeypatch.setattr(depth, name, value)
    monkeypatch.setattr(sys, "argv", ["depth"])
    depth.main()
    rows = json.loads((small / "results" / "depth.json").read_text())["rows"]
    assert rows["10"]["order"] == rows["20"]["order"][:1] and len(rows["20"]["order"]) == 2
    assert 0 < rows["20"]["bytes_left"] < rows["10"]["bytes_left"] < 1
    assert 0 < rows["20"]["flops_left"] < rows["10"]["flops_left"] < 1
    assert len(rows["20"]["decode"]) == len(rows["20"]["prefill"]) == 3
    assert (small / "results" / "depth.md").read_text().count("\n| ") == 5
    monkeypatch.setattr(depth, "shortened", None)  # what is there is not measured again
    monkeypatch.setattr(depth, "speeds", None)
    depth.main()
    assert "20 %" in capsys.readouterr().out


def test_embedder_command(small, monkeypatch, capsys):
    for name, value in {"STEPS": 4, "BATCH": 8, "CHOICE_BATCHES": 1, "BY_DEPTH": 20, "LENGTH": 32}.items():
        monkeypatch.setattr(embedder, name, value)
    monkeypatch.setattr(retrieval, "QUERIES", {"boolq": 20})
    monkeypatch.setattr(sys, "argv", ["embedder", "--rows", "small-before,small-after"])
    embedder.main()
    rows = json.loads((small / "results" / "embedder.json").read_text())["rows"]
    assert len(rows["curve"]["loss"]) == len(rows["curve"]["R@10"]) == 6
    assert rows["small-before"]["layers"] == rows["curve"]["small"] <= 3
    assert rows["small-before"]["lee"] != rows["small-after"]["lee"]
    folder = embedder.folder(rows["curve"]["small"], trained=True)
    assert Embedding.parse(json.loads((folder / "embedding.json").read_text())) == Embedding()
    monkeypatch.setattr(embedder, "measured", None)
    embedder.main()
    assert "small-after" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["embedder", "--rows", "medium"])
    with pytest.raises(SystemExit, match="no row is called 'medium'"):
        embedder.main()
