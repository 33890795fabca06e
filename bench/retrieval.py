"""`python -m pared.bench.retrieval FOLDER ...`: how good text vectors are, beside MiniLM's.

Retrieval on pairs that the packages of bench/data.py hold, and agreement with people.

BoolQ-dev: the first 1000 questions among their passages. XSum: 500 summaries among their articles. FiQA: questions
among answers, another domain. Lee: 1225 pairs of news items, rank correlation with human ratings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..kernels.dispatch import set_threads
from ..terminal import print_table
from . import data, record

if TYPE_CHECKING:
    import torch

Encode = Callable[[Sequence[str]], "torch.Tensor"]
QUERIES = {"boolq": 1000, "xsum": 500, "fiqa": 648}


def scores(encode: Encode) -> dict[str, float]:
    """Every measure of one encoder. encode: texts -> vectors [B, H]."""
    import torch

    found: dict[str, float] = {}
    sources = {"boolq": data.boolq_dev_pairs, "xsum": data.xsum_pairs, "fiqa": data.fiqa_pairs}
    for name, pairs in sources.items():
        found |= {f"{name} {key}": value for key, value in retrieval(encode, pairs()[: QUERIES[name]]).items()}
    texts, ratings = data.lee_similarities()
    return found | {"lee": agreement(encode(texts), torch.tensor(ratings))}


def retrieval(encode: Encode, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Recall at 1 and 10 and mean reciprocal rank (0 beyond 10) of each query's own text among all of them."""
    import torch

    documents = list(dict.fromkeys(document for _, document in pairs))
    right = torch.tensor([documents.index(document) for _, document in pairs])
    return ranked(encode([query for query, _ in pairs]), encode(documents), right)


def ranked(queries: torch.Tensor, documents: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """The same from vectors [Q, H] and [D, H]; right: each query's document, i64 [Q]. Equals count as better."""
    import torch
    import torch.nn.functional as F

    similar = F.normalize(queries.float(), dim=-1) @ F.normalize(documents.float(), dim=-1).t()
    own = similar.gather(1, right[:, None])
    place = (similar >= own).sum(1)
    reciprocal = torch.where(place <= 10, 1 / place, 0.0)
    return {
        "R@1": (place == 1).float().mean().item(),
        "R@10": (place <= 10).float().mean().item(),
        "MRR@10": reciprocal.mean().item(),
    }


def agreement(vectors: torch.Tensor, ratings: torch.Tensor) -> float:
    """Spearman's rank correlation of cosines with ratings [B, B], over the pairs of different texts."""
    import torch
    import torch.nn.functional as F

    normal = F.normalize(vectors.float(), dim=-1)
    first, second = torch.triu_indices(len(ratings), len(ratings), offset=1)
    ranks = torch.stack([_ranks(side[first, second]) for side in (normal @ normal.t(), ratings)])
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 on, the mean of their places for equals; fp64 like the input's shape."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]


def pared_encode(folder: Path, length: int | None = None) -> Encode:
    """A compact folder through pared.Embedder; length: of a text in tokens, default is the folder's."""
    from ..runtime.embed import Embedder

    return _quietly(Embedder(folder, max_length=length))


def sentence_encode(folder: Path, length: int | None = None) -> Encode:
    """Any folder through sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    from .. import hf  # noqa: F401 (compressed folders load once it is imported)

    model = SentenceTransformer(str(folder))
    model.max_seq_length = length or model.max_seq_length
    return _quietly(model)


def _quietly(encoder: Any) -> Encode:
    def encode(texts: Sequence[str]) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the protocol cuts texts
            return encoder.encode(list(texts), convert_to_tensor=True, show_progress_bar=sys.stderr.isatty()).float()

    return encode


def main() -> None:
    """Score folders, and MiniLM where its package is installed; print the table."""
    set_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="compact folders of encoders")
    parser.add_argument("--length", type=int, help="tokens of a text at most; default: each folder's own")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    found = {folder.name: scores(pared_encode(folder, options.length)) for folder in options.folders}
    with contextlib.suppress(SourceError):
        found[data.ENCODER_PACKAGE] = scores(sentence_encode(data.minilm_path(), options.length))
    columns = list(next(iter(found.values())))
    print_table(
        "Retrieval", ("encoder", *columns), [(n, *(f"{row[c]:.3f}" for c in columns)) for n, row in found.items()]
    )
    if options.out:
        options.out.write_text(json.dumps({**record.circumstances(), "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
