"""What an encoder's texts become: tokens with the instruction masked out, and vectors by each pooling."""

from __future__ import annotations

import json

import pytest
import torch

from pared.converters.pairs import embed, padded, read_pairs
from pared.embedding import POOLINGS, Embedding, pool
from pared.errors import BadParameter, SourceError
from pared.tests import trained


def ids(*words: int) -> str:
    return " ".join(f"w{i}" for i in words)


def test_poolings_by_hand():
    hidden = torch.tensor([[[1.0, 0], [2, 0], [4, 8], [100, 100]], [[9, 9], [3, 0], [6, 3], [0, 3]]])
    counted = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    expected = {
        "mean": [[7 / 3, 8 / 3], [3, 2]],
        "weighted_mean": [[(1 + 4 + 12) / 6, 24 / 6], [(3 + 12) / 6, (6 + 9) / 6]],
        "last": [[4, 8], [0, 3]],
        "cls": [[1, 0], [3, 0]],
    }
    assert set(expected) == set(POOLINGS)
    for pooling, vectors in expected.items():
        for dtype in (torch.float32, torch.bfloat16):
            found = pool(hidden.to(dtype), counted, pooling)
            assert found.dtype == torch.float32
            assert torch.allclose(found, torch.tensor(vectors).float(), atol=1e-6)


def test_the_instruction_is_not_counted():
    tokenizer = trained.tokenizer()
    (plain,) = Embedding().tokenize(tokenizer, [ids(5, 6, 7)])
    assert (plain.ids, plain.start) == ([5, 6, 7], 0)
    (told,) = Embedding().tokenize(tokenizer, [f" {ids(5, 6, 7)} "], prompt=f"{ids(8, 9)} ")
    assert (told.ids, told.start) == ([8, 9, 5, 6, 7], 2)
    (whole,) = Embedding(skip_instruction=False).tokenize(tokenizer, [ids(5, 6, 7)], prompt=f"{ids(8, 9)} ")
    assert (whole.ids, whole.start) == ([8, 9, 5, 6, 7], 0)


def test_templates_stand_around_prompt_and_text_and_only_their_end_counts(smollm2_tokenizer):
    (found,) = Embedding(template="chatml").tokenize(smollm2_tokenizer, ["what is rain"], "Retrieve: ")
    text = smollm2_tokenizer.decode(found.ids)
    assert text == "<|im_start|>user\nRetrieve: what is rain<|im_end|>"
    assert smollm2_tokenizer.decode(found.ids[found.start :]).strip() == "what is rain<|im_end|>"
    (short,) = Embedding(template="llama3").tokenize(smollm2_tokenizer, ["rain"])
    assert smollm2_tokenizer.decode(short.ids) == "<|start_header_id|>user<|end_header_id|>\n\nrain<|eot_id|>"
    (inst,) = Embedding(template="inst").tokenize(smollm2_tokenizer, ["rain"])
    assert smollm2_tokenizer.decode(inst.ids) == "[INST] rain [/INST]"


def test_long_texts_are_cut_and_empty_ones_refused():
    tokenizer = trained.tokenizer()
    (cut,) = Embedding(max_length=4).tokenize(tokenizer, [ids(*range(3, 20))], f"{ids(1)} ")
    assert (cut.ids, cut.start) == ([1, 3, 4, 5], 1)
    with pytest.raises(BadParameter, match="text 1 is empty"):
        Embedding().tokenize(tokenizer, [ids(5), "  \n"])
    with pytest.raises(BadParameter, match="text 0 has no token within 2; shorten its instruction"):
        Embedding(max_length=2).tokenize(tokenizer, [ids(5)], f"{ids(1, 2, 3)} ")


def test_the_file_comes_back():
    made = Embedding("mean", "chatml", 256, skip_instruction=False)
    assert Embedding.parse(json.loads(made.file())) == made
    for wrong in ({"pooling": "max"}, {"template": "x"}, {"max_length": "9"}, {"depth": 3}):
        with pytest.raises(BadParameter, match=r"embedding\.json"):
            Embedding.parse(wrong)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_vector_does_not_depend_on_its_batch(family, pooling):
    model = trained.model(family)
    texts = [ids(*range(3, 3 + length)) for length in (2, 9, 5)]
    tokens = Embedding().tokenize(trained.tokenizer(), texts, f"{ids(1)} ")
    together = embed(model, tokens, pooling)
    for vector, one in zip(together, tokens, strict=True):
        hidden = model.base_model(torch.tensor([one.ids])).last_hidden_state
        alone = pool(hidden[:, one.start :], torch.ones(1, len(one.ids) - one.start).bool(), pooling)[0]
        assert torch.allclose(vector, alone, atol=1e-5)
    assert padded(tokens, torch.device("cpu"))[1].sum(1).tolist() == [3, 10, 6]


def test_pairs_are_read_and_drawn(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{i}"] * (i % 2), "dataset": "ab"[i % 3 == 0]}
        for i in range(20)
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    pairs = read_pairs(path)
    assert len(pairs.rows) == 20 and pairs.rows[1].negatives == ("n1",)
    drawn = pairs.draw(6, 100, seed=1)
    assert [len(batch) for batch in drawn] == [6, 6, 6]
    assert len({pair.query for batch in drawn for pair in batch}) == 18
    assert drawn == pairs.draw(6, 100, seed=1)
    epoch = [batch for batch, _ in zip(pairs.batches(4, 0), range(4), strict=False)]
    assert all(len({pair.dataset for pair in batch}) == 1 for batch in epoch)
    with pytest.raises(SourceError, match="there are 20 pairs, a batch has 21"):
        pairs.draw(21, 1, 0)
    with pytest.raises(SourceError, match="no dataset of the pairs has 14"):
        next(pairs.batches(14, 0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"query": "a"}', "line 1 .* has an empty positive"),
        ('{"query": "a", "positive": "b"}\n{"query": " ", "positive": "b"}', "line 2 .* has an empty query"),
        ('{"query": "a", "positive": "b", "negatives": [""]}', "has an empty negative"),
        ('{"query": "a", "positive": "b", "negatives": "c"}', "negatives as a list"),
        ('{"query": 3, "positive": "b"}', "something else than texts"),
        ("[1]", "not an object"),
        ("{", "no JSON"),
        ("\n", "holds no pairs"),
        (b"\xff\xfe\x00\x01", "cannot be read as UTF-8"),
    ],
)
def test_pairs_that_are_none(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError, match=message):
        read_pairs(path)
    with pytest.raises(SourceError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl")
