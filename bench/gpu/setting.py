"""Where a stage measures and at which sizes: a GPU at real shapes, or in dry mode a CPU at tiny ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-3-8b": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}
COMMON: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
RATIOS, GROUP = (20, 50), 2  # compression in percent, layers that share a basis


@dataclass(frozen=True)
class Setting:
    """Device, dtype and how much is measured.

    rotated: bytes of weights between two uses of the same one, four times the L2 cache. recorded: bytes of weights
    that one recorded graph reads, so that its launch is lost in its run time. rounds: turns of all sides.
    """

    dry: bool
    device: torch.device
    dtype: torch.dtype
    rotated: int
    recorded: int
    rounds: int
    context: int  # tokens in the cache of a decode step
    tokens: int  # generated for one rate
    rows: tuple[int, ...]  # M of the sweep

    def config(self, model: str) -> dict[str, Any]:
        """The config.json of `model`; in dry mode of a small one with the same proportion of heads."""
        given = COMMON | MODELS[model] | {"max_position_embeddings": 4096}
        if self.dry:
            heads = 4 * given["num_key_value_heads"] // given["num_attention_heads"]
            given |= TINY | {"intermediate_size": 96, "num_key_value_heads": heads, "vocab_size": 128}
        return given

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def setting(dry: bool) -> Setting:
    """The sizes of a dry or a real run. Raises RuntimeError for a real one without a GPU."""
    if dry:
        cpu = torch.device("cpu")
        return Setting(True, cpu, torch.float32, 1, 1, 2, context=8, tokens=3, rows=(1, 2, 33))
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU: `--dry --out FOLDER` walks through the report on a CPU")
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    rows = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    gpu = torch.device("cuda")
    return Setting(False, gpu, torch.bfloat16, 4 * cache, 3 << 30, 25, context=512, tokens=64, rows=rows)
