"""Training pairs of an encoder: questions, what answers them, and what only seems to; read, drawn and embedded."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..embedding import Embedding, Tokens, pool
from ..errors import SourceError


@dataclass(frozen=True)
class Pair:
    """A query, the text that belongs to it, and hard negatives. dataset: batches hold one dataset's pairs."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    instruction: str = ""
    dataset: str = ""


@dataclass(frozen=True)
class Pairs:
    """Training pairs with the digest of the file that they are from, for the provenance."""

    rows: tuple[Pair, ...]
    sha256: str

    def draw(self, size: int, batches: int, seed: int) -> list[list[Pair]]:
        """So many batches, or as many as there are pairs for, drawn without replacement. Raises SourceError."""
        if len(self.rows) < size:
            raise SourceError(f"there are {len(self.rows)} pairs, a batch has {size}; give more, or a smaller batch")
        count = min(batches, len(self.rows) // size) * size
        drawn = random.Random(seed).sample(self.rows, count)
        return [drawn[i : i + size] for i in range(0, count, size)]

    def batches(self, size: int, seed: int) -> Iterator[list[Pair]]:
        """Epoch after epoch, shuffled; a batch comes from one dataset, and those that are not full are dropped."""
        generator = random.Random(seed)
        by_dataset: dict[str, list[Pair]] = {}
        for row in self.rows:
            by_dataset.setdefault(row.dataset, []).append(row)
        if all(len(rows) < size for rows in by_dataset.values()):
            raise SourceError(f"no dataset of the pairs has {size} of them, a batch; give more, or a smaller batch")
        while True:
            epoch = []
            for rows in by_dataset.values():
                drawn = generator.sample(rows, len(rows))
                epoch += [drawn[i : i + size] for i in range(0, len(rows) - size + 1, size)]
            generator.shuffle(epoch)
            yield from epoch


def read_pairs(path: str | Path) -> Pairs:
    """A JSONL file of {"query", "positive", "negatives"?: [...], "instruction"?, "dataset"?}.

    What lies in the Hugging Face library `datasets` comes to this form by its `to_json`.
    Raises SourceError naming the line that is not of this form or has an empty text.
    """
    try:
        content = Path(path).read_bytes()
        lines = content.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as wrong:
        raise SourceError(f"the pairs {path} cannot be read as UTF-8 text ({wrong})") from None
    rows = [_pair(line, f"line {i} of {path}") for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise SourceError(f"{path} holds no pairs; a line is a JSON object with query and positive")
    return Pairs(tuple(rows), hashlib.sha256(content).hexdigest())


def _pair(line: str, where: str) -> Pair:
    try:
        row = json.loads(line)
    except ValueError as wrong:
        raise SourceError(f"{where} is no JSON ({wrong})") from None
    if not isinstance(row, Mapping):
        raise SourceError(f"{where} is JSON but not an object with query and positive")
    texts = {key: row.get(key, "") for key in ("query", "positive", "instruction", "dataset")}
    negatives = row.get("negatives", [])
    if not isinstance(negatives, list) or not all(isinstance(t, str) for t in (*texts.values(), *negatives)):
        raise SourceError(f"{where} has something else than texts, and negatives as a list of them")
    for what, text in (
        ("query", texts["query"]),
        ("positive", texts["positive"]),
        *(("negatives", t) for t in negatives),
    ):
        if not text.strip():
            raise SourceError(f"{where} has an empty {what}; leave such pairs out")
    return Pair(negatives=tuple(negatives), **texts)


@dataclass(frozen=True)
class Batch:
    """Tokens of queries and of candidates: candidate i belongs to query i, those beyond are hard negatives."""

    queries: list[Tokens]
    candidates: list[Tokens]


def tokenize(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, embedding: Embedding, seed: int) -> Batch:
    """A batch with one hard negative of each pair that has any. Queries carry the instruction, candidates do not."""
    generator = random.Random(seed)
    negatives = [generator.choice(pair.negatives) for pair in pairs if pair.negatives]
    queries: list[Tokens] = []
    for pair in pairs:
        prompt = f"{pair.instruction}; " if pair.instruction else ""
        queries += embedding.tokenize(tokenizer, [pair.query], prompt)
    return Batch(queries, embedding.tokenize(tokenizer, [pair.positive for pair in pairs] + negatives))


def padded(tokens: Sequence[Tokens], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and what pooling counts, each [B, T]; padded behind, where a causal model never looks."""
    longest = max(len(one.ids) for one in tokens)
    ids, attention, counted = (torch.zeros(len(tokens), longest, dtype=torch.int64) for _ in range(3))
    for i, (row, start, _) in enumerate(tokens):
        ids[i, : len(row)] = torch.tensor(row)
        attention[i, : len(row)] = 1
        counted[i, start : len(row)] = 1
    return ids.to(device), attention.to(device), counted.bool().to(device)


def embed(model: PreTrainedModel, tokens: Sequence[Tokens], pooling: str) -> torch.Tensor:
    """Vectors [B, H] of a transformers decoder, fp32."""
    ids, attention, counted = padded(tokens, model.device)
    hidden = model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    return pool(hidden, counted, pooling)


def contrastive_loss(queries: torch.Tensor, candidates: torch.Tensor, scale: float) -> torch.Tensor:
    """InfoNCE: mean cross-entropy of scale * cos(query i, candidate j) [B, C], where candidate i is the right one."""
    similar = F.normalize(queries.float(), dim=-1) @ F.normalize(candidates.float(), dim=-1).t()
    return F.cross_entropy(scale * similar, torch.arange(len(queries), device=similar.device))
