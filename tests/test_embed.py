"""Embedder: the vectors of sentence-transformers' stock modules, whatever stands in the batch; and what it refuses."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

import pared.hf
from pared import LLM, Embedder, errors, families, sentence_layout
from pared.convert import convert, export
from pared.embedding import POOLINGS, Embedding, Tokens, pool
from pared.kernels.native import library
from pared.runtime.embed import TextCut
from pared.runtime.loader import load
from pared.runtime.packed import Packed, batches
from pared.runtime.vectors import PRECISIONS, quantize
from pared.tests import tiny, trained

assert pared.hf.METHOD == "pared"  # the door of compressed folders is open from here on
BOUND = 1e-5


def text(*words: int) -> str:
    return " ".join(f"w{i}" for i in words)


WORDS = [*range(3, 20), *range(30, 40)] * 2  # w2 ends a text, also inside of w20
TEXTS = [text(*WORDS[:length]) for length in (5, 1, 30, 17, 2, 16, 9)] + [text(9, 9, 4), text(31)]


def encoder(path: Path, family: str = "llama", embedding: Embedding | None = None, source: Path | None = None) -> Path:
    """A compact folder in sentence-transformers' layout."""
    convert(source or trained.checkpoint(path / "hf", family), path / "out", progress=False)
    return describe(path / "out", embedding or Embedding("mean", skip_instruction=False))


