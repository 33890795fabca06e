"""Which published layout a path holds."""

from __future__ import annotations

from pathlib import Path

from ...errors import SourceError
from . import huggingface
from .source import Source


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face folder or a GGUF file. Raises SourceError saying what is wrong and what to do."""
    path = Path(path)
    if path.is_dir():
        return huggingface.open_source(path)
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
