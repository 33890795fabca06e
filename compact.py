"""The contract on disk: what a compact folder says about itself, and the reader that holds it to that.

A compact folder is an ordinary Hugging Face folder whose config.json carries one more entry, the
manifest: under `pared` when every module lies in its stock shape, under `quantization_config` when
one does not. Nothing is guessed from names or shapes. compact_writer.py writes such folders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .errors import (
    FolderDamaged,
    FolderError,
    LeftoverTensors,
    MissingTensors,
    UnknownVersion,
    WrongShape,
)
from .spec import WIDTHS

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
STOCK_FORMAT = "dense"
"""The one format whose tensors every other engine reads too."""

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_STOCK_KEY, _COMPRESSED_KEY = "pared", "quantization_config"
_SHOWN = 5  # names listed in a message
_AGAIN = "convert or copy the folder again"


@dataclass(frozen=True)
class TensorEntry:
    """A stored tensor: `dtype` as safetensors spells it (F32, F16, BF16, U8, ...), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> TensorEntry:
        """From JSON."""
        return cls(str(entry["dtype"]), tuple(entry["shape"]))


@dataclass(frozen=True)
class UnitEntry:
    """A unit on disk. modules: path -> (N outputs, K inputs); tensors: role -> full tensor name.

    covers: the model's linears whose place its modules take, where these are none themselves: path -> (N, K).
    why: what the conversion found in the weights, for people ("50.0 % zeros"); nothing depends on it.
    """

    format: str
    version: int
    modules: dict[str, tuple[int, int]]
    tensors: dict[str, str]
    params: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    covers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear of the model that this unit stands for."""
        return self.covers or self.modules

    def has_bias(self, path: str) -> bool:
        """Whether the module's bias is among the tensors: under `bias`, or `bias.<path>` where modules share a unit."""
        return "bias" in self.tensors or f"bias.{path}" in self.tensors

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> UnitEntry:
        """From JSON."""
        modules, covers = (
            {path: (int(n), int(k)) for path, (n, k) in shapes.items()}
            for shapes in (entry["modules"], entry.get("covers", {}))
        )
        tensors = {role: str(name) for role, name in entry["tensors"].items()}
        params, why = dict(entry["params"]), str(entry.get("why", ""))
        return cls(str(entry["format"]), int(entry["version"]), modules, tensors, params, why, covers)


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    bytes: int
    sha256: str

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> FileEntry:
        """From JSON."""
        return cls(int(entry["bytes"]), str(entry["sha256"]))


@dataclass(frozen=True)
class Manifest:
    """Everything needed to read a folder. `plain` are the names of tensors that belong to no unit."""

    units: tuple[UnitEntry, ...]
    plain: tuple[str, ...]
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    provenance: dict[str, Any]
    pared_version: str
    format_version: int = FORMAT_VERSION

    @property
    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """The plain tensors' shapes, to hold against what the model needs."""
        return {name: self.tensors[name].shape for name in self.plain}

    def stock(self, config: dict[str, Any]) -> bool:
        """True when every engine can load a folder of this config: all modules are dense, in the shapes it gives."""
        return WIDTHS not in config and all(unit.format == STOCK_FORMAT for unit in self.units)

    @property
    def shards(self) -> list[str]:
        """The safetensors files, in order."""
        return sorted(name for name in self.files if name.endswith(".safetensors"))

    def tombstones(self) -> set[str]:
        """The [0]-shaped `.weight` in place of each compressed linear, at which a stock loader stops."""
        compressed = (unit for unit in self.units if unit.format != STOCK_FORMAT)
        return {f"{path}.weight" for unit in compressed for path in unit.linears}

    def into(self, config: dict[str, Any]) -> dict[str, Any]:
        """The model's config with this manifest in it, as config.json holds it."""
        entry = {"quant_method": "pared"} | asdict(self)
        return config | ({_STOCK_KEY: asdict(self)} if self.stock(config) else {_COMPRESSED_KEY: entry})

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> Manifest:
        """Read a manifest's JSON. Raises UnknownVersion, or FolderDamaged naming what is not as it should be."""
        try:
            if entry["format_version"] > FORMAT_VERSION:
                raise UnknownVersion(
                    f"the folder has format_version {entry['format_version']}, written by pared "
                    f"{entry.get('pared_version')}; this pared reads up to {FORMAT_VERSION}: upgrade pared"
                )
            manifest = cls(
                units=tuple(UnitEntry.parse(unit) for unit in entry["units"]),
                plain=tuple(str(name) for name in entry["plain"]),
                tensors={n: TensorEntry.parse(t) for n, t in entry["tensors"].items()},
                files={name: FileEntry.parse(f) for name, f in entry["files"].items()},
                provenance=dict(entry["provenance"]),
                pared_version=str(entry["pared_version"]),
                format_version=int(entry["format_version"]),
            )
        except KeyError as missing:
            raise FolderDamaged(f"the manifest in {CONFIG} lacks {missing}; {_AGAIN}") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as wrong:
            raise FolderDamaged(f"the manifest in {CONFIG} is not of the right form ({wrong}); {_AGAIN}") from None
        for name in manifest.files:
            if {"", ".", ".."} & set(name.split("/")):
                raise FolderDamaged(f"the manifest in {CONFIG} names the file {name!r} outside of the folder; {_AGAIN}")
        return manifest


