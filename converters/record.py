"""What a method's search has found, as files: parts that are whole or not there, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..durable import disk_errors, replace_file, write_safetensors


class Record:
    """A folder of named parts, each some tensors and a JSON object. A part counts once its JSON is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def holds(self, part: str) -> bool:
        return (self.folder / f"{part}.json").exists()

    def save(self, part: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Write a part, tensors first. Saving it again replaces it."""
        draft, final = self.folder / f"{part}.draft", self.folder / f"{part}.safetensors"
        with disk_errors(final):
            write_safetensors(draft, tensors)
            draft.replace(final)
            replace_file(self.folder / f"{part}.json", json.dumps(facts).encode())

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{part}.safetensors")

    def facts(self, part: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{part}.json").read_text())

    def discard(self, part: str) -> None:
        """Forget a part, if there is one."""
        for suffix in ("json", "safetensors"):
            (self.folder / f"{part}.{suffix}").unlink(missing_ok=True)