def describe(folder: Path, embedding: Embedding) -> Path:
    for name, content in sentence_layout.files(embedding, 32).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def sentence_transformer(path: Path):
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own and transformers' matters
        return SentenceTransformer(str(path), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = {"query": f"{text(7, 8)} ", "document": ""}
    embedding = Embedding("mean", skip_instruction=False, normalize=True, prompts=prompts, max_length=24)
    return encoder(tmp_path_factory.mktemp("embed"), embedding=embedding)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return Embedder(folder, device="cpu", strict=library.load() is not None)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_vectors_of_stock_modules(tmp_path, family):
    folder = encoder(tmp_path, family)
    for pooling in POOLINGS:
        describe(folder, Embedding(pooling, skip_instruction=False))
        theirs = sentence_transformer(folder).encode(TEXTS, batch_size=4)
        ours = Embedder(folder, batch_tokens=40).encode(TEXTS)
        assert ours.dtype == np.float32
        assert np.abs(ours - theirs).max() < BOUND * max(1.0, np.abs(theirs).max()), pooling


def test_prompts_normalising_and_cutting_as_stock_modules_do(folder, embedder):
    theirs = sentence_transformer(folder)
    calls = (
        {"prompt_name": "query"},
        {"prompt": f"{text(20, 21)} "},
        {"truncate_dim": 8},
        {"truncate_dim": 8, "normalize_embeddings": True},
    )
    for options in calls:
        ours, other = embedder.encode(TEXTS[:2], **options), theirs.encode(TEXTS[:2], **options)
        assert ours.shape == other.shape and np.abs(ours - other).max() < BOUND, options
    assert np.abs(embedder.encode_query(TEXTS[1]) - theirs.encode_query(TEXTS[1])).max() < BOUND
    assert np.abs(embedder.encode_document(TEXTS[1]) - theirs.encode_document(TEXTS[1])).max() < BOUND
    assert not np.allclose(embedder.encode_query(TEXTS[1]), embedder.encode(TEXTS[1]), atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_masked_prompt_as_stock_modules_do(tmp_path, pooling):
    folder = encoder(tmp_path, embedding=Embedding(pooling, prompts={"query": f"{text(7, 8)} "}))
    for options in ({}, {"prompt_name": "query"}):
        theirs = sentence_transformer(folder).encode(TEXTS, **options)
        assert np.abs(Embedder(folder).encode(TEXTS, **options) - theirs).max() < BOUND


def test_a_compressed_encoder_through_both_doors(tmp_path):
    src = trained.checkpoint(tmp_path / "src")
    (tmp_path / "text.txt").write_text(trained.TEXT)
    methods = ["l3prune:keep=4,pooling=mean", "basis_sharing:ratio=30,samples=16,length=16"]
    convert(src, tmp_path / "out", methods=methods, calibration=tmp_path / "text.txt", progress=False)
    embedder = Embedder(tmp_path / "out")
    assert len(embedder.model.weights.blocks) == 4 and embedder.embedding.pooling == "mean"
    theirs = sentence_transformer(tmp_path / "out").encode(TEXTS)
    assert np.abs(embedder.encode(TEXTS) - theirs).max() < BOUND


def test_the_layout_survives_conversion_and_conversion_back(folder, tmp_path):
    source = tmp_path / "plain"
    export(folder, source)
    describe(source, sentence_layout.read(folder))
    (source / "embedding.json").unlink()
    convert(source, tmp_path / "again", progress=False)
    assert (tmp_path / "again" / "1_Pooling" / "config.json").is_file()
    again = Embedder(tmp_path / "again")
    assert again.embedding == sentence_layout.read(folder)
    assert np.array_equal(again.encode(TEXTS[:2]), Embedder(folder).encode(TEXTS[:2]))


def packed_and_alone(tmp_path: Path, name: str, lengths: tuple[int, ...]) -> tuple[Packed, list[Tokens], torch.Tensor]:
    """A decoder of pared for packed texts, texts, and transformers' vectors of each alone."""
    convert(tiny.checkpoint(tmp_path / "hf", name), tmp_path / "out", progress=False)
    generator = torch.Generator().manual_seed(0)
    texts = [Tokens(torch.randint(3, 40, (n,), generator=generator).tolist(), n // 3) for n in lengths]
    model, vectors = tiny.model(name).base_model, []
    for one in texts:
        with torch.no_grad():
            hidden = model(torch.tensor([one.ids])).last_hidden_state[:, one.start :]
        vectors.append(pool(hidden, torch.ones(hidden.shape[:2]).bool(), "weighted_mean")[0])
    return Packed(load(tmp_path / "out", "cpu", head=False), "weighted_mean"), texts, torch.stack(vectors)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_family_packed_is_the_model_one_by_one(tmp_path, name):
    packed, texts, expected = packed_and_alone(tmp_path, name, (5, 1, 30, 17, 2, 16))
    together, scale = packed(texts), expected.abs().max().clamp(min=1)
    assert (together - expected).abs().max() < BOUND * scale
    assert (together - packed(texts[::-1]).flip(0)).abs().max() < 1e-6 * scale
    assert (together - torch.cat([packed([one]) for one in texts])).abs().max() < 1e-6 * scale
    assert torch.equal(together, packed(texts))


def test_two_texts_packed(tmp_path):
    """Small enough for Triton's interpreter."""
    packed, texts, expected = packed_and_alone(tmp_path, "qwen3", (3, 2))
    assert (packed(texts) - expected).abs().max() < BOUND * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_attention_both_ways_where_the_config_says_so(tmp_path, family):
    source = trained.checkpoint(tmp_path / "hf", family)
    causal = Embedder(encoder(tmp_path, family, source=source)).encode(TEXTS)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    folder = encoder(tmp_path / "both", family, source=source)
    embedder, theirs = Embedder(folder, batch_tokens=40), sentence_transformer(folder)
    ours, expected = embedder.encode(TEXTS), theirs.encode(TEXTS, batch_size=1)
    assert np.abs(ours - expected).max() < BOUND * max(1.0, np.abs(expected).max())
    assert not np.allclose(ours[0], causal[0], atol=1e-3) and np.allclose(ours[1], causal[1], atol=1e-5)
    (folder / "embedding.json").unlink()
    with pytest.raises(errors.BadParameter, match="attends both ways"):
        LLM(folder)


def test_windows_both_ways_are_refused():
    config = tiny.CONFIGS["mistral"].to_dict() | {"is_causal": False, "sliding_window": 4}
    with pytest.raises(errors.UnsupportedModel, match="is_causal is false beside sliding windows"):
        families.read(config)


def test_company_and_order_do_not_change_a_vector(embedder):
    texts = [one for one in TEXTS if len(one.split()) < 24]
    together = embedder.encode(texts)
    assert np.abs(together - embedder.encode(texts[::-1])[::-1]).max() < 1e-6
    assert np.abs(together - np.stack([embedder.encode(one) for one in texts])).max() < 1e-6


def test_half_precision_stays_near(folder, embedder):
    for dtype in ("bfloat16", "float16"):
        cosines = (Embedder(folder, dtype).encode(TEXTS[:2]) * embedder.encode(TEXTS[:2])).sum(1)
        assert cosines.min() > 0.999


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))
def test_every_text_is_in_one_batch_within_the_budget(lengths, budget):
    made = batches(lengths, budget)
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget


def test_forms_of_output(embedder):
    many, one = embedder.encode(TEXTS[:2]), embedder.encode(TEXTS[0])
    assert many.shape == (2, embedder.dimension) and one.shape == (embedder.dimension,)
    assert embedder.encode([]).shape == (0, embedder.dimension)
    tensor = embedder.encode(TEXTS[:2], convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), many)
    assert np.array_equal(embedder.encode(iter(TEXTS[:2])), many)
    assert np.allclose((many * many).sum(1), 1, atol=1e-6)


def test_no_head_no_cache_and_no_slow_path(embedder):
    with pytest.raises(errors.EngineError, match="without its head"):
        embedder.model.run_layers(*[None] * 3)
    embedder.encode(TEXTS[:2])
    pools = {id(pools) for pools in embedder._packed._cache.layers}
    assert len(embedder.model.weights.blocks) == 6 and len(pools) == 1
    assert embedder._packed._cache.nbytes == sum(pool.nbytes for pool in embedder._packed._cache.layers[0])


def test_strict_refuses_plain_torch(folder, monkeypatch):
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "why_not", lambda: "no compiler")
    with pytest.raises(errors.FallbackRefused, match="no compiler"):
        Embedder(folder, strict=True).encode(TEXTS[:2])