class Folder:
    """An open compact folder, checked: tensors are mapped from the files, not read into memory."""

    def __init__(self, path: Path, config: dict[str, Any], manifest: Manifest) -> None:
        self.path, self.config, self.manifest = path, config, manifest
        self._shards = {name: _open_shard(path / name) for name in manifest.shards}
        self._where = _locate(path, self._shards)

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor, mapped privately: writing to it never reaches the file."""
        if name not in self._where:
            raise MissingTensors(f"{self.path} holds no tensor {name!r}")
        return self._shards[self._where[name]].get_tensor(name)

    @property
    def stock(self) -> bool:
        """Whether every engine can load it."""
        return self.manifest.stock(self.config)

    def close(self) -> None:
        """Let go of the files. Tensors handed out stay valid."""
        self._shards.clear()
        self._where.clear()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def verify(self) -> None:
        """Read every file and compare its sha256. Raises FolderDamaged naming the first that differs."""
        for name, expected in self.manifest.files.items():
            if not (self.path / name).is_file():
                raise FolderDamaged(f"{self.path} lacks {name}, which its manifest names; {_AGAIN}")
            if file_sha256(self.path / name) != expected.sha256:
                raise FolderDamaged(f"{self.path / name} is not the file that was written (sha256 differs); {_AGAIN}")

    def _check(self) -> None:
        """Hold headers and manifest against each other."""
        tensors, named = self.manifest.tensors, set(self.manifest.plain) | self.manifest.tombstones()
        named |= {name for unit in self.manifest.units for name in unit.tensors.values()}
        if lacking := (named | tensors.keys()) - (self._where.keys() & tensors.keys()):
            raise MissingTensors(f"{self.path} lacks {_list(lacking)} that its manifest names; {_AGAIN}")
        if extra := self._where.keys() - named:
            raise LeftoverTensors(f"{self.path} holds {_list(extra)} that its manifest does not use; {_AGAIN}")
        for name in self.manifest.tombstones():
            if tensors[name].shape != (0,):
                raise WrongShape(
                    f"{name} in {self.path} is {list(tensors[name].shape)}; beside compressed weights it must be [0], "
                    f"so that a loader which does not know them stops; {_AGAIN}"
                )
        for name, expected in tensors.items():
            stored = self._shards[self._where[name]].get_slice(name)
            found = TensorEntry(stored.get_dtype(), tuple(stored.get_shape()))
            if found != expected:
                raise WrongShape(
                    f"{name} in {self.path / self._where[name]} is {found.dtype} {list(found.shape)}, "
                    f"its manifest says {expected.dtype} {list(expected.shape)}; {_AGAIN}"
                )

    def _check_index(self) -> None:
        if self.manifest.shards == [SINGLE]:
            return
        index = _read_json(self.path / INDEX).get("weight_map")
        if index != self._where:
            raise FolderDamaged(f"{self.path / INDEX} does not place the tensors where the shards hold them; {_AGAIN}")


def open_folder(path: str | Path) -> Folder:
    """Open a compact folder and check its index, file sizes, headers, shapes and dtypes; contents: `verify`.

    Raises FolderError when it is no compact folder, else the error that names what is wrong with it.
    """
    path = Path(path)
    config = _read_config(path)
    quantization = config.get(_COMPRESSED_KEY)
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == "pared"
    key = _COMPRESSED_KEY if ours else _STOCK_KEY
    entry = config.get(key)
    if not isinstance(entry, dict):
        raise FolderError(f"{path} is an ordinary checkpoint, not a compact folder: `pared convert {path} OUT` first")
    manifest = Manifest.parse(entry)
    _check_files(path, manifest)
    folder = Folder(path, {k: v for k, v in config.items() if k != key}, manifest)
    folder._check()
    folder._check_index()
    return folder


def file_sha256(path: Path) -> str:
    """The file's sha256 as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        replaced = path.with_name(path.name + ".replaced")
        hint = f"; a conversion was interrupted, the folder from before is {replaced}" if replaced.is_dir() else ""
        raise FolderError(f"{path} is not a folder{hint}")
    if not (path / CONFIG).is_file():
        raise FolderError(f"{path} holds no {CONFIG}, so it is no model folder")
    return _read_json(path / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as wrong:
        raise FolderDamaged(f"{path} cannot be read as JSON ({wrong}); {_AGAIN}") from None
    if not isinstance(content, dict):
        raise FolderDamaged(f"{path} is JSON but not an object; {_AGAIN}")
    return content


def _check_files(path: Path, manifest: Manifest) -> None:
    """Shards have their sizes and no other shard lies beside them; contents of the other files may be edited."""
    for name in manifest.shards:
        if not (path / name).is_file():
            raise FolderDamaged(f"{path} lacks the shard {name}; {_AGAIN}")
        found, expected = (path / name).stat().st_size, manifest.files[name].bytes
        if found != expected:
            state = "is truncated" if found < expected else "has grown"
            raise FolderDamaged(f"{path / name} {state}: {found} bytes, its manifest says {expected}; {_AGAIN}")
    if not manifest.shards:
        raise FolderDamaged(f"the manifest of {path} names no safetensors file; {_AGAIN}")
    if extra := {file.name for file in path.glob("model*.safetensors")} - set(manifest.shards):
        raise LeftoverTensors(f"{path} holds {_list(extra)} that its manifest does not name; remove or {_AGAIN}")


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as wrong:
        raise FolderDamaged(f"{path} is no readable safetensors file ({wrong}); {_AGAIN}") from None


def _locate(path: Path, shards: dict[str, Any]) -> dict[str, str]:
    """tensor name -> shard that holds it."""
    where: dict[str, str] = {}
    for shard, opened in shards.items():
        for name in opened.keys():  # noqa: SIM118 (safe_open is no dict)
            if name in where:
                raise FolderDamaged(f"{name} is both in {path / where[name]} and in {shard}; {_AGAIN}")
            where[name] = shard
    return where


def _list(names: Iterable[str]) -> str:
    """The names for a message: the first few, and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
