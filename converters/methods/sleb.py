"""SLEB (arXiv 2402.09025): remove whole decoder blocks, one after the other, each time the one that is missed least.

After a removal every remaining block is tried anew, since what is redundant depends on what is left. The order is
greedy: the list for a smaller number is the beginning of the list for a larger one.

`search` walks each window up through the blocks that are left and at every block runs on without it, so that the
blocks below a candidate are never computed twice: about half of what trying each candidate on its own takes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from ... import families
from ...errors import BadParameter
from ...spec import Spec
from ..calibration import Calibration, LayerWalk, finish, row_windows
from ..depth import shorten_model
from ..record import Record

NAME = "sleb"
_ROWS = 256  # of logits whose cross-entropy is taken at a time
_LINE = re.compile(r"Block Removal Order:\s*(\[[^\]]*\])")


@dataclass(frozen=True)
class Params:
    """Give one of blocks, percent and remove. blocks, percent: how many to remove, a percentage rounded up.

    remove: a list found earlier, `5,4,9` or a file with it, as JSON or as SLEB's code logs it; then nothing is read.
    samples x length: calibration tokens, in `windows`, or with draw=rows as SLEB's code: that many lines of text.
    early, latter: so many of the first and of the last remaining blocks are never tried.
    """

    blocks: int | None = None
    percent: float | None = None
    remove: str | None = None
    samples: int = 16
    length: int = 2048
    draw: Literal["windows", "rows"] = "windows"
    seed: int = 0
    early: int = 1
    latter: int = 1

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "blocks": (1, 4096),
        "percent": (1e-6, 99.999999),
        "samples": (1, 1 << 20),
        "length": (2, 1 << 20),
        "seed": (0, 2**63 - 1),
        "early": (0, 4096),
        "latter": (0, 4096),
    }

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.blocks, self.percent, self.remove)) != 1:
            raise BadParameter("sleb takes one of blocks=6, percent=20 and remove=5,4,9")

    @property
    def reads(self) -> str:
        """Nothing where the list is given."""
        return "text" if self.remove is None else "nothing"

    @property
    def files(self) -> tuple[Path, ...]:
        """The list, where it lies in a file."""
        return () if self.remove is None or _is_list(self.remove) else (Path(self.remove),)

    def count(self, layers: int) -> int:
        """How many blocks to remove of so many. Raises BadParameter."""
        count = self.blocks if self.blocks is not None else math.ceil(layers * (self.percent or 0) / 100)
        if count > layers - max(1, self.early + self.latter):
            raise BadParameter(
                f"sleb cannot remove {count} of {layers} blocks while it keeps the first {self.early} and the last "
                f"{self.latter}; ask for fewer"
            )
        return count


def search(
    model: PreTrainedModel, calibration: Calibration | None, record: Record, params: Params, progress: bool = True
) -> None:
    """Fill `record` with the order of removal, a part for each block; what it holds already is kept.

    model: frozen, in the dtype to compute in; stays whole. Raises BadParameter for blocks that it has not, SourceError
    for too little text.
    """
    spec = families.read(model.config.to_dict())
    layers = len(spec.layers)
    if params.remove is not None:
        record.save("plan", {}, {"order": removal_list(params.remove, layers), "loss": []})
        return
    count = params.count(layers)
    parts = [f"removal-{i:03d}" for i in range(count)]
    if not all(record.holds(part) for part in parts):
        _remove_greedily(model, spec, _tokens(calibration, params), parts, record, params, progress)
    found = [record.facts(part) for part in parts]
    record.save("plan", {}, {"order": [f["removed"] for f in found], "loss": [f["loss"] for f in found]})


def apply(model: PreTrainedModel, record: Record) -> None:
    """Shorten the model, its config with it. `model.layer_origins` says which layers are left."""
    spec = families.read(model.config.to_dict())
    removed = set(record.facts("plan")["order"])
    shorten_model(model, spec, [i for i in range(len(spec.layers)) if i not in removed])


def summary(record: Record) -> dict[str, Any]:
    """The blocks in the order of their removal, and the mean cross-entropy in nats after each, where it was searched.

    The paper's metric is this loss times the number of calibration tokens.
    """
    return record.facts("plan")


def removal_list(text: str, layers: int) -> list[int]:
    """The removal list that `text` is, or that lies in the file it names: JSON, numbers, or the log of SLEB's code.

    Raises BadParameter for anything else, for repeats, and for blocks that a model of so many layers has not.
    """
    content = text
    if not _is_list(text):
        try:
            content = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as wrong:
            raise BadParameter(f"remove={text} is neither a list such as 5,4,9 nor a file with one ({wrong})") from None
    logged = _LINE.findall(content)
    listed = (logged[-1] if logged else content).strip()
    try:
        order = json.loads(listed if listed.startswith("[") else f"[{listed}]")
    except ValueError:
        order = None
    if not isinstance(order, list) or not order or not all(type(i) is int for i in order):
        raise BadParameter(f"remove={text} holds no list of block numbers such as 5,4,9")
    for i in order:
        if not 0 <= i < layers:
            raise BadParameter(f"remove={text} names block {i}, the model has blocks 0 to {layers - 1}")
    if twice := sorted(i for i in set(order) if order.count(i) > 1):
        raise BadParameter(f"remove={text} names block {twice[0]} more than once; each can be removed once")
    if len(order) == layers:
        raise BadParameter(f"remove={text} names all {layers} blocks; leave one at least")
    return order


def _is_list(text: str) -> bool:
    """Whether a removal list is given in words, not in a file."""
    return re.fullmatch(r"[\s\[\],\d]*", text) is not None


def _tokens(calibration: Calibration | None, params: Params) -> torch.Tensor:
    """The calibration windows [W, T]."""
    if calibration is None:
        raise BadParameter("sleb searches on a text; give --calibration FILE, or remove= with a known list")
    if params.draw == "rows":
        return row_windows(calibration.tokenizer, calibration.text, params.samples, params.length, params.seed)
    return calibration.windows(params.samples, params.length, params.seed)


def _remove_greedily(
    model: PreTrainedModel,
    spec: Spec,
    tokens: torch.Tensor,
    parts: Sequence[str],
    record: Record,
    params: Params,
    progress: bool,
) -> None:
    """Choose a block for each part and save it."""
    walk = LayerWalk(model, spec, tokens, batch=1)
    alive = list(range(len(spec.layers)))
    for part in parts:
        if not record.holds(part):
            losses = _losses(walk, alive, params, f"{part} of {len(parts)}", progress)
            best = min(losses, key=losses.__getitem__)  # the first of equals, as in the paper's code
            record.save(part, {}, {"removed": best, "loss": losses[best], "losses": losses})
        alive.remove(record.facts(part)["removed"])


@torch.no_grad()
def _losses(walk: LayerWalk, alive: Sequence[int], params: Params, title: str, progress: bool) -> dict[int, float]:
    """Candidate -> mean cross-entropy over all windows without it, in the order of the model."""
    sums = dict.fromkeys(alive[params.early : len(alive) - params.latter], 0.0)
    for tokens, hidden in zip(tqdm(walk.batches, title, unit="window", disable=not progress), walk.hidden, strict=True):
        for position, block in enumerate(alive[: len(alive) - params.latter]):
            if block in sums:
                last = hidden
                for above in alive[position + 1 :]:
                    last = walk.advance(above, last)
                sums[block] += _cross_entropy(walk, last, tokens)
            hidden = walk.advance(block, hidden)
    return {block: total / len(walk.batches) for block, total in sums.items()}


def _cross_entropy(walk: LayerWalk, hidden: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean over the predictions of one window: row i of the last hidden states [1, T, H] predicts token i + 1."""
    rows = finish(walk.model, walk.spec, hidden)[0, :-1].split(_ROWS)
    head, targets = walk.model.get_submodule(walk.spec.names.head), tokens[0, 1:].split(_ROWS)
    total = sum(F.cross_entropy(head(r).float(), t, reduction="sum").item() for r, t in zip(rows, targets, strict=True))
    return total / (tokens.shape[1] - 1)
