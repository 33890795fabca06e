"""`python -m pared.bench.embedder`: SmolLM2-135M as a text encoder, whole and at L3Prune's two depths.

Chooses the depths, trains each encoder on BoolQ pairs, packs it, and scores it before and after beside MiniLM. Every
row, every 25 training steps and every batch of the choice are kept, so that a stopped run goes on. On two cores about
an hour and a half; `--rows` picks some.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..kernels.dispatch import set_threads
from ..terminal import print_table
from . import data, quality, record, retrieval
from .tables import Table

WORK = quality.ROOT / ".data" / "embedder"
RESULTS = record.RESULTS / "embedder_l3prune"
TRAINING_LENGTH, LENGTH = 64, 256  # tokens of a text
BATCH, STEPS = 32, 249  # one pass over the 7993 pairs
CHOICE_BATCHES = 16
BY_DEPTH = 400  # questions of which retrieval is measured at every depth
PROTOCOL = (
    "SmolLM2-135M-Instruct dequantised from a Q4_1 GGUF file, causal attention, position-weighted mean pooling, no "
    f"instruction. Depths by the loss of the untrained model over {CHOICE_BATCHES} batches of 64 of the 7993 BoolQ "
    f"train pairs. Training: LoRA r 16 on all linears, {STEPS} steps of {BATCH} pairs, texts cut at {TRAINING_LENGTH} "
    "tokens, cosines times 20, learning rate 5e-4, seed 42. Scores in bf16 (MiniLM fp32), texts cut at "
    f"{LENGTH} tokens: BoolQ-dev, 1000 questions among their passages; XSum, 500 summaries among their articles; FiQA, "
    "648 questions among answers; Lee, Spearman over 1225 pairs of news items. No text of BoolQ-dev was trained on."
)
COLUMNS = ("encoder", "layers", "BoolQ R@1", "R@10", "MRR@10", "XSum R@1", "FiQA R@1", "Lee")
SCORES = ("boolq R@1", "boolq R@10", "boolq MRR@10", "xsum R@1", "fiqa R@1", "lee")
MINILM, CURVE = "MiniLM", "curve"
DEPTHS = ("small", "large", "full")
ROWS = (MINILM, *(f"{depth}-{when}" for depth in DEPTHS for when in ("before", "after")))


def main() -> None:
    """Measure what is missing, then print and write the table."""
    set_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help=f"some of {', '.join(ROWS)}, separated by commas")
    asked = parser.parse_args().rows
    wanted = list(ROWS) if asked is None else asked.split(",")
    if unknown := [name for name in wanted if name not in ROWS]:
        sys.exit(f"--rows: no row is called {unknown[0]!r}; known are {', '.join(ROWS)}")
    table = Table(RESULTS, "SmolLM2-135M-Instruct as a text encoder", PROTOCOL, COLUMNS, lines)
    results = table.load()
    if CURVE not in results["rows"]:
        table.save(results, CURVE, by_depth())
    for name in wanted:
        if name not in results["rows"]:
            table.save(results, name, measured(name, results["rows"][CURVE]))
    print_table("SmolLM2-135M-Instruct, L3Prune", COLUMNS, lines(results))
    print(PROTOCOL)


def lines(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows that are there, under COLUMNS."""
    rows = results["rows"]
    return [
        (name, str(rows[name]["layers"]), *(f"{rows[name][score]:.3f}" for score in SCORES))
        for name in ROWS
        if name in rows
    ]


def pairs_file() -> Path:
    """The training pairs as JSONL."""
    path = WORK / "boolq.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"query": question, "positive": passage}) for question, passage in data.boolq_pairs()]
        path.write_text("\n".join(rows), encoding="utf-8")
    return path


def by_depth() -> dict[str, Any]:
    """Of the untrained model: the loss at every depth, the depths that follow, and how well each retrieves."""
    import torch

    from .. import families
    from ..converters import recipe
    from ..converters.methods import l3prune
    from ..converters.record import Record

    recipe_text = f"l3prune:choose=large,pairs={pairs_file()},batches={CHOICE_BATCHES},max_length={TRAINING_LENGTH}"
    (step,) = recipe.parse([recipe_text])
    model, found = quality.fresh(), Record(WORK / f"choice-{TRAINING_LENGTH}")
    l3prune.search(model, quality.calibration(), found, step.params)
    facts = l3prune.summary(found)
    spec, some = families.read(model.config.to_dict()), data.boolq_dev_pairs()[:BY_DEPTH]
    documents = list(dict.fromkeys(document for _, document in some))
    right = torch.tensor([documents.index(document) for _, document in some])
    sides = []
    for texts in ([query for query, _ in some], documents):
        tokens = step.params.embedding.tokenize(quality.calibration().tokenizer, texts)
        sides.append(l3prune.vectors_at_all_depths(model, spec, tokens, step.params.pooling))
    pairs = zip(*sides, strict=True)
    retrieved = [retrieval.ranked(queries, answers, right)["R@10"] for queries, answers in pairs]
    return {"loss": facts["loss"], "R@10": retrieved, "small": facts["small"], "large": facts["large"]}


def measured(name: str, curve: dict[str, Any]) -> dict[str, Any]:
    """The scores of a row; its folder is made where it is not there."""
    if name == MINILM:
        return {"layers": 6, **retrieval.scores(retrieval.sentence_encode(data.minilm_path(), LENGTH))}
    depth, _, when = name.partition("-")
    layers = curve[depth] if depth in curve else len(curve["loss"])
    path = folder(layers, trained=when == "after")
    return {"layers": layers, **retrieval.scores(retrieval.pared_encode(path, LENGTH))}


def folder(layers: int, trained: bool) -> Path:
    """A compact folder in bf16 of an encoder, trained or not; a stopped training goes on."""
    from .. import convert

    path = WORK / f"{layers}-layers{'-trained' if trained else ''}"
    methods = [f"l3prune:keep={layers}"]
    if trained:
        methods.append(
            f"contrastive:pairs={pairs_file()},steps={STEPS},batch={BATCH},warm_up={STEPS // 10},scale=20,lr=5e-4,"
            f"max_length={TRAINING_LENGTH}"
        )
    if not path.exists():
        convert(data.gguf_path(), path, methods=methods, dtype="bfloat16")
    return path


if __name__ == "__main__":
    main()
