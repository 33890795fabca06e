"""The sparse layouts of compressed-tensors (llm-compressor, up to 0.14): a bit for each weight, and the kept values.

    <P>.shape        i64 [2], for sparse-24-bitmask [2, 1]
    <P>.compressed   values in row order: [nnz], for sparse-24-bitmask [N, K / 2]
    <P>.bitmask      u8 [N, ceil(K / 8)], bit 0 of a byte is its first column; rows are padded with zero bits
    <P>.row_offsets  i64 [N], where each row's values begin; absent in sparse-24-bitmask

Since 0.9 P is the path of a module and stands for its weight; before, it was a parameter's full name, and vectors were
stored so too. config.json says `sparsity_config`, inside quantization_config or compression_config or beside them.
Format `dense` there means plain tensors. Source: compressed-tensors' releases 0.6 to 0.14.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ... import families
from ...errors import SourceError
from ..zeros import violation
from .source import Skip, Source

BITMASK, TWO_FOUR, DENSE = "sparse-bitmask", "sparse-24-bitmask", "dense"
PARTS = {BITMASK: {"shape", "compressed", "bitmask", "row_offsets"}, TWO_FOUR: {"shape", "compressed", "bitmask"}}
_HOLDERS = ("quantization_config", "compression_config")
_PART = re.compile(r"(?P<stem>.+)\.(?P<part>shape|compressed|bitmask|row_offsets)$")


def recognises(config: dict[str, Any], names: Iterable[str]) -> bool:
    """True for a checkpoint that compressed-tensors wrote."""
    quantized = config.get("quantization_config") or {}
    ours = quantized.get("quant_method") == "compressed-tensors" or "compression_config" in config
    return ours or "sparsity_config" in config or any(name.endswith(".bitmask") for name in names)


def open_source(plain: Source, names: list[str]) -> Source:
    """Read `plain` as a dense checkpoint. Raises SourceError for quantised ones, and for what is not whole."""
    sparsity = _sparsity(plain)
    if sparsity.format == DENSE and any(name.endswith(".bitmask") for name in names):
        raise SourceError(f"{plain.path} holds bitmasks, but its config.json has no sparsity_config that explains them")
    config = {key: value for key, value in plain.config.items() if key not in (*_HOLDERS, "sparsity_config")}
    spec = families.read(config)
    linears = {f"{path}.weight": path for path in spec.linears()}

    def tensors(skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in _decoded(plain, sparsity.format, skip):
            path = linears.get(str(spec.canonical(name)))
            if path and sparsity.declares(path):
                _hold_to(plain, name, tensor.t() if spec.transposed else tensor)
            yield name, tensor

    return replace(plain, kind=f"compressed-tensors {sparsity.format}", config=config, tensors=tensors)


@dataclass(frozen=True)
class _Sparsity:
    """What config.json says. two_four: the patterns of modules that it declares to be 2:4."""

    format: str
    two_four: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def declares(self, path: str) -> bool:
        """Whether a linear is declared to be 2:4."""
        return _matches(path, self.two_four) and not _matches(path, self.ignored)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(
        re.match(pattern[3:], path) is not None if pattern.startswith("re:") else pattern in (path, "Linear")
        for pattern in patterns
    )


def _sparsity(plain: Source) -> _Sparsity:
    holders = [plain.config.get(key) or {} for key in _HOLDERS]
    for holder in holders:
        packed = holder.get("format", DENSE)
        if holder.get("config_groups") or packed not in (DENSE, None, BITMASK, TWO_FOUR):
            raise SourceError(
                f"{plain.path} is quantised by compressed-tensors (format {packed!r}); pared reads its sparse layouts "
                "of plain weights: take the checkpoint from before quantisation"
            )
    found = [holder.get("sparsity_config") for holder in (*holders, plain.config)]
    said: dict[str, Any] = next((one for one in found if one), {})
    format = said.get("format", DENSE)
    if format not in (*PARTS, DENSE):
        raise SourceError(
            f"{plain.path} has sparsity_config.format {format!r}; pared reads {BITMASK}, {TWO_FOUR} and {DENSE}"
        )
    two_four = said.get("sparsity_structure") == "2:4"
    return _Sparsity(format, tuple(said.get("targets") or ()) if two_four else (), tuple(said.get("ignore") or ()))


def _decoded(plain: Source, format: str, skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under their dense names; the parts of one may lie in several shards."""
    asked: dict[str, bool] = {}
    waiting: dict[str, dict[str, torch.Tensor]] = {}

    def skipped(name: str) -> bool:
        dense = _dense_name(name, format)
        if dense not in asked:  # `skip` may count what it is asked
            asked[dense] = skip(dense)
        return asked[dense]

    for name, tensor in plain.tensors(skipped):
        found = _PART.match(name) if format in PARTS else None
        if found is None:
            yield name, tensor
            continue
        dense = _dense_name(name, format)
        parts = waiting.setdefault(dense, {})
        parts[found["part"]] = tensor
        if parts.keys() == PARTS[format]:
            yield dense, decode(f"{dense} in {plain.path}", waiting.pop(dense), format)
    for dense, parts in waiting.items():
        lacks = ", ".join(sorted(PARTS[format] - parts.keys()))
        raise SourceError(f"{plain.path} holds {', '.join(sorted(parts))} of {dense}, but no {lacks}; is it complete?")


