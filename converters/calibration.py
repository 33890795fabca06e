"""What a model sees of real text: token windows, and a walk through its layers that collects statistics.

The walk keeps the hidden states of all windows and runs one layer at a time, so a method holds the
statistics of the layers at hand and never those of the whole model.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import SourceError
from ..spec import Spec
from .sources.source import Source


@dataclass(frozen=True)
class Calibration:
    """A text, and the tokenizer of the model that it calibrates. name, sha256: of the text, for the provenance."""

    tokenizer: PreTrainedTokenizerBase
    text: str
    name: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def windows(self, count: int | None, length: int, seed: int) -> torch.Tensor:
        """`count` windows of `length` tokens, or all, int64 [count, length]. Raises SourceError for too little text."""
        return windows(self.tokenizer, [self.text], count, length, seed)


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer among a source's files. Raises SourceError when there is none."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in source.files.items():
            (Path(folder) / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        (Path(folder) / "config.json").write_text(json.dumps(source.config))
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as wrong:
            raise SourceError(f"{source.path} holds no tokenizer to read the calibration text with ({wrong})") from None


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int | None, length: int, seed: int
) -> torch.Tensor:
    """`count` windows of `length` tokens, int64 [count, length], drawn without replacement from the joined texts.

    Texts are joined by blank lines, cut into consecutive windows, the tail dropped; no count takes all, in an order
    drawn all the same. Raises SourceError when there is too little text.
    """
    cut = _cut(tokenizer("\n\n".join(texts), add_special_tokens=False, return_tensors="pt", verbose=False), length)
    if (available := len(cut)) < (count or 1):
        raise SourceError(
            f"the calibration text holds {available} windows of {length} tokens, {count or 1} were asked for;"
            f" give more text, or fewer or shorter windows"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return cut[order]


def row_windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int, seed: int) -> torch.Tensor:
    """Windows as SLEB's code draws them, int64 [W, length]: few, since rows and not windows are counted.

    `count` lines of `text`, shuffled with numpy as `datasets` does, are joined by blank lines, tokenised with the
    tokenizer's own special tokens and cut into consecutive windows, the tail dropped. A line keeps its newline, a
    blank one is empty: wiki.train.raw gives the rows of wikitext-2-raw-v1. Raises SourceError for too little text.
    """
    rows = [line if line.strip() else "" for line in io.StringIO(text)]
    if len(rows) < count:
        raise SourceError(f"the calibration text has {len(rows)} rows, {count} were asked for; give more text")
    drawn = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]
    cut = _cut(tokenizer("\n\n".join(drawn), return_tensors="pt", verbose=False), length)
    if not len(cut):
        raise SourceError(f"{count} rows of the calibration text fill no window of {length} tokens; draw more rows")
    return cut


def _cut(tokens: Any, length: int) -> torch.Tensor:
    """Consecutive windows [W, length] of what a tokenizer gives, the tail dropped."""
    ids = tokens.input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)


@dataclass
class _Stop(Exception):
    """Carries the first layer's arguments out of a forward pass that has no need to go on."""

    hidden: torch.Tensor


class LayerWalk:
    """A transformers decoder, run layer by layer over windows [W, T]; `hidden[b]` is the input of the next layer."""

    def __init__(self, model: PreTrainedModel, spec: Spec, tokens: torch.Tensor, batch: int = 8) -> None:
        self.model, self.spec = model, spec
        self.layers = [model.get_submodule(spec.path(i, "").rstrip(".")) for i in range(len(spec.layers))]
        self.batches = list(tokens.split(batch))
        self._arguments: dict[tuple[int, int], dict[str, Any]] = {}
        for one in {len(batch): batch for batch in self.batches}.values():
            self._catch_arguments(one)
        self.hidden = [self._first_input(batch) for batch in self.batches]
        self.at = 0  # the layer that comes next

    def run_all(self, layers: Iterable[int]) -> None:
        """Through these layers, one after the other."""
        for i in layers:
            self.run(i)

    def run(self, i: int) -> None:
        """Take the hidden states of all windows through layer i."""
        self.at = i + 1
        for b, hidden in enumerate(self.hidden):
            self.hidden[b] = self.advance(i, hidden)

    @torch.no_grad()
    def advance(self, i: int, hidden: torch.Tensor) -> torch.Tensor:
        """One batch of hidden states [B, T, H] through layer i, wherever it comes from."""
        return first_of(self.layers[i](hidden, **self._arguments[i, hidden.shape[0]]))

    @torch.no_grad()
    def _first_input(self, batch: torch.Tensor) -> torch.Tensor:
        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Stop(hidden_of(args, kwargs))

        with contextlib.closing(Hooks(self.layers[0].register_forward_pre_hook(stop, with_kwargs=True))):
            try:
                self.model(input_ids=batch, use_cache=False)
            except _Stop as caught:
                return caught.hidden
        raise RuntimeError("the first layer was never reached")

    @torch.no_grad()
    def _catch_arguments(self, batch: torch.Tensor) -> None:
        """What layers receive beside their hidden states: masks and rotary tables, alike for batches of a size."""
        handles = []
        for i, layer in enumerate(self.layers):

            def keep(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i) -> None:
                self._arguments[i, batch.shape[0]] = beside_hidden(kwargs)

            handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
        with contextlib.closing(Hooks(*handles)):
            self.model(input_ids=batch, use_cache=False)


def finish(model: PreTrainedModel, spec: Spec, hidden: torch.Tensor) -> torch.Tensor:
    """What follows the last layer ahead of the head: final norm, and the projection that some OPT have."""
    if spec.final_norm:
        hidden = model.get_submodule(spec.names.final_norm)(hidden)
    return model.get_submodule(spec.names.project_out)(hidden) if spec.projected else hidden


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a layer, [B, T, hidden]."""
    return args[0] if args else kwargs["hidden_states"]


def beside_hidden(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The other arguments of a layer, without a cache."""
    return {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "use_cache")}


def first_of(out: Any) -> torch.Tensor:
    """The hidden states that a layer returns, alone or in a tuple."""
    return out[0] if isinstance(out, tuple) else out


class Hooks:
    """Hook handles that are removed together."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def gram_of_inputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """While open, sums X^T X over all rows X [tokens, K] that reach each module: name -> fp64 [K, K].

    Products are fp32, as in the reference of Basis Sharing; sums are fp64.
    """
    with _sums_of_inputs(modules, lambda x: x.t() @ x) as grams:
        yield grams


@contextlib.contextmanager
def squares_of_inputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """While open, sums the squares of each input over all rows X [tokens, K] that reach a module: name -> fp64 [K]."""
    with _sums_of_inputs(modules, lambda x: x.double().square().sum(0)) as squares:
        yield squares


@contextlib.contextmanager
def _sums_of_inputs(
    modules: dict[str, nn.Module], of: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """While open, sums `of(X)` in fp64 over the calls of each module, X fp32 [tokens, K]."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
            found = of(args[0].detach().flatten(0, -2).float()).double()
            sums[name] = sums[name].add_(found) if name in sums else found

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    with contextlib.closing(Hooks(*handles)):
        yield sums
