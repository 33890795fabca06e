"""Text encoders as L3Prune (arXiv 2410.14578) publishes them: merged, or as adapters on the dense decoder.

Merged: architectures ["LLMEncoder"] with code of its own, which never runs; the config of the shortened decoder is
nested under model_config, pooling_mode, max_length and skip_instruction beside it. Weights are the decoder's
without a head.

Adapters: a PEFT folder with l3prune_config.json; how many layers are kept is written nowhere but in the adapted ones,
and in the folder's place <layers, or share dropped>/checkpoint-<step>.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ... import families
from ...embedding import FILE, Embedding
from ...errors import SourceError
from . import huggingface, lora
from .short import first_layers, layer_of
from .source import Skip, Source

CONFIG = "l3prune_config.json"
_POOLINGS = {
    "weighted_mean": "weighted_mean",
    "mean": "mean",
    "eos_token": "last",
    "last_token": "last",
    "bos_token": "cls",
}
_TEMPLATES = {  # by the exact name of the model that was trained, as in L3Prune's code
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3",
    "mistralai/Mistral-7B-Instruct-v0.2": "inst",
    "meta-llama/Llama-2-7b-chat-hf": "inst",
    "Qwen/Qwen2-1.5B-Instruct": "chatml",
    "Qwen/Qwen2-7B-Instruct": "chatml",
}
_BACKBONES = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "phi3": "Phi3Model",
    "opt": "OPTModel",
    "gpt2": "GPT2Model",
}


def recognises(config: Mapping[str, Any]) -> bool:
    """True for the config of a merged encoder."""
    return config.get("architectures") == ["LLMEncoder"]


def open_merged(plain: Source) -> Source:
    """Read `plain` as a merged encoder. Raises SourceError."""
    nested = plain.config.get("model_config")
    if not isinstance(nested, dict) or "model_type" not in nested:
        raise SourceError(f"{plain.path / huggingface.CONFIG} has no decoder's config under model_config")
    return _encoder(replace(plain, config=nested), plain.config, str(plain.config.get("base_model")))


def is_adapter(path: Path) -> bool:
    """True for a folder that L3Prune's training wrote."""
    return lora.is_adapter(path) and (path / CONFIG).is_file()


def open_adapter(path: Path) -> Source:
    """The base checkpoint's lower layers with the adapter merged into them. Raises SourceError."""
    whole = lora.open_source(path)
    adapted = {layer for module in lora.adapted(path) if (layer := layer_of(f"{module}.")) is not None}
    if not adapted:
        raise SourceError(f"{path} adapts no layer, so it does not say how many are kept")
    count, layers = max(adapted) + 1, len(families.read(whole.config).layers)
    place = path.resolve().parent.name
    if (placed := _placed(place, layers)) not in (None, count):
        raise SourceError(
            f"{path} adapts {count} layers, but by its place {place}/ it has {placed} of {layers}; "
            "move the folder to another place if that is a mere name"
        )
    base = huggingface.read_json(path / lora.CONFIG).get("base_model_name_or_path")
    return _encoder(first_layers(whole, count), huggingface.read_json(path / CONFIG), str(base))


def _placed(name: str, layers: int) -> int | None:
    """The layers that a folder's name stands for: a number of them, or the share that was dropped."""
    try:
        value = float(name)
    except ValueError:
        return None
    return int(value) if value >= 1 else int(layers * (1 - value))


def _encoder(source: Source, settings: Mapping[str, Any], base: str) -> Source:
    """`source` without its head, and with embedding.json."""
    private = {"auto_map", "use_cache", "_name_or_path"}
    config = {key: value for key, value in source.config.items() if key not in private}
    family = families.read(config).family
    config |= {"architectures": [_BACKBONES[family]], "tie_word_embeddings": True}
    head = f"{families.read(config).names.head}."

    def tensors(skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
        return source.tensors(lambda name: name.startswith(head) or skip(name))

    files = source.files | {FILE: _embedding(settings, source.path, base).file()}
    return replace(source, kind="l3prune", config=config, files=files, tensors=tensors)


def _embedding(settings: Mapping[str, Any], path: Path, base: str) -> Embedding:
    pooling, length = settings.get("pooling_mode"), settings.get("max_length", 512)
    if pooling not in _POOLINGS or type(length) is not int or length < 1:
        raise SourceError(
            f"{path} has pooling_mode {pooling!r} and max_length {length!r}; pared knows {', '.join(_POOLINGS)}"
        )
    template = _TEMPLATES.get(base, "none")
    entry = {"pooling": _POOLINGS[pooling], "template": template, "max_length": length}
    return Embedding.parse(entry | {"skip_instruction": bool(settings.get("skip_instruction", True))})