def _dense_name(name: str, format: str) -> str:
    found = _PART.match(name) if format in PARTS else None
    if found is None:
        return name
    stem = found["stem"]
    return stem if stem.endswith((".weight", ".bias")) else f"{stem}.weight"


def decode(name: str, parts: dict[str, torch.Tensor], format: str) -> torch.Tensor:
    """The dense tensor of these parts, bit for bit. Raises SourceError naming what does not fit."""
    shape = tuple(parts["shape"].flatten().tolist())
    if not shape or min(shape) < 1:
        raise SourceError(f"{name} is stored with shape {list(shape)}, which no weight has; download it again")
    mask, values = _mask(name, parts["bitmask"], shape), parts["compressed"]
    counts = mask.view(-1, shape[-1]).sum(1)
    if format == TWO_FOUR:
        _exactly_two(name, mask)
    elif not torch.equal(parts["row_offsets"].flatten(), counts.cumsum(0) - counts):
        raise SourceError(f"{name}: row_offsets do not count the bits of the bitmask; the two are of different weights")
    if values.numel() != int(counts.sum()):
        raise SourceError(
            f"{name}: the bitmask keeps {int(counts.sum())} weights, compressed holds {values.numel()}; "
            "one of them is truncated, download it again"
        )
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise SourceError(f"{name} is stored as {values.dtype}, which pared does not read: it is quantised")
    dense = torch.zeros(shape, dtype=values.dtype)
    dense[mask] = values.flatten()
    return dense


def _mask(name: str, bitmask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    expected = (*shape[:-1], -(-shape[-1] // 8))
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != expected:
        raise SourceError(
            f"{name}: the bitmask is {list(bitmask.shape)} of {bitmask.dtype}, a weight {list(shape)} has one of "
            f"{list(expected)} bytes; it is truncated or of another weight"
        )
    bits = np.unpackbits(bitmask.numpy(), axis=-1, count=shape[-1], bitorder="little")
    return torch.from_numpy(bits.astype(bool))


def _exactly_two(name: str, mask: torch.Tensor) -> None:
    runs_on = mask.shape[-1] % 4 != 0  # then groups reach from row to row
    found = violation(mask.view(1, -1) if runs_on else mask.view(-1, mask.shape[-1]), least=2)
    if found:
        raise SourceError(f"{name} is stored as 2:4, but its bitmask keeps {found}; the file is damaged")


def _hold_to(plain: Source, name: str, weight: torch.Tensor) -> None:
    found = violation(weight != 0)
    if found:
        raise SourceError(
            f"{name} in {plain.path} is declared 2:4, but it has {found}; if that module was left dense, "
            "name it in sparsity_config.ignore of config.json"
        )
