"""The texts of a file, one after the other: plain lines, JSON lines, or a column of a parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..embedding import why_not
from ..errors import BadParameter


def open_texts(path: Path, field: str) -> Iterator[str]:
    """Every text of a .txt, .jsonl or .parquet file, in order. field: its key in JSON lines, its column in parquet.

    Raises BadParameter naming the line or row that has no text, and for a file that cannot be read.
    """
    if path.suffix not in _READERS:
        raise BadParameter(f"{path} must end in one of {', '.join(_READERS)}")
    for i, text in enumerate(_READERS[path.suffix](path, field), 1):
        if text is None:
            raise BadParameter(f"{path}: row {i} has nothing under {field!r}; name the field of the texts")
        if reason := why_not(text):
            raise BadParameter(f"{path}: row {i} {reason}")
        yield text


def pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet. Raises BadParameter where they are not installed."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise BadParameter("parquet files need pyarrow; pip install pyarrow, or use .jsonl and .npy") from None
    return arrow, parquet


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as wrong:
        raise BadParameter(f"{path} cannot be read as UTF-8 text ({wrong}); give one text a line") from None


def _plain(path: Path, field: str) -> Iterator[str]:
    return _lines(path)


def _json_lines(path: Path, field: str) -> Iterator[Any]:
    for i, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
        except ValueError as wrong:
            raise BadParameter(f"{path}: line {i} is no JSON ({wrong})") from None
        yield row.get(field) if isinstance(row, dict) else None


def _parquet(path: Path, field: str) -> Iterator[Any]:
    arrow, parquet = pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise BadParameter(f"{path} has no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=[field]):
                yield from batch.column(0).to_pylist()
    except (OSError, arrow.ArrowException) as wrong:
        raise BadParameter(f"{path} cannot be read as parquet ({wrong})") from None


_READERS = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}
