"""Files of texts to files of vectors: read as a stream, embedded shard by shard, and resumed where a run stopped.

    OUT.partial/   journal   what is being made, then a line for every finished shard; locked
                   0.npy ... fp32 vectors as the model gives them

Normalising, cutting and quantising come when all is there, so that int8 has the ranges of the whole corpus.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from .. import __version__
from ..compact import file_sha256, open_folder
from ..durable import append_line, disk_errors, replace_file, sync_folder
from ..errors import BadParameter, FolderBusy, FolderExists
from .embed import Embedder
from .texts import open_texts
from .vectors import PRECISIONS, Precision, quantize, ranges_of

SHARD = 4096  # texts of a shard: what a killed run loses at most
KINDS = (".npy", ".parquet")


@dataclass(frozen=True)
class Options:
    """field: of JSON lines and parquet files. The others as for Embedder.encode."""

    field: str = "text"
    prompt_name: str | None = None
    prompt: str | None = None
    normalize: bool = False
    dimensions: int | None = None
    precision: Precision = "float32"


@dataclass(frozen=True)
class Done:
    """texts and tokens of the whole file, and how many texts were cut; `earlier` texts were there from another run."""

    texts: int
    tokens: int
    cut: int
    earlier: int
    shape: tuple[int, int]
    dtype: str

    def rows(self, seconds: float, longest: int) -> list[tuple[str, str]]:
        """The lines of a table; seconds: of this run, longest: text in tokens."""
        made = self.texts - self.earlier
        rows = [
            ("vectors", f"{self.shape[0]} of {self.shape[1]}, {self.dtype}"),
            ("tokens", str(self.tokens)),
            ("texts cut", f"{self.cut}, to {longest} tokens" if self.cut else "none"),
            ("texts/s", f"{made / seconds:.1f}, loading included"),
        ]
        return rows + ([("from an earlier run", f"{self.earlier} texts")] if self.earlier else [])


def embed_file(
    embedder: Embedder,
    source: str | Path,
    out: str | Path,
    options: Options = Options(),
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Done:
    """Embed every text of a .txt (one a line), .jsonl or .parquet file into `out`.

    .npy holds the vectors [n, D], .parquet the texts beside them. A run that was killed goes on after its finished
    shards when it is started again. Every text is looked at before the first is embedded: raises BadParameter naming
    an empty one or one that is none, FolderExists, FolderBusy.
    """
    source, out = Path(source), Path(out)
    if out.suffix not in KINDS:
        raise BadParameter(f"{out} must end in {' or '.join(KINDS)}")
    if out.exists() and not overwrite:
        raise FolderExists(f"{out} is already there; choose another name or give --overwrite")
    if options.precision not in PRECISIONS:
        raise BadParameter(f"precision must be one of {', '.join(PRECISIONS)}, got {options.precision!r}")
    embedder.finish(torch.empty(0, embedder.dimension), False, options.dimensions)
    prompt = embedder.prompt(options.prompt_name, options.prompt)
    count = sum(1 for _ in open_texts(source, options.field))
    if not count:
        raise BadParameter(f"{source} holds no text")
    with _Work(out, _key(embedder, source, options, prompt)) as work:
        _embed(embedder, work, open_texts(source, options.field), count, prompt, progress)
        return _assemble(embedder, work, open_texts(source, options.field), options)


def _embed(embedder: Embedder, work: _Work, texts: Iterator[str], count: int, prompt: str, progress: bool) -> None:
    """The shards that are not there yet."""
    with tqdm(total=count, initial=work.texts, desc="embedding", unit="text", disable=not progress) as bar:
        for _ in islice(texts, work.texts):
            pass  # embedded by an earlier run
        while shard := list(islice(texts, SHARD)):
            made = embedder.embed(shard, prompt=prompt, advance=bar.update)
            cut = sum(1 for lost in made.cut if lost)
            work.add(made.vectors.numpy(), {"texts": len(shard), "tokens": sum(made.tokens), "cut": cut})


def _assemble(embedder: Embedder, work: _Work, texts: Iterator[str], options: Options) -> Done:
    """The file that was asked for, out of the shards."""

    def finished(shard: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return embedder.finish(torch.from_numpy(shard), options.normalize, options.dimensions).numpy()

    ranges = None
    if options.precision in ("int8", "uint8"):
        each = np.stack([ranges_of(finished(shard)) for shard in work.shards()])
        ranges = np.stack([each[:, 0].min(axis=0), each[:, 1].max(axis=0)])
    vectors = (quantize(finished(shard), options.precision, ranges) for shard in work.shards())
    first = quantize(finished(work.shard(0)[:1]), options.precision, ranges)
    shape, total = (work.texts, first.shape[1]), work.total
    with disk_errors(work.out):
        draft = work.path / work.out.name
        if work.out.suffix == ".npy":
            _write_npy(draft, shape, first.dtype, vectors)
        else:
            _write_parquet(draft, texts, vectors, first.dtype)
        work.publish(draft)
    return Done(work.texts, total("tokens"), total("cut"), work.earlier, shape, str(first.dtype))


def _write_npy(
    path: Path, shape: tuple[int, int], dtype: np.dtype[Any], vectors: Iterator[np.ndarray[Any, Any]]
) -> None:
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in vectors:
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        os.fsync(file.fileno())


def _write_parquet(
    path: Path, texts: Iterator[str], vectors: Iterator[np.ndarray[Any, Any]], dtype: np.dtype[Any]
) -> None:
    """Columns text and embedding, a list of fixed size; a row group for each shard."""
    from .texts import pyarrow

    arrow, parquet = pyarrow()
    with contextlib.ExitStack() as stack:
        writer = None
        for part in vectors:
            flat = arrow.array(part.reshape(-1), type=arrow.from_numpy_dtype(dtype))
            columns = [list(islice(texts, len(part))), arrow.FixedSizeListArray.from_arrays(flat, part.shape[1])]
            table = arrow.table(dict(zip(("text", "embedding"), columns, strict=True)))
            writer = writer or stack.enter_context(parquet.ParquetWriter(path, table.schema))
            writer.write_table(table)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _key(embedder: Embedder, source: Path, options: Options, prompt: str) -> str:
    """What decides the vectors of the shards."""
    with open_folder(embedder.path) as folder:
        files = {name: file.sha256 for name, file in sorted(folder.manifest.files.items())}
    how = [asdict(embedder.embedding), str(embedder.model.dtype), prompt, options.field]
    parts = [__version__, files, how, file_sha256(source), source.suffix, SHARD]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Work:
    """OUT.partial: locked while it is open, kept until the output is whole. Raises FolderBusy, FolderExists."""

    def __init__(self, out: Path, key: str) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.partial")
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()) and not (self.path / "journal").is_file():
                raise FolderExists(f"{self.path} is there and pared did not make it; move it away")
            self._journal: IO[bytes] = (self.path / "journal").open("a+b", buffering=0)
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._journal.close()
                raise FolderBusy(f"another process is embedding into {out}; wait for it or stop it") from None
            self._lines = self._resume(key)
        self.earlier = self.texts

    @property
    def texts(self) -> int:
        return self.total("texts")

    def total(self, what: str) -> int:
        """The sum over finished shards."""
        return sum(line[what] for line in self._lines)

    def shard(self, i: int) -> np.ndarray[Any, Any]:
        return np.load(self._file(i), allow_pickle=False)

    def shards(self) -> Iterator[np.ndarray[Any, Any]]:
        return (self.shard(i) for i in range(len(self._lines)))

    def add(self, vectors: np.ndarray[Any, Any], line: dict[str, int]) -> None:
        """Make a shard durable, then say so."""
        content = io.BytesIO()
        np.save(content, vectors)
        with disk_errors(self.path):
            replace_file(self._file(len(self._lines)), content.getvalue())
            append_line(self._journal, json.dumps(line))
        self._lines.append(line)

    def publish(self, draft: Path) -> None:
        """Put the finished file in place and delete the work."""
        os.replace(draft, self.out)
        sync_folder(self.out.parent)
        shutil.rmtree(self.path)

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def _file(self, i: int) -> Path:
        return self.path / f"{i}.npy"

    def _resume(self, key: str) -> list[dict[str, int]]:
        """The shards that an earlier run with this key finished; a last line that a crash has torn is cut off."""
        self._journal.seek(0)
        content = self._journal.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines and lines[0] == {"key": key} and all(self._file(i).is_file() for i in range(len(lines) - 1)):
            self._journal.truncate(len(whole))
            return lines[1:]
        for stale in self.path.glob("*.npy"):
            stale.unlink()
        self._journal.truncate(0)
        append_line(self._journal, json.dumps({"key": key}))
        return []
