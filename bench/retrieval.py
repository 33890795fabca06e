"""How good text vectors are: retrieval on pairs that models_data's packages hold, and agreement with people.

BoolQ-dev: the first 1000 questions among their passages. XSum: 500 summaries among their articles. FiQA: questions
among answers, another domain. Lee: 1225 pairs of news items, rank correlation with human ratings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import data

Encode = Callable[[Sequence[str]], torch.Tensor]
TEXTS = 16  # that run at a time, of similar length
QUERIES = {"boolq": 1000, "xsum": 500, "fiqa": 648}


def scores(encode: Encode) -> dict[str, float]:
    """Every measure of one encoder. encode: texts -> vectors [B, H]."""
    found: dict[str, float] = {}
    sources = {"boolq": data.boolq_dev_pairs, "xsum": data.xsum_pairs, "fiqa": data.fiqa_pairs}
    for name, pairs in sources.items():
        found |= {f"{name} {key}": value for key, value in retrieval(encode, pairs()[: QUERIES[name]]).items()}
    texts, ratings = data.lee_similarities()
    return found | {"lee": agreement(encode(texts), torch.tensor(ratings))}


def retrieval(encode: Encode, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Recall at 1 and 10 and mean reciprocal rank (0 beyond 10) of each query's own text among all of them."""
    documents = list(dict.fromkeys(document for _, document in pairs))
    right = torch.tensor([documents.index(document) for _, document in pairs])
    return ranked(encode([query for query, _ in pairs]), encode(documents), right)


def ranked(queries: torch.Tensor, documents: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """The same from vectors [Q, H] and [D, H]; right: each query's document, i64 [Q]. Equals count as better."""
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
    normal = F.normalize(vectors.float(), dim=-1)
    first, second = torch.triu_indices(len(ratings), len(ratings), offset=1)
    ranks = torch.stack([_ranks(side[first, second]) for side in (normal @ normal.t(), ratings)])
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 on, the mean of their places for equals; fp64 like the input's shape."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]


def decoder_encode(model: Any, tokenizer: Any, embedding: Any) -> Encode:
    """A transformers decoder as an encoder, with what its folder says of embedding."""
    from tqdm import tqdm

    from ..converters.pairs import embed

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> torch.Tensor:
        tokens = embedding.tokenize(tokenizer, texts)
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i].ids))
        parts = [order[i : i + TEXTS] for i in range(0, len(order), TEXTS)]
        vectors = torch.cat([embed(model, [tokens[i] for i in part], embedding.pooling) for part in tqdm(parts)])
        return vectors[torch.tensor(order).argsort()]

    return encode


def minilm_encode(folder: Path, length: int) -> Encode:
    """all-MiniLM-L6-v2: the mean over the tokens of a text, cut at `length`."""
    from transformers import AutoModel, AutoTokenizer

    from ..embedding import pool

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> torch.Tensor:
        found = []
        for i in range(0, len(texts), TEXTS):
            part = list(texts[i : i + TEXTS])
            read = tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")
            found.append(pool(model(**read).last_hidden_state, read.attention_mask.bool(), "mean"))
        return torch.cat(found)

    return encode
