"""L3Prune: the loss by depth as recomputed text by text, the depths that follow, and the training that comes after."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
import torch.nn.functional as F
import transformers

from pared import families
from pared.compact import open_folder
from pared.compact_writer import FolderWriter
from pared.convert import convert
from pared.converters import pairs as reading
from pared.converters import recipe, training
from pared.converters.methods import contrastive, l3prune
from pared.converters.record import Record
from pared.embedding import Embedding
from pared.errors import BadParameter, SourceError
from pared.runtime.llm import LLM
from pared.tests import trained

NORMS = {
    "llama": "model.norm",
    "qwen2": "model.norm",
    "opt": "model.decoder.final_layer_norm",
    "gpt2": "transformer.ln_f",
}


def write_pairs(path, count: int = 12, negatives: bool = True):
    """Queries that are the beginning of their answers; every third without a hard negative."""
    generator = random.Random(0)
    stream = trained.words(3000, seed=1)
    rows = []
    for i in range(count):
        at = generator.randrange(2900)
        row = {"query": " ".join(stream[at : at + 5]), "positive": " ".join(stream[at + 3 : at + 14])}
        if negatives and i % 3:
            other = generator.randrange(2900)
            row |= {"negatives": [" ".join(stream[other : other + 7])], "instruction": "w4 w9"}
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows))
    return path


def params(text: str) -> l3prune.Params:
    return recipe.parse([f"l3prune:{text}"])[0].params


def searched(model, folder, text: str) -> Record:
    record = Record(folder)
    l3prune.search(model, trained.CALIBRATION, record, params(text), progress=False)
    return record


def encoder(folder, keep: int = 3, family: str = "llama"):
    model = trained.model(family)
    l3prune.apply(model, searched(model, folder, f"keep={keep}"))
    return model


def by_hand(model, family: str, depth: int, ids: list[int], start: int, pooling: str) -> torch.Tensor:
    """One text alone: the hidden states of `depth` blocks, the final norm, and the weights written out."""
    with torch.no_grad():
        states = model.base_model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
        last = depth == len(states) - 1  # transformers gives that one after the norm
        hidden = states[depth] if last else model.get_submodule(NORMS[family])(states[depth])
    rows = hidden[0, start:]
    if pooling == "weighted_mean":
        return sum((i + 1) * row for i, row in enumerate(rows)) / sum(range(1, len(rows) + 1))
    return {"mean": rows.mean(0), "last": rows[-1], "cls": rows[0]}[pooling]


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
@pytest.mark.parametrize("pooling", ["weighted_mean", "last"])
def test_the_curve_is_that_of_an_independent_computation(tmp_path, family, pooling):
    model, tokenizer = trained.model(family), trained.tokenizer()
    file = write_pairs(tmp_path / "pairs.jsonl")
    text = f"choose=large,pairs={file},batch=4,batches=2,pooling={pooling},scale=20,seed=3"
    found = searched(model, tmp_path / "record", text).facts("plan")
    expected = []
    for depth in range(1, 7):
        losses = []
        for batch in reading.read_pairs(file).draw(4, 2, 3):
            queries, candidates, negatives = [], [], []
            for pair in batch:
                told = tokenizer(f"{pair.instruction}; " if pair.instruction else "").input_ids
                own = tokenizer(pair.query).input_ids
                queries.append(by_hand(model, family, depth, told + own, len(told), pooling))
                candidates.append(by_hand(model, family, depth, tokenizer(pair.positive).input_ids, 0, pooling))
                for negative in pair.negatives:
                    negatives.append(by_hand(model, family, depth, tokenizer(negative).input_ids, 0, pooling))
            total = 0.0
            for i, query in enumerate(queries):
                scores = [20 * F.cosine_similarity(query, other, dim=0) for other in candidates + negatives]
                total += float(torch.logsumexp(torch.stack(scores), 0) - scores[i])
            losses.append(total / len(queries))
        expected.append(sum(losses) / len(losses))
    assert found["loss"] == pytest.approx(expected, abs=5e-5)
    assert len({round(loss, 3) for loss in expected}) > 3
    assert found["small"] == 1 + expected[:3].index(min(expected[:3]))
    assert found["large"] == found["keep"] == 4 + expected[3:].index(min(expected[3:]))


@pytest.mark.parametrize(
    ("curve", "small", "large"),
    [
        ([3, 1, 2, 5, 4, 6], 2, 5),
        ([1, 1, 1, 2, 2, 2], 1, 4),
        ([3, 2, 1, 0, 9], 2, 4),  # five layers: two are the lower half
        ([1, 0], 1, 2),
    ],
)
def test_depths_follow_from_the_curve(curve, small, large):
    assert l3prune.depths(curve) == (small, large)


def test_one_layer_has_no_halves():
    with pytest.raises(BadParameter, match="no two halves"):
        l3prune.depths([1.0])


@pytest.mark.parametrize(
    ("text", "kept"), [("keep=6", 6), ("keep=1", 1), ("percent=30", 4), ("percent=0", 6), ("percent=83", 1)]
)
def test_numbers_and_shares(tmp_path, text, kept):
    assert searched(trained.model(), tmp_path, text).facts("plan")["keep"] == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep=0", "keep=0 is outside 1"),
        ("keep=7", "keep=7 leaves 7 of 6 layers; keep 1 to 6"),
        ("percent=90", "percent=90 leaves 0 of 6"),
        ("pooling=mean", "one of keep=25, percent=30 and choose=large"),
        ("keep=2,percent=30", "one of keep=25, percent=30 and choose=large"),
        ("choose=large", "choose reads pairs=FILE"),
        ("keep=2,pairs=x.jsonl", "choose reads pairs=FILE"),
        ("keep=2,pooling=max", "pooling=max is not one of weighted_mean, mean, last, cls"),
    ],
)
def test_bad_input(tmp_path, text, message):
    with pytest.raises(BadParameter, match=message):
        searched(trained.model(), tmp_path, text)


def test_a_killed_search_goes_on_and_other_pairs_begin_anew(tmp_path, monkeypatch):
    file = write_pairs(tmp_path / "pairs.jsonl")
    text = f"choose=small,pairs={file},batch=4,batches=3"
    calls = []
    losses = l3prune._batch_losses

    def counted(*told):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*told)

    monkeypatch.setattr(l3prune, "_batch_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        searched(trained.model(), tmp_path / "record", text)
    resumed = searched(trained.model(), tmp_path / "record", text).facts("plan")
    assert len(calls) == 4
    assert resumed == searched(trained.model(), tmp_path / "other", text).facts("plan")
    write_pairs(file, 24, negatives=False)
    again = searched(trained.model(), tmp_path / "record", text).facts("plan")
    assert again["loss"] != resumed["loss"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_the_folder_is_a_stock_encoder(tmp_path, family):
    """AutoModel loads it whole, and gives the hidden states of the dense model at that depth."""
    src = trained.checkpoint(tmp_path / "src", family)
    convert(src, tmp_path / "out", methods=["l3prune:keep=4,template=none,max_length=64"], progress=False)
    stock, told = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = [3, 9, 20, 11]
    hidden = stock(torch.tensor([ids])).last_hidden_state[0, -1]
    assert torch.allclose(hidden, by_hand(trained.model(family), family, 4, ids, 0, "last"), atol=1e-5)
    with open_folder(tmp_path / "out") as folder:
        assert folder.config["tie_word_embeddings"] is True
        assert folder.config["architectures"] == [type(stock).__name__]
        assert len(families.read(folder.config).layers) == 4
        assert "lm_head.weight" not in folder.manifest.tensors
    embedding = Embedding.parse(json.loads((tmp_path / "out" / "embedding.json").read_text()))
    assert embedding == Embedding(max_length=64)
    with pytest.raises(BadParameter, match="is a text encoder without a head"):
        LLM(tmp_path / "out")
    again = convert(tmp_path / "out", tmp_path / "again", progress=False)
    assert again.rows and (tmp_path / "again" / "embedding.json").exists()


# --- contrastive training -----------------------------------------------------------------------


def training_params(file, **given) -> contrastive.Params:
    few = {"steps": 30, "warm_up": 3, "batch": 6, "lr": 5e-3, "r": 4, "alpha": 8.0, "dropout": 0.0}
    return contrastive.Params(**{"pairs": str(file), **few, **given})


def teach(model, folder, given: contrastive.Params) -> Record:
    record = Record(folder)
    contrastive.search(model, trained.CALIBRATION, record, given, progress=False)
    return record


def test_the_loss_is_cross_entropy_over_all_candidates():
    torch.manual_seed(0)
    queries, candidates = torch.randn(3, 5), torch.randn(5, 5)
    total = 0.0
    for i, query in enumerate(queries):
        scores = torch.stack([7 * query @ other / query.norm() / other.norm() for other in candidates])
        total -= float(scores.softmax(0)[i].log())
    assert float(reading.contrastive_loss(queries, candidates, 7.0)) == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_lowers_the_loss_and_merges_exactly(tmp_path, family, monkeypatch):
    file = write_pairs(tmp_path / "pairs.jsonl", 24)
    model = encoder(tmp_path / "plan", family=family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = model.embedding.tokenize(trained.tokenizer(), ["w3 w9 w20"])
    seen = []
    train = training.train

    def spy(*told):
        out = train(*told)
        seen.append(reading.embed(model, tokens, "mean").detach())
        return out

    monkeypatch.setattr(contrastive, "train", spy)
    record = teach(model, tmp_path / "taught", training_params(file))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), (
        "search leaves the model as it was"
    )
    contrastive.apply(model, record)
    assert torch.allclose(reading.embed(model, tokens, "mean"), seen[0], rtol=1e-4, atol=1e-4)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    linears = families.read(model.config.to_dict()).linears()
    assert changed == {f"{path}.weight" for path in linears if path != "lm_head"}
    first, last = contrastive.summary(record)["loss"]
    assert last < first


def test_a_killed_training_goes_on(tmp_path, monkeypatch):
    file = write_pairs(tmp_path / "pairs.jsonl", 24)
    given = training_params(file, steps=12, dropout=0.1)
    whole = teach(encoder(tmp_path / "plan"), tmp_path / "whole", given)
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    embed, calls = contrastive.embed, []

    def killed(*told):
        calls.append(1)
        if len(calls) == 2 * 9:
            raise KeyboardInterrupt
        return embed(*told)

    monkeypatch.setattr(contrastive, "embed", killed)
    model = encoder(tmp_path / "plan")
    with pytest.raises(KeyboardInterrupt):
        teach(model, tmp_path / "killed", given)
    assert not any("lora" in name for name, _ in model.named_parameters())
    resumed = teach(copy.deepcopy(model), tmp_path / "killed", given)
    assert len(calls) == 2 * 9 + 2 * 4
    assert resumed.facts("trained")["loss"] == pytest.approx(whole.facts("trained")["loss"], rel=1e-5)
    for name, tensor in whole.tensors("trained").items():
        assert torch.allclose(resumed.tensors("trained")[name], tensor, rtol=1e-4, atol=1e-6), name


def test_what_cannot_be_trained(tmp_path):
    file = write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(BadParameter, match="give --method l3prune"):
        teach(trained.model(), tmp_path / "none", training_params(file))
    with pytest.raises(SourceError, match="no dataset of the pairs has 64"):
        teach(encoder(tmp_path / "plan"), tmp_path / "few", training_params(file, batch=64))
    with pytest.raises(BadParameter, match=r"contrastive needs pairs=\.\.\."):
        recipe.parse(["contrastive"])


def test_depth_and_training_through_convert(tmp_path):
    src = trained.checkpoint(tmp_path / "src")
    file = write_pairs(tmp_path / "pairs.jsonl", 24)
    methods = [
        f"l3prune:choose=small,pairs={file},batch=6,batches=2",
        f"contrastive:pairs={file},steps=6,warm_up=1,batch=6,r=2,lr=1e-2",
    ]
    convert(src, tmp_path / "out", methods=methods, progress=False)
    with open_folder(tmp_path / "out") as folder:
        pruned, taught = folder.manifest.provenance["methods"]
        kept = len(families.read(folder.config).layers)
    assert kept == pruned["result"]["small"] <= 3
    assert taught["result"]["steps"] == 6 and taught["result"]["stopped"] is None
    assert pruned["result"]["pairs"] == taught["result"]["pairs"] == reading.read_pairs(file).sha256
    stock = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert torch.isfinite(stock(torch.tensor([[3, 4]])).last_hidden_state).all()


def test_a_conversion_that_was_killed_begins_anew_with_other_pairs(tmp_path, monkeypatch):
    src = trained.checkpoint(tmp_path / "src")
    file = write_pairs(tmp_path / "pairs.jsonl", 24)
    methods = ["l3prune:keep=3", f"contrastive:pairs={file},steps=3,warm_up=1,batch=6,r=2"]

    def killed(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FolderWriter, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "out", methods=methods, progress=False)
    write_pairs(file, 30)
    convert(src, tmp_path / "out", methods=methods, progress=False)
    with open_folder(tmp_path / "out") as folder:
        assert folder.manifest.provenance["methods"][1]["result"]["pairs"] == reading.read_pairs(file).sha256
    with pytest.raises(BadParameter, match=r"a method reads .*none\.jsonl, which cannot be read"):
        convert(src, tmp_path / "x", methods=[f"l3prune:choose=large,pairs={tmp_path / 'none.jsonl'}"], progress=False)


def test_basis_sharing_of_an_encoder(tmp_path):
    src = trained.checkpoint(tmp_path / "src")
    (tmp_path / "text.txt").write_text(trained.TEXT)
    methods = ["l3prune:keep=4", "basis_sharing:ratio=30,samples=16,length=16"]
    convert(src, tmp_path / "out", methods=methods, calibration=tmp_path / "text.txt", progress=False)
    with open_folder(tmp_path / "out") as folder:
        assert {entry.format for entry in folder.manifest.units} == {"dense", "shared_basis"}
        assert len(families.read(folder.config).layers) == 4
