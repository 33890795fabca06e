"""Supervised contrastive training of the encoder that `l3prune` leaves: LoRA on its linears, merged back.

The recipe of L3Prune (arXiv 2410.14578): queries against their own answers, all others of the batch, and one hard
negative each, where a pair has any. Paper: 1000 steps of 64 pairs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ... import families
from ...embedding import Embedding
from ...errors import BadParameter
from ..calibration import Calibration
from ..pairs import contrastive_loss, embed, read_pairs, tokenize
from ..record import Record
from ..training import adapters, fast_products, tenths, train

NAME = "contrastive"


@dataclass(frozen=True)
class Params:
    """pairs: a JSONL file, see converters/pairs.py. r, alpha, dropout: of LoRA. lr: peak, after `warm_up` steps.

    scale: of the cosines. max_length: of training texts in tokens; default is the encoder's own.
    """

    pairs: str
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    lr: float = 2e-4
    steps: int = 1000
    warm_up: int = 300
    batch: int = 64
    scale: float = 50.0
    max_length: int | None = None
    seed: int = 42

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "r": (1, 4096),
        "alpha": (1e-3, 1e4),
        "dropout": (0, 0.9),
        "lr": (1e-8, 1),
        "steps": (1, 1 << 30),
        "warm_up": (0, 1 << 30),
        "batch": (2, 1 << 16),
        "scale": (1e-3, 1e4),
        "max_length": (1, 1 << 20),
        "seed": (0, 2**31 - 1),
    }

    @property
    def reads(self) -> str:
        """Pairs, tokenised; no text."""
        return "tokens"

    @property
    def files(self) -> tuple[Path, ...]:
        """The pairs."""
        return (Path(self.pairs),)


def search(
    model: PreTrainedModel, calibration: Calibration | None, record: Record, params: Params, progress: bool = True
) -> None:
    """Train, and fill `record` with what the adapters add to each weight, as factors. The model is left as it was.

    A killed run goes on from its last saved step. Raises BadParameter for a model that is no encoder or has compressed
    layers, SourceError for pairs that are none.
    """
    if record.holds("trained"):
        return
    embedding = _embedding(model, params)
    if calibration is None:
        raise BadParameter("contrastive reads pairs with the model's tokenizer")
    spec = families.read(model.config.to_dict())
    names = [
        path for path in spec.linears() if path not in (spec.names.head, spec.names.project_in, spec.names.project_out)
    ]
    if closed := [name for name in names if not hasattr(model.get_submodule(name), "weight")]:
        raise BadParameter(f"{closed[0]} is compressed already; give --method contrastive before the one that did it")
    pairs = read_pairs(params.pairs)
    batches = list(itertools.islice(pairs.batches(params.batch, params.seed), params.steps))

    def loss(step: int) -> torch.Tensor:
        torch.manual_seed(params.seed + step)  # dropout is the same after a resumption
        tokens = tokenize(batches[step], calibration.tokenizer, embedding, params.seed + step)
        with fast_products(model):
            vectors = [embed(model, texts, embedding.pooling) for texts in (tokens.queries, tokens.candidates)]
        return contrastive_loss(vectors[0], vectors[1], params.scale)

    with (
        torch.random.fork_rng(devices=[]),
        adapters(model, names, params.r, params.alpha, params.dropout, params.seed, spec.transposed) as trained,
    ):
        losses, complaint = train(model, params.steps, loss, record, params.lr, params.warm_up, progress, NAME)
        factors = {f"{name}.{side}": t for name in names for side, t in zip("AB", trained(name), strict=True)}
    facts = {"loss": losses, "stopped": complaint, "scale": params.alpha / params.r, "pairs": pairs.sha256}
    record.save("trained", factors, facts)


def apply(model: PreTrainedModel, record: Record) -> None:
    """Merge: W + (alpha / r) B A."""
    transposed = families.read(model.config.to_dict()).transposed
    tensors, scale = record.tensors("trained"), record.facts("trained")["scale"]
    for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        delta = scale * tensors[f"{name}.B"] @ tensors[f"{name}.A"]
        weight = model.get_parameter(f"{name}.weight")
        weight.data += (delta.t() if transposed else delta).to(weight.dtype)


def summary(record: Record) -> dict[str, Any]:
    """The training loss over the first and the last tenth of the steps, and why it ended early, if so."""
    facts = record.facts("trained")
    losses = facts["loss"]
    return {"steps": len(losses), "loss": tenths(losses), "stopped": facts["stopped"], "pairs": facts["pairs"]}


def _embedding(model: PreTrainedModel, params: Params) -> Embedding:
    """How the encoder embeds, with the training's own length."""
    found: Embedding | None = getattr(model, "embedding", None)
    if found is None:
        raise BadParameter("contrastive trains an encoder and this model is none; give --method l3prune:... first")
    lengths = [length for length in (params.max_length, found.max_length) if length]
    return replace(found, max_length=min(lengths, default=None))
