"""Hugging Face folders: config.json beside safetensors or `.bin` weights, in one file or in shards.

Pickles are read with weights_only, so that no code in them runs; remote code is neither run nor copied.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...errors import SourceError
from .source import Skip, Source

CONFIG = "config.json"

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights are looked for, in the order in which transformers does."""

COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "embedding.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)


def open_source(path: Path) -> Source:
    """Open a folder as `save_pretrained` writes it, or as it lies on the Hub."""
    config = _config(path)
    shards = _shards(path)
    files: dict[str, bytes | Path] = {name: path / name for name in COPIED if (path / name).is_file()}

    def tensors(skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
        for shard in shards:
            yield from read(shard, skip)

    return Source(path, "huggingface", config, files, tensors, _fingerprint(path, config, shards))


def read(shard: Path, skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of one file, mapped where it can be. Raises SourceError naming the file."""
    return (_safetensors if shard.suffix == ".safetensors" else _pickled)(shard, skip)


def _config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise SourceError(f"{path} holds no {CONFIG}; give the folder of a Hugging Face model, or a .gguf file")
    config = read_json(path / CONFIG)
    config.pop("pared", None)  # a dense compact folder is an ordinary checkpoint too
    if (config.get("quantization_config") or {}).get("quant_method") == "pared":
        raise SourceError(f"{path} is a compressed compact folder already; `pared export` makes a checkpoint of it")
    return config


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as wrong:
        raise SourceError(f"{path} cannot be read as JSON ({wrong}); download it again") from None
    if not isinstance(content, dict):
        raise SourceError(f"{path} is JSON but not an object; download it again")
    return content


def _shards(path: Path) -> list[Path]:
    """The files with the weights, in order, each of them there."""
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None:
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt", ".gguf"))
        seen = f"; it has {', '.join(others[:5])}" if others else ""
        raise SourceError(f"{path} holds none of {', '.join(WEIGHTS)}{seen}; is the download complete?")
    if found.suffix != ".json":
        return [found]
    places = read_json(found).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise SourceError(f"{found} has no weight_map from tensor names to files; download it again")
    shards = [path / name for name in sorted(set(places.values()))]
    for shard in shards:
        if shard.parent != path or not shard.is_file():
            raise SourceError(f"{found.name} names {shard.name}, which is not in {path}; download that file")
    return shards


def _safetensors(shard: Path, skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors mapped from the file: they take memory only while they are read."""
    try:
        opened = safe_open(shard, framework="pt")
    except (SafetensorError, OSError, ValueError) as wrong:
        raise SourceError(f"{shard} is truncated or no safetensors file ({wrong}); download it again") from None
    for name in opened.keys():  # noqa: SIM118 (safe_open is no dict)
        if not skip(name):
            yield name, opened.get_tensor(name)


def _pickled(shard: Path, skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
    mapped = zipfile.is_zipfile(shard)  # what torch saved before 1.6 is one pickle stream and cannot be mapped
    try:
        content = torch.load(shard, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as wrong:
        raise SourceError(
            f"{shard} is damaged, or holds code beside weights, which pared never runs ({_first_line(wrong)}); "
            "ask its publisher for safetensors"
        ) from None
    except Exception as wrong:  # damaged bytes make the unpickler raise whatever they spell
        raise SourceError(
            f"{shard} is truncated or was not saved by torch ({_first_line(wrong)}); download it again"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise SourceError(f"{shard} holds something else than a flat dictionary of tensors; it is no model's state")
    for name, tensor in content.items():
        if not skip(name):
            yield name, tensor.detach()


def _first_line(wrong: Exception) -> str:
    return next(iter(str(wrong).splitlines()), type(wrong).__name__)


def _fingerprint(path: Path, config: dict[str, Any], shards: list[Path]) -> str:
    """Cheap on purpose: names, sizes and times of the shards stand for their contents."""
    stats = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    return hashlib.sha256(json.dumps([config, stats], sort_keys=True).encode()).hexdigest()
