"""Which published layout a path holds."""

from __future__ import annotations

from pathlib import Path

from ...errors import SourceError
from . import basis_sharing, compressed_tensors, huggingface, l3prune, lora, lte, structured, svd_llm
from .short import repaired
from .source import Source

COMPRESSED = (basis_sharing, svd_llm, lte)
"""Layouts of compressed checkpoints in Hugging Face folders, told by their tensors: model_type stays the stock one."""


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face folder (a published layout of a method, an adapter on either) or a GGUF file.

    Raises SourceError saying what is wrong and what to do.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise SourceError(f"{path} does not exist; give a folder with config.json and weights, or a .gguf file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        from .gguf import open_source as open_gguf  # needs a package that no other source does

        return open_gguf(path)
    raise SourceError(
        f"{path} is a file but not GGUF; give the folder that holds config.json and the weights, or a .gguf file"
    )


def _folder(path: Path) -> Source:
    plain = _plain(path)
    names = plain.names()
    for layout in COMPRESSED:
        if layout.recognises(names):
            return layout.open_source(plain, names)
    if compressed_tensors.recognises(plain.config, names):
        return compressed_tensors.open_source(plain, names)
    return plain if _is_adapter(path) else structured.open_source(plain)


def _is_adapter(path: Path) -> bool:
    return l3prune.is_adapter(path) or lora.is_adapter(path)


def _plain(path: Path) -> Source:
    """A folder's dense weights: an adapter merged, the layers counted."""
    if l3prune.is_adapter(path):
        return l3prune.open_adapter(path)
    if lora.is_adapter(path):
        return lora.open_source(path)
    plain = huggingface.open_source(path)
    return repaired(l3prune.open_merged(plain) if l3prune.recognises(plain.config) else plain)
