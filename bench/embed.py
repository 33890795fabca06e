"""`python -m pared.bench.embed FOLDER ...`: texts a second of encoders, in turns with sentence-transformers.

The peer has the same folder, dtype and threads, and takes the texts as its `encode` does by itself, longest first in
batches of 32; and in batches of 32 as they arrive, which is what a server sees. No speed is given before the vectors
agree. Several folders, such as the depths of one model, take turns with each other too.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..kernels.dispatch import FALLBACKS, set_threads
from ..terminal import print_table
from . import record
from .end_to_end import Disagreement

BATCH = 32  # texts of the peer's batches, its default
TEXTS = 64  # of each kind
OURS, SORTED, ARRIVAL = "pared", "sentence-transformers", "in order of arrival"
SIDES = (OURS, SORTED, ARRIVAL)
COLUMNS = (
    "folder",
    "layers",
    "texts",
    *(f"{side}, tokens/s" for side in SIDES),
    "against it",
    "against arrival",
    "time",
)
BOUNDS = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.01}
"""How far vectors of length 1 may lie apart: rounding of 30 layers in either dtype."""


def workloads() -> dict[str, list[str]]:
    """Real texts by their mixture: passages alone, and passages between questions."""
    from .data import boolq_passages, boolq_questions

    passages, questions = boolq_passages("dev")[:TEXTS], boolq_questions()[:TEXTS]
    return {"passages": passages, "questions and passages": [*itertools.chain(*zip(questions, passages, strict=True))]}


def compare(folders: Sequence[Path], rounds: int = 5, dtype: str | None = None) -> dict[str, Any]:
    """Measure all sides of all folders `rounds` times in turn. Raises Disagreement, and SourceError without texts."""
    import torch

    rows = [Encoder(folder, dtype) for folder in folders]
    result: dict[str, Any] = {**record.circumstances(), "threads": torch.get_num_threads(), "batch": BATCH, "rows": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # texts are cut, on both sides
        for name, texts in workloads().items():
            apart = [row.check(texts) for row in rows]
            seconds: list[dict[str, list[float]]] = [{side: [] for side in SIDES} for _ in rows]
            for _, (row, taken), side in itertools.product(range(rounds), zip(rows, seconds, strict=True), SIDES):
                taken[side].append(row.seconds(side, texts))
            for row, taken, distance in zip(rows, seconds, apart, strict=True):
                result["rows"].append(row.facts(name, texts, taken, seconds[0][OURS]) | {"apart": distance})
    return result | {"fallbacks": {" ".join(key): count for key, count in FALLBACKS.items()}}


def title(result: dict[str, Any]) -> str:
    """What the numbers of `lines` are about."""
    return f"Encoders in {result['rows'][0]['dtype']}, {result['threads']} threads"


def lines(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows under COLUMNS; the last: time against the first folder's."""

    def ratio(quartiles: list[float]) -> str:
        return f"{quartiles[1]:.2f} ({quartiles[0]:.2f} to {quartiles[2]:.2f})"

    return [
        (
            row["folder"],
            str(row["layers"]),
            row["texts"],
            *(f"{row['tokens_per_second'][side][1]:.0f}" for side in SIDES),
            *(ratio(row["ratios"][side]) for side in (SORTED, ARRIVAL)),
            ratio(row["time_of_first"]),
        )
        for row in result["rows"]
    ]


class Encoder:
    """One folder in both engines."""

    def __init__(self, folder: Path, dtype: str | None) -> None:
        from sentence_transformers import SentenceTransformer

        from .. import hf  # noqa: F401 (compressed folders load once it is imported)
        from ..runtime.embed import Embedder

        self.name = folder.name
        self.ours = Embedder(folder, dtype)
        kind = self.ours.model.dtype
        self.dtype = str(kind).removeprefix("torch.")
        options = {"dtype": kind, "local_files_only": True}
        self.theirs = SentenceTransformer(str(folder), device=str(self.ours.model.device), model_kwargs=options)
        self.theirs.max_seq_length = self.ours.max_length
        self._encode: dict[str, Callable[[list[str]], Any]] = {
            OURS: lambda texts: self.ours.encode(texts, normalize_embeddings=True),
            SORTED: lambda texts: self.theirs.encode(texts, batch_size=BATCH, normalize_embeddings=True),
            ARRIVAL: self._as_they_arrive,
        }

    def check(self, texts: list[str]) -> float:
        """The largest difference of any number of both sides' vectors; they also warm up."""
        import numpy as np

        ours, *others = (self._encode[side](texts) for side in SIDES)
        apart = max(float(np.abs(ours - other).max()) for other in others)
        if not apart <= BOUNDS[self.dtype]:
            raise Disagreement(
                f"{self.name}: vectors are {apart:.3g} apart, {self.dtype} explains {BOUNDS[self.dtype]}"
            )
        return apart

    def seconds(self, side: str, texts: list[str]) -> float:
        """For all texts."""
        start = time.perf_counter()
        self._encode[side](texts)
        return time.perf_counter() - start

    def facts(self, name: str, texts: list[str], taken: dict[str, list[float]], first: list[float]) -> dict[str, Any]:
        """One line of the result. first: our seconds of the first folder."""
        tokens = sum(self.ours.embed(texts).tokens)
        return {
            "folder": self.name,
            "layers": len(self.ours.model.spec.layers),
            "dtype": self.dtype,
            "device": str(self.ours.model.device),
            "texts": name,
            "count": len(texts),
            "tokens": tokens,
            "tokens_per_second": {side: record.quartiles([tokens / s for s in taken[side]]) for side in SIDES},
            "ratios": {side: record.ratios(taken[OURS], taken[side]) for side in (SORTED, ARRIVAL)},
            "time_of_first": record.ratios(first, taken[OURS]),
        }

    def _as_they_arrive(self, texts: list[str]) -> Any:
        import numpy as np

        parts = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
        return np.concatenate([self._encode[SORTED](part) for part in parts])


def main() -> None:
    """Measure folders, print the table, and write the JSON beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="compact folders of encoders, the first as reference")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=list(BOUNDS), help="default: each folder's")
    options = parser.parse_args()
    set_threads()
    try:
        result = compare(options.folders, options.rounds, options.dtype)
    except SourceError as missing:
        parser.error(str(missing))
    row = result["rows"][0]
    record.write(f"embed_{'gpu' if row['device'].startswith('cuda') else 'cpu'}_{row['dtype']}", result)
    print_table(title(result), COLUMNS, lines(result))


if __name__ == "__main__":
    main()
