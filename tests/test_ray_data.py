"""`pared embed --ray` and `pared generate --ray`: two workers give what one process gives, row by row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pared import LLM, Embedder, SamplingParams, errors
from pared.runtime import spread
from pared.runtime.corpus import Options
from pared.tests import ray_cluster
from pared.tests.test_embed import encoder, text

TEXTS = [text(3 + i % 17, 30 + i % 7, *[5] * (i % 4)) for i in range(40)]
PROMPTS = [f"prompt number {i}" for i in range(600)]
TESTS = Path(__file__).resolve().parent
Pared = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def pared() -> Iterator[Pared]:
    """Run a command line with a cluster of two CPUs."""
    with ray_cluster.environment() as variables, ray_cluster.cluster(variables) as head:

        def run(*arguments: object) -> subprocess.CompletedProcess:
            command = [sys.executable, "-m", "pared.cli", *map(str, arguments), "--device", "cpu"]
            place = {**variables, "RAY_ADDRESS": head}
            return subprocess.run(command, cwd=TESTS, env=place, capture_output=True, text=True, check=False)

        yield run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("spread"))


def corpus(home: Path, texts: list[str], kind: str) -> Path:
    """A folder of four files, whose names have an order."""
    home.mkdir()
    for part in range(4):
        each = len(texts) // 4
        rows = [{"id": i, "body": texts[i]} for i in range(each * part, each * part + each)]
        path = home / f"part-{part}{kind}"
        if kind == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return home


def read(out: Path) -> pyarrow.Table:
    return pyarrow.concat_tables([parquet.read_table(file) for file in sorted(out.glob("*.parquet"))])


@ray_cluster.needs_ray
@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
def test_vectors_are_those_of_one_process(pared: Pared, folder: Path, tmp_path: Path, kind: str) -> None:
    source, out = corpus(tmp_path / "in", TEXTS, kind), tmp_path / "out"
    done = pared("embed", folder, source, out, "--ray", 2, "--field", "body", "--normalize", "--dimensions", 16)
    assert done.returncode == 0, done.stderr
    table = read(out)
    assert table.column_names == ["id", "body", "embedding"]
    assert table["id"].to_pylist() == list(range(40)) and table["body"].to_pylist() == TEXTS
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 16)
    alone = Embedder(folder, device="cpu").encode(TEXTS, normalize_embeddings=True, truncate_dim=16)
    assert np.abs(np.stack(table["embedding"].to_numpy()) - alone).max() < 1e-6
    assert "40" in done.stdout and [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


@ray_cluster.needs_ray
def test_answers_are_those_of_one_process(pared: Pared, tiny_folder: Path, tmp_path: Path) -> None:
    source, out = corpus(tmp_path / "in", PROMPTS, ".jsonl"), tmp_path / "out"
    sampling = {"max_tokens": 12, "temperature": 0.8, "seed": 3}
    options = [item for name, value in sampling.items() for item in (f"--{name.replace('_', '-')}", value)]
    done = pared("generate", tiny_folder, source, "--ray", 2, "--out", out, "--field", "body", *options)
    assert done.returncode == 0, done.stderr
    table = read(out)
    alone = LLM(tiny_folder, device="cpu", num_blocks=100).generate(PROMPTS, SamplingParams(**sampling))
    assert table["id"].to_pylist() == list(range(600))
    assert len(list(out.glob("*.parquet"))) > 1  # or one worker has had it all
    assert table["answer"].to_pylist() == [output.text for output in alone]
    assert table["finish_reason"].to_pylist() == [output.finish_reason for output in alone]
    assert table["output_tokens"].to_pylist() == [len(output.token_ids) for output in alone]


@ray_cluster.needs_ray
def test_a_wrong_text_is_one_message_and_leaves_nothing(pared: Pared, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"body": "w3 w4"}\n{"body": " "}\n', encoding="utf-8")
    done = pared("embed", folder, source, tmp_path / "out", "--ray", 1, "--field", "body")
    assert done.returncode == 1
    assert "BadParameter" in done.stderr and "a text of the corpus" in done.stderr.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# --- without a cluster --------------------------------------------------------------------------------


def test_a_worker_adds_its_columns(folder: Path, tiny_folder: Path) -> None:
    rows = {"id": [4, 5, 6], "body": TEXTS[4:7]}
    embeds = spread.Embeds("body", {"path": folder, "device": "cpu"}, Options(normalize=True, precision="binary"))
    table = embeds(pyarrow.table(rows))
    assert table.select(["id", "body"]).to_pydict() == rows
    alone = Embedder(folder, device="cpu").encode(TEXTS[4:7], normalize_embeddings=True, precision="binary")
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), alone) and alone.dtype == np.int8
    with pytest.raises(errors.BadParameter, match="columns of the names that are made: embedding"):
        embeds(table)
    with pytest.raises(errors.BadParameter, match="no 'body' in the corpus; it has text"):
        embeds(pyarrow.table({"text": ["w3"]}))

    generates = spread.Generates("body", {"path": tiny_folder, "device": "cpu"}, {"max_tokens": 5}, True)
    table = generates(pyarrow.table({"body": PROMPTS[:3]}))
    llm = LLM(tiny_folder, device="cpu", num_blocks=50)
    params = SamplingParams(max_tokens=5)
    alone = [llm.chat([{"role": "user", "content": prompt}], params).text for prompt in PROMPTS[:3]]
    assert table["answer"].to_pylist() == alone
    assert table["output_tokens"].to_pylist() == [5, 5, 5]


def test_what_cannot_be_spread_is_refused(folder: Path, tmp_path: Path) -> None:
    model = {"path": folder, "device": "cpu"}
    (tmp_path / "in.txt").write_text("w3\n")
    place = spread.Spread(tmp_path / "in.txt", tmp_path / "out", 2)
    with pytest.raises(errors.BadParameter, match="int8 needs the ranges of the whole corpus"):
        spread.embed(place, model, Options(precision="int8"))
    with pytest.raises(errors.FolderExists, match="already there"):
        spread.embed(spread.Spread(tmp_path / "in.txt", tmp_path, 2), model, Options())
    (tmp_path / "in.jsonl").write_text('{"text": "w3"}\n')
    with pytest.raises(errors.BadParameter, match="of one kind"):
        spread.embed(spread.Spread(tmp_path, tmp_path / "out", 2), model, Options())
    with pytest.raises(errors.BadParameter, match="of one kind"):
        spread.embed(spread.Spread(tmp_path / "nothing.txt", tmp_path / "out", 2), model, Options())


def test_workers_get_their_share() -> None:
    given = spread._resources({"CPU": 16.0, "GPU": 4.0}, 4, None)
    assert given == {"num_cpus": 3, "num_gpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "4"}}}
    assert spread._resources({"CPU": 16.0, "GPU": 4.0}, 8, "cpu")["num_gpus"] == 0
    assert [spread._resources({"CPU": float(cpus)}, 2, None)["num_cpus"] for cpus in (2, 3, 9)] == [0.5, 1, 4]
    assert spread._resources({"CPU": 1.0}, 1, None)["num_cpus"] == 0
    with pytest.raises(errors.BadParameter, match="5 workers do not fit: the cluster has 4 GPUs"):
        spread._resources({"CPU": 16.0, "GPU": 4.0}, 5, None)
