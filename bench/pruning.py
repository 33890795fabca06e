"""`python -m pared.bench.pruning`: what zeroed weights cost SmolLM2-135M, method by method and pattern by pattern.

Rows are cached in the JSON that is written, so that a stopped run goes on; `--rows` picks some. Calibration reads
BoolQ "train" passages, perplexity BoolQ "dev" passages and XSum articles: no passage is in both. Questions are asked
through lm-eval (the extra `eval`).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..kernels.dispatch import set_threads
from ..terminal import print_table
from .quality import LENGTH, ROOT, WINDOWS, as_folder, calibration, chosen, fresh, perplexity
from .tables import Table

RESULTS = ROOT / "bench" / "results" / "quality_pruning"
WORK = ROOT / ".data" / "pruning"
SAMPLES, SEED = 32, 0
TEXTS = ("boolq", "xsum")
TASKS = ("piqa", "commonsense_qa")
QUESTIONS = 400
PATTERNS = ("unstructured", "4:8", "2:4")
METHODS = ("gblm-l1", "gblm-l2", "wanda", "magnitude")
TITLE = "Pruned to half on SmolLM2-135M-Instruct"
PROTOCOL = (
    "The reference is SmolLM2-135M-Instruct dequantised from a Q4_1 GGUF file, not its bf16 checkpoint: its weights "
    "lie on a 4-bit grid, where equal magnitudes abound. Half of every block linear is zeroed (unstructured: of every "
    "row, for magnitude of every matrix), embedding and head stay; method and evaluation in fp32, nothing is trained "
    f"after. Calibration and gradients: {SAMPLES} windows of {LENGTH} tokens of BoolQ train passages, where the papers "
    f"take 128 of 2048 tokens of C4; gblm in its code's form, scale 100. Perplexity: the first {WINDOWS} windows of "
    f"{LENGTH} tokens of BoolQ dev passages (Wikipedia) and of XSum articles (news), joined by blank lines. Accuracy: "
    f"the first {QUESTIONS} questions of each task, by the log-probability of an answer for each character, in bf16; "
    "chance is 50 % for piqa and 20 % for commonsense_qa, one standard error some 2.4 points."
)
COLUMNS = ("method", "pattern", "zeroed", *TEXTS, *TASKS)


@dataclass(frozen=True)
class Setting:
    """A line of the table."""

    method: str
    pattern: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.pattern}"

    @property
    def recipe(self) -> str:
        method, _, norm = self.method.partition("-")
        text = f"{method}:pattern={self.pattern}"
        if method != "magnitude":
            text += f",samples={SAMPLES},length={LENGTH},seed={SEED}"
        return text + (f",norm={norm},gradients={gradient_file(norm)}" if norm else "")


SETTINGS = tuple(Setting(method, pattern) for pattern in PATTERNS for method in METHODS)


def main() -> None:
    """Measure what is missing, then print and write the table."""
    set_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help=f"some of {', '.join(s.name for s in SETTINGS)}, separated by commas")
    wanted = chosen({setting.name: setting for setting in SETTINGS}, parser.parse_args().rows)
    results = TABLE.load()
    for what, of in (("perplexity", perplexities), ("accuracy", accuracies)):
        if what not in results["rows"].get("dense", {}):
            TABLE.save(results, "dense", {what: of(fresh())})
        for setting in wanted:
            if what not in results["rows"].get(setting.name, {}):
                model, facts = pruned(setting)
                TABLE.save(results, setting.name, {what: of(model), **facts})
    print_table(TITLE, COLUMNS, table(results))
    print(PROTOCOL)
    print("\n".join(order(results)))


def table(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows that are there, under COLUMNS."""
    rows = results["rows"]
    lines = [("dense", "-", "0.0 %", *_measures(rows["dense"]))]
    for s in SETTINGS:
        if row := rows.get(s.name):
            lines.append((s.method, s.pattern, f"{100 * row['zeroed']:.1f} %", *_measures(row)))
    return lines


