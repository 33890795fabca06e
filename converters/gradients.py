"""Gradients of the block linears over calibration samples, one norm for each weight, a block at a time.

A chunk of samples goes forward once, keeping the input of every block, and backward block by block: each is computed
again with its graph, gives the gradients of its own weights, and hands on that of its input. So memory holds the
model, the chunk's hidden states and one block's gradients; the sums lie on disk, a part of the record for each block.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .. import families
from ..errors import SourceError
from ..spec import Spec
from .calibration import Hooks, beside_hidden, first_of, hidden_of
from .pruning import refuse_not_finite
from .record import Record

CHUNK_TOKENS = 4096  # that go through the model between two writes of the sums; in whole windows, one at least
PUBLISHED_SCALE = 100.0  # what GBLM-Pruner multiplies gradients with before it sums them
SAMPLES = "samples"
Gradient = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Norm:
    """Over samples, of `scale` times a gradient. half: sums and results rounded to fp16 as in the published code."""

    p: Literal["l1", "l2"]
    scale: float
    half: bool

    def zero(self, weight: torch.Tensor) -> torch.Tensor:
        """A sum over no sample."""
        return torch.zeros_like(weight, dtype=torch.float16 if self.half and self.p == "l1" else torch.float32)

    def add(self, total: torch.Tensor, gradient: torch.Tensor) -> None:
        """One more sample, in place."""
        scaled = gradient.float() * self.scale
        total += (scaled.abs() if self.p == "l1" else scaled**2).to(total.dtype)

    def of(self, total: torch.Tensor) -> torch.Tensor:
        """The norm, from the sum."""
        norm = total if self.p == "l1" else total.sqrt()
        return norm.half() if self.half else norm


def collect(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    wanted: Mapping[int, list[str]],
    norm: Norm,
    record: Record,
    progress: bool = True,
) -> Gradient:
    """The gradient norms of the modules `wanted` (by layer) over the windows `tokens` [S, T]: path -> [N, K].

    The loss is the mean cross-entropy of the next token within a window, one backward pass for each. model: frozen,
    in evaluation mode. Sums are saved in `record` chunk by chunk; a killed run goes on. Raises SourceError where a
    loss or a gradient is not finite.
    """
    spec = families.read(model.config.to_dict())
    seen = {i: int(record.tensors(_part(i))[SAMPLES]) if record.holds(_part(i)) else 0 for i in wanted}
    windows, length = tokens.shape
    step = max(1, CHUNK_TOKENS // length)
    for start in tqdm(range(min(seen.values()), windows, step), "gradients", unit="chunk", disable=not progress):
        _chunk(model, spec, tokens, range(start, min(start + step, windows)), wanted, norm, record, seen)
    layer_of = {path: i for i, paths in wanted.items() for path in paths}

    def gradient(path: str) -> torch.Tensor:
        found = norm.of(record.tensors(_part(layer_of[path]))[path])
        refuse_not_finite(found, f"the gradients of {path}", "they overflow: choose a smaller alpha, or form=paper")
        return found.t() if spec.transposed else found

    return gradient


def _part(i: int) -> str:
    return f"gradient-{i:04d}"


@dataclass
class _Sample:
    """One window on its way back: the input of every layer, and the gradient of the loss at the last one's output."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)
    gradient: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def _chunk(
    model: PreTrainedModel,
    spec: Spec,
    tokens: torch.Tensor,
    samples: range,
    wanted: Mapping[int, list[str]],
    norm: Norm,
    record: Record,
    seen: dict[int, int],
) -> None:
    """Add these samples to the sums of every layer that has not seen them."""
    waiting = {i: range(max(samples.start, seen[i]), samples.stop) for i in wanted}
    if not any(waiting.values()):
        return
    layers = [model.get_submodule(spec.path(i, "").rstrip(".")) for i in range(len(spec.layers))]
    forward = {s: _forward(model, layers, tokens[s], s) for s in samples}
    for i in reversed(range(min(wanted), len(layers))):
        paths = wanted.get(i, []) if waiting.get(i) else []
        weights = {path: model.get_parameter(f"{path}.weight") for path in paths}
        totals = _totals(record, i, weights, norm, fresh=not seen.get(i))
        for s, sample in forward.items():
            found = _backward(layers[i], i, sample, weights)
            if s in waiting.get(i, ()):
                for path, gradient in found.items():
                    norm.add(totals[path], gradient)
        if paths:
            # The count lies with the sums, so that a kill between two files never adds a sample twice.
            record.save(_part(i), {**totals, SAMPLES: torch.tensor(samples.stop)}, {})
            seen[i] = samples.stop


