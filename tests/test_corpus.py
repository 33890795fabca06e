"""`pared embed`: every kind of file, stopped and started again, and files that are refused before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pared import Embedder, errors
from pared.runtime import corpus
from pared.runtime.corpus import Options, embed_file
from pared.runtime.texts import open_texts
from pared.runtime.vectors import quantize
from pared.tests.test_cli import Run
from pared.tests.test_cli import pared as pared  # a fixture
from pared.tests.test_embed import encoder, text

TEXTS = [text(3 + i % 17, 30 + i % 7, *[5] * (i % 4)) for i in range(23)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return Embedder(folder, device="cpu")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHARD", 5)


def written(path: Path, texts: list[str] = TEXTS) -> Path:
    if path.suffix == ".txt":
        path.write_text("".join(f"{one}\n" for one in texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"id": 1, "body": one}) for one in texts), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.table({"id": range(len(texts)), "body": texts}), path)
    return path


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_every_kind_of_file(embedder, tmp_path, kind):
    source, expected = written(tmp_path / f"in{kind}"), embedder.encode(TEXTS)
    done = embed_file(embedder, source, tmp_path / "out.npy", Options("body"), progress=False)
    assert (done.texts, done.cut, done.earlier, done.shape, done.dtype) == (23, 0, 0, (23, 32), "float32")
    assert done.tokens == sum(len(one.split()) for one in TEXTS)
    assert np.allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)
    embed_file(embedder, source, tmp_path / "out.parquet", Options("body"), progress=False)
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["text"].to_pylist() == TEXTS
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 32)
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), np.load(tmp_path / "out.npy"))
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_run_goes_on_and_gives_the_same_bytes(embedder, tmp_path, monkeypatch):
    source, out, shards = written(tmp_path / "in.txt"), tmp_path / "out.npy", []
    embed_file(embedder, source, tmp_path / "whole.npy", progress=False)
    honest = Embedder.embed

    def killed(self, texts, *rest, **named):
        if len(shards) == 2:
            raise KeyboardInterrupt
        shards.append(len(texts))
        return honest(self, texts, *rest, **named)

    monkeypatch.setattr(Embedder, "embed", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_file(embedder, source, out, progress=False)
    assert not out.exists() and (tmp_path / "out.npy.partial").is_dir()
    with (tmp_path / "out.npy.partial" / "journal").open("ab") as journal:
        journal.write(b'{"texts": 5, "tok')  # a line that a crash has torn
    monkeypatch.setattr(Embedder, "embed", honest)
    assert embed_file(embedder, source, out, progress=False).earlier == 10
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not (tmp_path / "out.npy.partial").exists()


def test_other_texts_or_another_prompt_begin_anew(embedder, tmp_path, monkeypatch):
    out, seen = tmp_path / "out.npy", []
    assemble = corpus._assemble

    def stopped(_embedder, work, *_rest):
        seen.append(work.earlier)
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "_assemble", stopped)
    runs = [(TEXTS, None), (TEXTS, None), (TEXTS, "w3 "), (TEXTS[:9], "w3 "), (TEXTS[:9], "w3 ")]
    for texts, prompt in runs:
        with pytest.raises(KeyboardInterrupt):
            embed_file(embedder, written(tmp_path / "in.txt", texts), out, Options(prompt=prompt), progress=False)
    assert seen == [0, 23, 0, 0, 9]
    monkeypatch.setattr(corpus, "_assemble", assemble)
    done = embed_file(embedder, tmp_path / "in.txt", out, Options(prompt="w3 ", dimensions=8), progress=False)
    assert done.shape == (9, 8)
    assert np.allclose(np.load(out), embedder.encode(TEXTS[:9], prompt="w3 ", truncate_dim=8), atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_fewer_bits_over_the_whole_corpus(embedder, tmp_path, precision):
    options = Options(normalize=True, dimensions=16, precision=precision)
    embed_file(embedder, written(tmp_path / "in.txt"), tmp_path / "exact.npy", Options(), progress=False)
    embed_file(embedder, tmp_path / "in.txt", tmp_path / "out.npy", options, progress=False)
    whole = np.load(tmp_path / "exact.npy")[:, :16]
    whole = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    found, expected = np.load(tmp_path / "out.npy"), quantize(whole, precision)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= ("8" in precision)


def test_one_run_at_a_time(embedder, tmp_path, monkeypatch):
    source, out = written(tmp_path / "in.txt"), tmp_path / "out.npy"
    with corpus._Work(out, "another"), pytest.raises(errors.FolderBusy, match="another process is embedding"):
        embed_file(embedder, source, out, progress=False)
    embed_file(embedder, source, out, progress=False)
    with pytest.raises(errors.FolderExists, match="give --overwrite"):
        embed_file(embedder, source, out, progress=False)
    embed_file(embedder, source, out, Options(dimensions=4), overwrite=True, progress=False)
    assert np.load(out).shape == (23, 4)
    (tmp_path / "x.npy.partial").mkdir()
    (tmp_path / "x.npy.partial" / "mine").touch()
    with pytest.raises(errors.FolderExists, match="pared did not make it"):
        embed_file(embedder, source, tmp_path / "x.npy", progress=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"w3", r"must end in one of \.txt, \.jsonl, \.parquet"),
        ("in.txt", b"w3\n\nw4\n", "row 2 is empty"),
        ("in.txt", b"", "holds no text"),
        ("in.txt", b"w3\n\xff\xfe\x00junk", "cannot be read as UTF-8"),
        ("in.jsonl", b'{"text": "w3"}\n{"body": "w3"}', "row 2 has nothing under 'text'; name the field"),
        ("in.jsonl", b'{"text": "w3"}\n{"text": 3}', "row 2 is a int"),
        ("in.jsonl", b'{"text": "\\ud800"}', "row 1 is no text"),
        ("in.jsonl", b'{"text": "w3"}\nnot', "line 2 is no JSON"),
        ("in.jsonl", b"[3]", "row 1 has nothing"),
        ("in.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_files_that_are_refused(embedder, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.BadParameter, match=message):
        embed_file(embedder, tmp_path / name, tmp_path / "out.npy", progress=False)
    assert not (tmp_path / "out.npy.partial").exists()


def test_columns_and_options_that_are_refused(embedder, tmp_path):
    source = written(tmp_path / "in.parquet")
    with pytest.raises(errors.BadParameter, match="no column 'text'; it has id, body"):
        list(open_texts(source, "text"))
    with pytest.raises(errors.BadParameter, match=r"must end in \.npy or \.parquet"):
        embed_file(embedder, source, tmp_path / "out.bin", Options("body"))
    with pytest.raises(errors.BadParameter, match="1 to 32 dimensions"):
        embed_file(embedder, source, tmp_path / "out.npy", Options("body", dimensions=99))
    with pytest.raises(errors.BadParameter, match="precision must be one of"):
        embed_file(embedder, source, tmp_path / "out.npy", Options("body", precision="int4"))


def test_without_pyarrow(monkeypatch, tmp_path):
    source = written(tmp_path / "in.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(errors.BadParameter, match="pip install pyarrow"):
        list(open_texts(source, "body"))


def test_the_command(pared: Run, folder: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [*TEXTS, " ".join(["w3"] * 70)])
    options = ("--field", "body", "--normalize", "--dimensions", 16, "--precision", "int8")
    code, out, _ = pared("embed", folder, source, tmp_path / "out.npy", *options)
    assert code == 0 and "24 of 16, int8" in out and "1, to 64 tokens" in out and "loading included" in out
    assert np.load(tmp_path / "out.npy").dtype == np.int8
    code, _, err = pared("embed", folder, source, tmp_path / "out.npy")
    assert code == 1 and "FolderExists" in err
    code, _, err = pared("embed", folder, source, tmp_path / "more.npy", "--prompt-name", "title")
    assert code == 1 and "no prompt 'title'" in err


def test_no_pyarrow_for_lines_and_npy(folder: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "in.txt", TEXTS[:2])
    code = (
        "import sys; sys.modules['pyarrow'] = None; from pared import Embedder; from pared.runtime.corpus import *;"
        f"embed_file(Embedder({str(folder)!r}), {str(source)!r}, {str(tmp_path / 'out.npy')!r}, progress=False)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=300)
    assert np.load(tmp_path / "out.npy").shape == (2, 32)
