"""LoRA adapters as PEFT saves them, merged into the checkpoint that they name: W + (alpha / r) B A.

adapter_config.json                                       base_model_name_or_path: a folder, r, lora_alpha
adapter_model.safetensors or adapter_model.bin            base_model.model.<path>.lora_A.weight [r, K], lora_B [N, r]
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ... import families
from ...errors import SourceError
from . import huggingface
from .source import Skip, Source

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")
_REFUSED = ("use_dora", "alpha_pattern", "rank_pattern", "modules_to_save", "layer_replication")

Deltas = dict[str, dict[str, torch.Tensor]]


def is_adapter(path: Path) -> bool:
    """True for a folder that holds an adapter and no model."""
    return (path / CONFIG).is_file() and not (path / huggingface.CONFIG).is_file()


def open_source(path: Path) -> Source:
    """The base checkpoint with the adapter merged into it. Raises SourceError for what it cannot merge exactly."""
    config = huggingface.read_json(path / CONFIG)
    base = huggingface.open_source(_base(path, config))
    scale, deltas = _scale(path, config), _named(_deltas(path), base)
    if unknown := sorted({f"{module}.weight" for module in deltas} - set(base.names())):
        raise SourceError(f"{path} adapts {unknown[0]}, which its base {base.path} does not hold")
    flip = bool(config.get("fan_in_fan_out"))

    def tensors(skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in base.tensors(skip):
            factors = deltas.get(name.removesuffix(".weight"))
            yield name, tensor if factors is None else _merged(name, tensor, factors, scale, flip)

    stats = [(name, (path / name).stat()) for name in (CONFIG, *WEIGHTS) if (path / name).is_file()]
    marks = repr([base.fingerprint, *((name, s.st_size, s.st_mtime_ns) for name, s in stats)])
    return replace(base, path=path, tensors=tensors, fingerprint=hashlib.sha256(marks.encode()).hexdigest())


def _base(path: Path, config: dict[str, Any]) -> Path:
    named = config.get("base_model_name_or_path")
    base = path / str(named)  # an absolute path stays what it is
    if not named or not base.is_dir():
        raise SourceError(
            f"{path} is an adapter on {named!r}, which is no folder here; download its base model and write "
            f"the folder into base_model_name_or_path of {path / CONFIG}"
        )
    return base


def _scale(path: Path, config: dict[str, Any]) -> float:
    refused = [key for key in _REFUSED if config.get(key)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if config.get("peft_type", "LORA") != "LORA" or refused:
        why = refused[0] if refused else "peft_type"
        raise SourceError(f"{path / CONFIG} has {why} {config.get(why)!r}; merge that adapter with peft first")
    alpha, r = config.get("lora_alpha"), config.get("r")
    if not isinstance(alpha, int | float) or not isinstance(r, int) or r < 1:
        raise SourceError(f"{path / CONFIG} has lora_alpha {alpha!r} and r {r!r}; both must be numbers")
    return float(alpha / (r**0.5 if config.get("use_rslora") else r))


def _deltas(path: Path) -> Deltas:
    """Module path -> its factors A [r, K] and B [N, r]."""
    file = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if file is None:
        raise SourceError(f"{path} is an adapter without {' or '.join(WEIGHTS)}; is the download complete?")
    deltas: Deltas = {}
    for name, tensor in huggingface.read(file, lambda _: False):
        found = _FACTOR.match(name)
        if not found:
            raise SourceError(f"{file} holds {name}, which is no LoRA factor of a linear; merge it with peft first")
        deltas.setdefault(found["path"], {})[found["side"]] = tensor
    for module, factors in deltas.items():
        if factors.keys() != {"A", "B"}:
            raise SourceError(f"{file} holds only one of lora_A and lora_B for {module}; is the download complete?")
    return deltas


def adapted(path: Path) -> list[str]:
    """The paths of the modules that an adapter adds to, as it names them."""
    return list(_deltas(path))


def _named(deltas: Deltas, base: Source) -> Deltas:
    """The deltas by the base checkpoint's names: an adapter on a bare backbone lacks the leading module."""
    spec = families.read(base.config)
    ours = {spec.canonical(name): name.removesuffix(".weight") for name in base.names()}
    return {ours.get(spec.canonical(f"{path}.weight"), path): factors for path, factors in deltas.items()}


def _merged(
    name: str, weight: torch.Tensor, factors: dict[str, torch.Tensor], scale: float, flip: bool
) -> torch.Tensor:
    a, b = factors["A"].double(), factors["B"].double()
    shape = (b.shape[0], a.shape[1])[:: -1 if flip else 1]
    if a.shape[0] != b.shape[1] or tuple(weight.shape) != shape:
        raise SourceError(
            f"{name} is {list(weight.shape)}, its adapter's factors are A {list(a.shape)} and B {list(b.shape)}"
        )
    delta = (b @ a).t() if flip else b @ a
    return (weight.double() + scale * delta).to(weight.dtype)