def test_long_texts_are_cut_and_told(folder, embedder):
    found = embedder.embed(TEXTS)
    assert found.cut == [0, 0, 6, 0, 0, 0, 0, 0, 0] and found.tokens[:3] == [5, 1, 24]
    assert found.report == "1 of 9 texts were cut, the longest by 6 tokens"
    with pytest.warns(TextCut, match="1 of 9 texts were cut, .* max_length is 24"):
        vectors = embedder.encode(TEXTS)
    assert np.allclose(vectors[2], embedder.encode(text(*WORDS[:24])), atol=1e-6)
    assert Embedder(folder, max_length=40).embed(TEXTS).report is None
    with pytest.raises(errors.BadParameter, match="max_length must be 1 to 64, the context"):
        Embedder(folder, max_length=65)


def test_a_cut_text_keeps_its_end_of_text(tmp_path):
    tokenizer = trained.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)]
    )
    made = Embedding("last", max_length=6, prompts={"q": f"{text(7, 8)} "})
    (short, long) = made.tokenize(tokenizer, [text(5), text(*range(3, 20))])
    assert (short.ids, short.start, short.cut) == ([1, 5, 2], 0, 0)
    assert (long.ids, long.start, long.cut) == ([1, 3, 4, 5, 6, 2], 0, 13)
    (told,) = made.tokenize(tokenizer, [text(5)], made.prompts["q"])
    assert (told.ids, told.start) == ([1, 7, 8, 5, 2], 3)