def _measures(row: dict[str, Any]) -> Iterator[str]:
    yield from (f"{row['perplexity'][text]:.2f}" for text in TEXTS)
    yield from (f"{100 * row['accuracy'][task]:.1f} %" if "accuracy" in row else "-" for task in TASKS)


def order(results: dict[str, Any]) -> list[str]:
    """Pattern by pattern, whether the papers' order holds: gblm at or below wanda, both far below magnitude."""
    rows, said = results["rows"], []
    for pattern in PATTERNS:
        found = {method: rows[name]["perplexity"] for method in METHODS if (name := f"{method}-{pattern}") in rows}
        if len(found) < len(METHODS):
            continue
        for text in TEXTS:
            values = {method: of_texts[text] for method, of_texts in found.items()}
            best = min(("gblm-l1", "gblm-l2"), key=values.__getitem__)
            ratio = values[best] / values["wanda"]
            holds = "at or below wanda" if ratio <= 1 else "above wanda"
            said.append(
                f"{pattern}, {text}: {best} is {holds} ({ratio:.3f} of its perplexity), "
                f"magnitude at {values['magnitude'] / values['wanda']:.1f} times wanda's."
            )
    return said


TABLE = Table(RESULTS, TITLE, PROTOCOL, COLUMNS, table, order)


# --- measuring -----------------------------------------------------------------------------------


def pruned(setting: Setting) -> tuple[Any, dict[str, Any]]:
    """The pruned model, from masks that an earlier run found where there are some, and what the row says of it."""
    from ..converters import recipe
    from ..converters.record import Record

    (step,) = recipe.parse([setting.recipe])
    if getattr(step.params, "gradients", None):
        compute_gradients(step.params.norm)
    model, record = fresh(), Record(WORK / setting.name.replace(":", "-"))
    step.method.search(model, calibration(), record, step.params)
    step.method.apply(model, record)
    settings = asdict(step.params) | {"gradients": None}
    return model, {**step.method.summary(record), "settings": settings}


def gradient_file(norm: str) -> Path:
    """Where the gradients that all patterns of a norm share lie."""
    return WORK / f"gradients_{norm}.pth"


def compute_gradients(norm: str) -> None:
    """Write `gradient_file(norm)` in the published layout, unless it is there."""
    import torch

    from .. import families
    from ..converters import gradients
    from ..converters.groups import kinds
    from ..converters.record import Record

    file = gradient_file(norm)
    if file.exists():
        return
    model, tokens = fresh(), calibration().windows(SAMPLES, LENGTH, SEED)
    spec = families.read(model.config.to_dict())
    names = [kind.name for kind in kinds(spec)]
    wanted = {i: [spec.path(i, name) for name in names] for i in range(len(spec.layers))}
    rule = gradients.Norm("l1" if norm == "l1" else "l2", gradients.PUBLISHED_SCALE, half=True)
    record = Record(WORK / f"gradients-{norm}")
    found = gradients.collect(model, tokens, wanted, rule, record)
    draft = file.with_suffix(".draft")
    torch.save({f"{name}_layer_{i}": found(spec.path(i, name)) for i in wanted for name in names}, draft)
    draft.replace(file)
    shutil.rmtree(record.folder)


def perplexities(model: Any) -> dict[str, float]:
    """On every text."""
    from .data import boolq_passages, xsum_documents

    passages = {"boolq": boolq_passages("dev")[:400], "xsum": xsum_documents()[:200]}
    return {text: perplexity(model, passages[text]) for text in TEXTS}


def accuracies(model: Any) -> dict[str, float]:
    """On every task, of the model packed and loaded as a folder in bf16."""
    from ..harness import multiple_choice
    from ..runtime.loader import load
    from ..runtime.text import Tokenizer
    from .data import TASKS as folder_of_tasks

    ask = multiple_choice(TASKS, folder_of_tasks, QUESTIONS, progress=True)
    with as_folder(model) as folder:
        found = ask(load(folder, "cpu"), Tokenizer(folder))
    return {task: found[f"{task} norm"] for task in TASKS}


if __name__ == "__main__":
    main()
