"""Writing a compact folder: into TARGET.partial under a lock, shard by shard, then one rename.

Nothing is ever half there: a killed or failed conversion leaves TARGET as it was and keeps its
finished shards, and the next one with the same resume key goes on after them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from . import __version__
from .compact import CONFIG, INDEX, SINGLE, STOCK_FORMAT, FileEntry, Manifest, TensorEntry, UnitEntry
from .durable import append_line, disk_errors, entry, replace_file, sync_folder, write_safetensors
from .errors import FolderBusy, FolderExists

_JOURNAL = ".pared.journal"
_WORK = ".work"


@dataclass
class _Shard:
    """What goes together into one safetensors file; `plain` and `units` are its part of the manifest."""

    plain: list[str] = field(default_factory=list)
    units: list[UnitEntry] = field(default_factory=list)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    written: FileEntry | None = None

    @classmethod
    def parse(cls, line: dict[str, Any]) -> _Shard:
        """From a line of the journal."""
        tensors = {name: TensorEntry.parse(entry) for name, entry in line["tensors"].items()}
        units = [UnitEntry.parse(unit) for unit in line["units"]]
        return cls(line["plain"], units, tensors, FileEntry.parse(line["written"]))


class FolderWriter:
    """Fills TARGET.partial in a deterministic order of `add_plain` and `add_unit`, then publishes it.

    resume_key names source and options: with another key than the last time, the work starts anew.
    A unit is never split; a shard grows to about `max_shard_bytes`, or to its largest unit.
    Raises FolderExists, FolderBusy; DiskFull from every step that writes.
    """

    def __init__(
        self, target: str | Path, *, resume_key: str, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000
    ) -> None:
        self.target = Path(target).absolute()
        self.partial = self.target.with_name(self.target.name + ".partial")
        self._replaced = self.target.with_name(self.target.name + ".replaced")
        self._overwrite = overwrite
        self._max_shard_bytes = max_shard_bytes
        if not self._replaced.exists():  # else the target may be there again once we have recovered
            _check_target(self.target, overwrite)
        with disk_errors(self.partial):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._journal = self._lock()
            try:
                self._recover()
                _check_target(self.target, overwrite)
                self._shards = self._resume(resume_key)
            except BaseException:
                self._journal.close()
                raise
        self._finished = {n for s in self._shards for n in (*s.plain, *(path for u in s.units for path in u.modules))}
        self._open, self._pending = _Shard(), dict[str, torch.Tensor]()
        self._manifest: Manifest | None = None
        self._config: dict[str, Any] = {}

    # --- filling ---------------------------------------------------------------------------------

    def holds(self, name: str) -> bool:
        """True when an earlier, interrupted run finished this plain tensor or the unit of this module path."""
        return name in self._finished

    def work(self, name: str) -> Path:
        """A folder for the finished parts of a step; it is deleted when the target is published."""
        path = self.partial / _WORK / name
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def add_plain(self, name: str, tensor: torch.Tensor) -> None:
        """Store a tensor that belongs to no unit."""
        self._make_room({name: tensor})
        self._open.plain.append(name)

    def add_unit(self, unit: UnitEntry, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store a unit's tensors under their full names; those of a tied head are stored elsewhere already."""
        stones = {f"{p}.weight": torch.zeros(0) for p in unit.linears} if unit.format != STOCK_FORMAT else {}
        self._make_room(dict(tensors) | stones)
        self._open.units.append(unit)

    def _make_room(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name in tensors:
            if name in self._pending or any(name in shard.tensors for shard in self._shards):
                raise ValueError(f"tensor {name!r} was already written")
        size, more = (sum(t.nbytes for t in group.values()) for group in (self._pending, tensors))
        if size and more and size + more > self._max_shard_bytes:
            self._flush()
        self._pending |= tensors

    def _flush(self) -> None:
        """Write the open shard, make it durable, then say so in the journal."""
        path = self.partial / _working_name(len(self._shards))
        self._open.tensors = {name: entry(tensor) for name, tensor in self._pending.items()}
        with disk_errors(path):
            self._open.written = write_safetensors(path, self._pending)
        self._shards.append(self._open)
        self._note(asdict(self._open))
        self._open, self._pending = _Shard(), {}

    # --- finishing -------------------------------------------------------------------------------

    def finish(
        self,
        config: dict[str, Any],
        provenance: dict[str, Any],
        extra_files: Mapping[str, bytes | Path],
        manifest: bool = True,
    ) -> Path:
        """Give the shards their stock names and write everything else; the partial folder then loads. Returns it.

        Without `manifest` it becomes an ordinary checkpoint, with nothing of ours in its config.
        """
        if self._pending or self._open.units:
            self._flush()
        names = _stock_names(len(self._shards))
        for i, name in enumerate(names):
            if (self.partial / _working_name(i)).exists():  # else an interrupted finish has renamed it
                os.rename(self.partial / _working_name(i), self.partial / name)
        files = {name: shard.written for name, shard in zip(names, self._shards, strict=True) if shard.written}
        others = dict(extra_files)
        if len(names) > 1:
            others[INDEX] = self._index(names)
        files |= {name: self._write_file(name, content) for name, content in sorted(others.items())}
        self._config = config
        self._manifest = Manifest(
            units=tuple(unit for shard in self._shards for unit in shard.units),
            plain=tuple(name for shard in self._shards for name in shard.plain),
            tensors={name: entry for shard in self._shards for name, entry in shard.tensors.items()},
            files=files,
            provenance=provenance,
            pared_version=__version__,
        )
        self._write_config(self._manifest.into(config) if manifest else config)
        return self.partial

    def record(self, measured: Mapping[str, Any]) -> None:
        """Add what was measured on the finished folder to its provenance."""
        if self._manifest is None:
            raise ValueError("finish the folder before recording what it measures")
        self._manifest.provenance.update(measured)
        self._write_config(self._manifest.into(self._config))

    def publish(self) -> Path:
        """Rename the partial folder to the target; an existing one is deleted only after that. Returns the target."""
        if self._manifest is None:
            raise ValueError("finish the folder before publishing it")
        _check_target(self.target, self._overwrite)
        shutil.rmtree(self.partial / _WORK, ignore_errors=True)
        sync_folder(self.partial)
        replacing = self.target.exists()
        if replacing:
            if self._replaced.exists():
                raise FolderExists(f"{self._replaced} is in the way of replacing {self.target}; move it away")
            os.rename(self.target, self._replaced)
        try:
            os.rename(self.partial, self.target)
        except OSError as wrong:
            self._recover()
            raise FolderExists(
                f"{self.target} cannot be put in place ({wrong.strerror}); {self.partial} is whole"
            ) from None
        sync_folder(self.target.parent)
        self._clean_up(replacing)
        self.close()
        return self.target

    def _clean_up(self, replaced: bool) -> None:
        """Delete the old folder, and only then the journal: while it is there, `.replaced` is ours to delete."""
        if replaced:
            shutil.rmtree(self._replaced, ignore_errors=True)
        (self.target / _JOURNAL).unlink()

    def close(self) -> None:
        """Unlock. Finished shards and work stay in the partial folder for the next run; without any it is removed."""
        worked = any(path.is_file() for path in (self.partial / _WORK).rglob("*"))
        if not self._shards and not worked and not self._journal.closed:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._journal.close()

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _write_config(self, config: dict[str, Any]) -> None:
        self._write_file(CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())

    def _index(self, names: list[str]) -> bytes:
        where = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard.tensors}
        total = sum(shard.written.bytes for shard in self._shards if shard.written)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        return json.dumps(index, indent=2).encode()

    def _write_file(self, name: str, content: bytes | Path) -> FileEntry:
        with disk_errors(self.partial / name):
            (self.partial / name).parent.mkdir(exist_ok=True)
            return replace_file(self.partial / name, content if isinstance(content, bytes) else content.read_bytes())

    # --- lock and journal ------------------------------------------------------------------------

    def _lock(self) -> IO[bytes]:
        """Open the journal of the partial folder, locked. Who publishes renames it away: hence the second look."""
        self.partial.mkdir(exist_ok=True)
        if any(self.partial.iterdir()) and not (self.partial / _JOURNAL).is_file():
            raise FolderExists(f"{self.partial} is there and pared did not make it; move it away or rename the target")
        journal = (self.partial / _JOURNAL).open("a+b", buffering=0)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(self.partial / _JOURNAL).st_ino == os.fstat(journal.fileno()).st_ino:
                return journal
        journal.close()
        raise FolderBusy(f"another process is converting into {self.target}; wait for it or stop it")

    def _recover(self) -> None:
        """Complete or undo a publish that died between its renames; another folder of that name is left alone."""
        if not self._replaced.exists():
            return
        if (self.target / _JOURNAL).exists():
            self._clean_up(replaced=True)
        elif not self.target.exists() and os.fstat(self._journal.fileno()).st_size:
            os.rename(self._replaced, self.target)

    def _resume(self, key: str) -> list[_Shard]:
        """The shards that an earlier run with this key finished; without any, an empty partial folder."""
        lines = _whole_lines(self._journal)
        if lines and lines[0] == {"resume_key": key}:
            shards = [_Shard.parse(line) for line in lines[1:]]
            if all(self._is_there(i, len(shards), shard) for i, shard in enumerate(shards)):
                return shards
        for stale in self.partial.iterdir():
            if stale.is_dir():
                shutil.rmtree(stale)
            elif stale.name != _JOURNAL:
                stale.unlink()
        self._journal.truncate(0)
        self._note({"resume_key": key})
        return []

    def _is_there(self, i: int, count: int, shard: _Shard) -> bool:
        for name in (_working_name(i), _stock_names(count)[i]):
            path = self.partial / name
            if shard.written and path.is_file() and path.stat().st_size == shard.written.bytes:
                return True
        return False

    def _note(self, line: dict[str, Any]) -> None:
        with disk_errors(self.partial / _JOURNAL):
            append_line(self._journal, json.dumps(line))


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise FolderExists(f"{target} is already there; choose another name or give --overwrite")
    ours = target.is_dir() and not target.is_symlink() and _is_compact(target)
    if not ours:
        raise FolderExists(f"{target} is not a compact folder, so --overwrite does not replace it; choose another name")


def _is_compact(target: Path) -> bool:
    try:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
        return "pared" in config or config.get("quantization_config", {}).get("quant_method") == "pared"
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _working_name(i: int) -> str:
    return f"shard-{i + 1:05d}.safetensors"


def _stock_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _whole_lines(journal: IO[bytes]) -> list[dict[str, Any]]:
    """The journal's entries; a last one that a crash has torn is cut off."""
    journal.seek(0)
    content = journal.read()
    whole = content[: content.rfind(b"\n") + 1]
    journal.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        return []