def test_precisions_mean_what_sentence_transformers_means():
    from sentence_transformers.util import quantize_embeddings

    vectors = np.random.default_rng(0).normal(size=(200, 24)).astype(np.float32)
    ranges = np.stack([np.full(24, -1.5), np.linspace(1, 2, 24)]).astype(np.float32)
    for precision in PRECISIONS:
        for given_ranges in (None, ranges):
            ours, theirs = (
                quantize(vectors, precision, given_ranges),
                quantize_embeddings(vectors, precision, given_ranges),
            )
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), precision
    assert quantize(vectors[:0], "int8").shape == (0, 24) and quantize(vectors[:0], "binary").shape == (0, 3)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["w3", ""], {}, "text 1 is empty"),
        (" \n\t", {}, "text 0 is empty"),
        (["w3", 7], {}, "text 1 is a int, not a text"),
        (["w3", None], {}, "text 1 is a NoneType"),
        ([b"w3"], {}, "text 0 is a bytes"),
        (["w3 \ud800"], {}, r"text 0 is no text .*UTF-8"),
        ("w3", {"prompt_name": "title"}, "no prompt 'title'; it has query, document"),
        ("w3", {"truncate_dim": 0}, "1 to 32 dimensions, not 0"),
        ("w3", {"truncate_dim": 33}, "1 to 32 dimensions, not 33"),
        ("w3", {"precision": "int4"}, "precision must be one of float32"),
        ("w3", {"precision": "int8"}, "one vector has no ranges"),
        (["w3"], {"precision": "int8", "ranges": np.zeros((2, 3))}, r"ranges must be \[2, 32\]"),
    ],
)
def test_bad_input(folder, texts, options, message):
    embedder = Embedder(folder, max_length=20)
    with pytest.raises(errors.BadParameter, match=message):
        embedder.encode(texts, **options)


def test_junk_is_a_text_like_any_other(embedder):
    junk = "".join(map(chr, range(1, 256))) + "\x00\ufffd\U0001f600"
    assert np.isfinite(embedder.encode([junk, "w3"])).all()


def test_a_folder_that_does_not_say_how_it_pools(tmp_path):
    convert(trained.checkpoint(tmp_path / "hf"), tmp_path / "out", progress=False)
    with pytest.raises(errors.BadParameter, match="does not say how it pools; give pooling, one of weighted_mean"):
        Embedder(tmp_path / "out")
    with pytest.raises(errors.BadParameter, match="pooling must be one of"):
        Embedder(tmp_path / "out", pooling="max")
    assert Embedder(tmp_path / "out", pooling="last").max_length == 64
    with pytest.raises(errors.FolderError, match="is not a folder"):
        Embedder(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "change", "kind", "message"),
    [
        ("modules.json", [*"x"], errors.FolderDamaged, "not of the right form"),
        ("modules.json", {"a": 1}, errors.FolderDamaged, "no list"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, errors.UnsupportedModel, "pooling max is not one of"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, errors.UnsupportedModel, "cls and mean"),
        ("sentence_bert_config.json", {"do_lower_case": True}, errors.UnsupportedModel, "do_lower_case is True"),
        ("sentence_bert_config.json", {"query_expansion": {"length": 3}}, errors.UnsupportedModel, "query_expansion"),
    ],
)
def test_layouts_that_are_refused(tmp_path, file, change, kind, message):
    describe(tmp_path, Embedding("mean"))
    (tmp_path / "embedding.json").unlink()
    (tmp_path / file).write_text(json.dumps(change))
    with pytest.raises(kind, match=message):
        sentence_layout.read(tmp_path)


def test_other_modules_are_refused_and_todays_keys_read(tmp_path):
    for pooling in POOLINGS:
        made = Embedding(pooling, skip_instruction=False, normalize=True, max_length=99, prompts={"q": "x"})
        describe(tmp_path, made)
        (tmp_path / "embedding.json").unlink()
        assert sentence_layout.read(tmp_path) == made
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken", "embedding_dimension": 32}')
    assert sentence_layout.read(tmp_path).pooling == "last"
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(errors.UnsupportedModel, match="Transformer, Pooling, Dense"):
        sentence_layout.read(tmp_path)


def test_a_template_is_for_embedding_json_alone():
    assert set(sentence_layout.files(Embedding(template="chatml"), 32)) == {"embedding.json"}
