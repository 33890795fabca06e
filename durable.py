"""Files that are whole or not there: safetensors and small files, forced to the disk before anyone counts on them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch

from .compact import FileEntry, TensorEntry
from .errors import DiskFull, FolderError

_ALIGN = 64  # bytes; tensors begin at a cache line of the mapping
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def entry(tensor: torch.Tensor) -> TensorEntry:
    """How the manifest describes a tensor."""
    return TensorEntry(DTYPES[tensor.dtype], tuple(tensor.shape))


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """Write tensors as one safetensors file, hashing on the way: nothing is held twice or read back."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # keeps each aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    parts = chain([memoryview(len(text).to_bytes(8, "little") + text)], (_bytes(tensor) for _, tensor in ordered))
    try:
        return FileEntry(8 + len(text) + end, _write_hashed(path, parts))
    except OSError:
        path.unlink(missing_ok=True)  # half a shard only takes room on a full disk
        raise


def _write_hashed(path: Path, parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in parts:
            digest.update(part)
            _write_all(file, part)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The elements as they lie in memory, row-major; a copy only if the tensor is strided or not on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not len(flat):  # it may have strides of which torch makes no view
        flat = flat.new_empty(0)
    return flat.view(torch.uint8).numpy().data


def _write_all(file: IO[bytes], data: memoryview) -> None:
    """One unbuffered write takes at most 2 GiB and may take less."""
    while data:
        data = data[file.write(data) :]


def append_line(file: IO[bytes], line: str) -> None:
    """Add a line to an unbuffered file; what a full disk refuses is not tried again when the file is closed."""
    _write_all(file, memoryview(f"{line}\n".encode()))
    os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> FileEntry:
    """Write a small file under another name, then rename it."""
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("wb", buffering=0) as file:
        _write_all(file, memoryview(content))
        os.fsync(file.fileno())
    os.replace(draft, path)
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says into our errors."""
    try:
        yield
    except OSError as wrong:
        if wrong.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left for {path}; free some and run the same command: it resumes") from None
        raise FolderError(f"{path} cannot be written ({wrong.strerror})") from wrong
