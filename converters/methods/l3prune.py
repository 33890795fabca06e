"""L3Prune (arXiv 2410.14578): the lower layers of a decoder and its final norm are a text encoder.

How many: a number, a share, or what the loss of the untrained model at every depth says. `large` is the depth with
the smallest contrastive loss in the upper half of the model, `small` that in the lower half. Attention stays causal.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ... import families
from ...embedding import Embedding, Pooling, Template, Tokens, pool
from ...errors import BadParameter
from ...spec import Spec
from ..calibration import Calibration, finish
from ..depth import shorten_model
from ..pairs import Batch, Pairs, contrastive_loss, padded, read_pairs, tokenize
from ..record import Record

NAME = "l3prune"
_TEXTS = 16  # that run at a time


@dataclass(frozen=True)
class Params:
    """Give one of keep, percent and choose. keep: so many layers. percent: of the layers to drop.

    choose: by the loss over `batches` batches of `batch` pairs from the JSONL file `pairs` (see converters/pairs.py).
    pooling, template, max_length: of the encoder, see embedding.py. scale: of the cosines in the loss.
    """

    keep: int | None = None
    percent: float | None = None
    choose: Literal["large", "small"] | None = None
    pairs: str | None = None
    pooling: Pooling = "weighted_mean"
    template: Template = "none"
    max_length: int = 512
    batch: int = 64
    batches: int = 100
    scale: float = 50.0
    seed: int = 0

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "keep": (1, 4096),
        "percent": (0, 99.999999),
        "max_length": (1, 1 << 20),
        "batch": (2, 1 << 16),
        "batches": (1, 1 << 20),
        "scale": (1e-3, 1e4),
        "seed": (0, 2**63 - 1),
    }

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.keep, self.percent, self.choose)) != 1:
            raise BadParameter("l3prune takes one of keep=25, percent=30 and choose=large")
        if (self.choose is None) != (self.pairs is None):
            raise BadParameter("l3prune: choose reads pairs=FILE, keep and percent read none")

    @property
    def reads(self) -> str:
        """Only a choice by loss tokenises anything."""
        return "tokens" if self.choose else "nothing"

    @property
    def files(self) -> tuple[Path, ...]:
        """The pairs."""
        return () if self.pairs is None else (Path(self.pairs),)

    @property
    def embedding(self) -> Embedding:
        return Embedding(self.pooling, self.template, self.max_length)


def search(
    model: PreTrainedModel, calibration: Calibration | None, record: Record, params: Params, progress: bool = True
) -> None:
    """Fill `record` with the number of layers to keep, and where it is chosen with the loss at every depth.

    model: frozen, stays whole. Raises BadParameter for a depth that it has not, SourceError for pairs that are none.
    """
    spec = families.read(model.config.to_dict())
    facts: dict[str, Any] = {"embedding": asdict(params.embedding), "layers": len(spec.layers)}
    if params.choose is None:
        record.save("plan", {}, facts | {"keep": _counted(params, len(spec.layers))})
        return
    if calibration is None or params.pairs is None:
        raise BadParameter("l3prune: choose reads pairs=FILE with the model's tokenizer")
    pairs = read_pairs(params.pairs)
    curve = depth_losses(model, spec, calibration, pairs, record, params, progress)
    small, large = depths(curve)
    chosen = {"small": small, "large": large}
    record.save("plan", {}, facts | {"keep": chosen[params.choose], "loss": curve, **chosen, "pairs": pairs.sha256})


def apply(model: PreTrainedModel, record: Record) -> None:
    """Shorten the model and drop its head: an encoder has none, so its config ties it and nothing is stored for it.

    `model.embedding` says how texts are embedded.
    """
    facts = record.facts("plan")
    spec = families.read(model.config.to_dict())
    shorten_model(model, spec, range(facts["keep"]))
    model.get_submodule(spec.names.head).weight = model.get_parameter(f"{spec.names.embed}.weight")
    model.config.tie_word_embeddings = True
    model.config.architectures = [type(model.base_model).__name__]
    model.embedding = Embedding(**facts["embedding"])


def summary(record: Record) -> dict[str, Any]:
    """What was kept, of how many layers, and the loss by depth where it was looked at."""
    return record.facts("plan")


def depths(curve: Sequence[float]) -> tuple[int, int]:
    """The small and the large number of layers to keep, by the loss at depths 1 to N; the first of equals."""
    middle = len(curve) // 2
    if not middle:
        raise BadParameter("a model of one layer has no two halves to choose from; give keep=1")
    small = min(range(middle), key=curve.__getitem__)
    large = min(range(middle, len(curve)), key=curve.__getitem__)
    return small + 1, large + 1


def _counted(params: Params, layers: int) -> int:
    """The layers that keep or percent leaves."""
    keep = params.keep or math.floor(layers * (100 - (params.percent or 0)) / 100)
    if not 1 <= keep <= layers:
        asked = f"keep={params.keep}" if params.keep else f"percent={params.percent:g}"
        raise BadParameter(f"l3prune: {asked} leaves {keep} of {layers} layers; keep 1 to {layers}")
    return keep


def depth_losses(
    model: PreTrainedModel,
    spec: Spec,
    calibration: Calibration,
    pairs: Pairs,
    record: Record,
    params: Params,
    progress: bool,
) -> list[float]:
    """The contrastive loss at depths 1 to N, averaged over batches; each batch is saved when it is done."""
    found = []
    drawn = pairs.draw(params.batch, params.batches, params.seed)
    for i, batch in enumerate(tqdm(drawn, "depths", unit="batch", disable=not progress)):
        part = f"batch-{i:04d}-{pairs.sha256[:12]}"
        if not record.holds(part):
            tokens = tokenize(batch, calibration.tokenizer, params.embedding, params.seed + i)
            record.save(part, {}, {"losses": _batch_losses(model, spec, tokens, params)})
        found.append(record.facts(part)["losses"])
    return [sum(losses) / len(losses) for losses in zip(*found, strict=True)]


def _batch_losses(model: PreTrainedModel, spec: Spec, batch: Batch, params: Params) -> list[float]:
    """Of one batch, at every depth."""
    sides = [vectors_at_all_depths(model, spec, texts, params.pooling) for texts in (batch.queries, batch.candidates)]
    return [
        contrastive_loss(queries, candidates, params.scale).item() for queries, candidates in zip(*sides, strict=True)
    ]


@torch.no_grad()
def vectors_at_all_depths(
    model: PreTrainedModel, spec: Spec, texts: Sequence[Tokens], pooling: str
) -> list[torch.Tensor]:
    """Vectors [B, H] of texts for each number of layers: every layer's output through the final norm, pooled."""
    parts: list[list[torch.Tensor]] = []
    for start in range(0, len(texts), _TEXTS):
        ids, attention, counted = padded(texts[start : start + _TEXTS], model.device)
        with _outputs(model, spec) as outputs:
            model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
        parts.append([pool(finish(model, spec, hidden), counted, pooling) for hidden in outputs])
    return [torch.cat(vectors) for vectors in zip(*parts, strict=True)]


@contextlib.contextmanager
def _outputs(model: PreTrainedModel, spec: Spec) -> Iterator[list[torch.Tensor]]:
    """While open, collects what each layer gives, in order."""
    found: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    layers = (model.get_submodule(spec.path(i, "").rstrip(".")) for i in range(len(spec.layers)))
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