def _totals(
    record: Record, i: int, weights: Mapping[str, torch.Tensor], norm: Norm, fresh: bool
) -> dict[str, torch.Tensor]:
    if fresh:
        return {path: norm.zero(weight) for path, weight in weights.items()}
    return {path: total for path, total in record.tensors(_part(i)).items() if path in weights}


def _forward(model: PreTrainedModel, layers: list[nn.Module], window: torch.Tensor, s: int) -> _Sample:
    """One window [T] to its loss; the graph begins behind the last layer."""
    sample, ends = _Sample(), list[torch.Tensor]()

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample.inputs.append(hidden_of(args, kwargs).detach())
        sample.arguments.append(beside_hidden(kwargs))

    def cut(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
        ends.append(first_of(out).detach().requires_grad_())
        return (ends[0], *out[1:]) if isinstance(out, tuple) else ends[0]

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    with contextlib.closing(Hooks(*handles, layers[-1].register_forward_hook(cut))), torch.enable_grad():
        loss = model(input_ids=window[None], labels=window[None], use_cache=False).loss
    if not torch.isfinite(loss):
        raise SourceError(f"the loss on window {s} of the calibration text is {loss.item()}; give another text or seed")
    (sample.gradient,) = torch.autograd.grad(loss, ends)
    return sample


def _backward(
    layer: nn.Module, i: int, sample: _Sample, weights: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The gradients of these weights of layer i; the sample's becomes that of the layer's input."""
    hidden = sample.inputs[i].requires_grad_()
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            out = first_of(layer(hidden, **sample.arguments[i]))
        before, *found = torch.autograd.grad(out, [hidden, *weights.values()], sample.gradient)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    sample.gradient = before
    return dict(zip(weights, found, strict=True))


# --- published gradient files --------------------------------------------------------------------


def open_published(path: Path, model: PreTrainedModel, wanted: Mapping[int, list[str]]) -> Gradient:
    """A GBLM-Pruner gradient file: `self_attn.q_proj_layer_0` and so on, [N, K] each, fp16 with PUBLISHED_SCALE in it.

    It stays on disk but for the matrix at hand. Layers go by the indices that they had before blocks were removed
    (`layer_origins`). Raises SourceError for a file that is not one, or of another model.
    """
    spec = families.read(model.config.to_dict())
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, zipfile.BadZipFile) as wrong:
        raise SourceError(f"the gradient file {path} cannot be read ({wrong})") from None
    if not isinstance(stored, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in stored.values()):
        raise SourceError(f"{path} is not a dictionary of tensors, as GBLM-Pruner's gradient files are")
    origins = getattr(model, "layer_origins", None)
    keys = {
        path: f"{path.removeprefix(spec.path(i, ''))}_layer_{origins[i] if origins else i}"
        for i, paths in wanted.items()
        for path in paths
    }
    for module, key in keys.items():
        _check(path, stored, module, key, tuple(model.get_parameter(f"{module}.weight").shape))
    last = max(origins or [len(spec.layers) - 1])
    for key in stored:
        if not (key.rpartition("_layer_")[2].isdigit() and int(key.rpartition("_layer_")[2]) <= last):
            raise SourceError(f"{path} holds {key}, and the model's last layer is {last}; it is of another model")

    def gradient(module: str) -> torch.Tensor:
        found = stored[keys[module]].abs()
        refuse_not_finite(found, f"the gradients {keys[module]} in {path}", "compute them anew: leave gradients= out")
        return found.t() if spec.transposed else found

    return gradient


def _check(path: Path, stored: Mapping[str, torch.Tensor], module: str, key: str, shape: tuple[int, ...]) -> None:
    if key not in stored:
        raise SourceError(f"{path} has no {key}, which is the gradient of {module}; it is of another model")
    if tuple(stored[key].shape) != shape or not stored[key].is_floating_point():
        found = f"{list(stored[key].shape)} {stored[key].dtype}"
        raise SourceError(
            f"{key} in {path} is {found}, the weight of {module} is {list(shape)}; it is of another model"
        )
