"""From a checkpoint to a compact folder, and back: read, pack, load, measure, and only then publish."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import __version__, families
from .compact import CONFIG, Folder, UnitEntry, file_sha256, open_folder
from .compact_writer import FolderWriter
from .converters.pack import pack
from .converters.removal import drop_zeros
from .converters.sources.detect import open_source
from .converters.sources.source import Source
from .converters.widths import Cut, cuts, stock_spec, within
from .durable import replace_file
from .errors import BadParameter, FolderError, FolderExists
from .evaluate import Report, Row, measure
from .kernels import dense, formats
from .kernels.unit import Packed
from .spec import WIDTHS, Spec

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
SHARD_BYTES = 5_000_000_000


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    methods: Sequence[str] = (),
    format: str | None = None,
    dtype: torch.dtype | str | None = None,
    calibration: str | Path | None = None,
    text: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    max_shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Convert a Hugging Face folder or a GGUF file into the compact folder `dst`, and measure it.

    Without a method nothing is lost: every weight keeps its bits, unless `dtype` (bf16, fp16, fp32) casts it.
    methods: `name:key=value,...` each, in order; they compute in fp32 on what `calibration`, a text file, makes the
    model see. format: storage of every linear in the layers; default is the smallest that fits. Heads and neurons that
    are zero are left out, exactly, unless it is dense. text: a file whose perplexity the report gives. Where anything
    is compressed the report has a row for the original too: the same weights, dense, in the same dtype. `dst` appears
    only when it is whole and has been loaded; an interrupted conversion resumes. Raises SourceError and FolderError
    with what to do next.
    """
    _refuse_unknown(format)
    cast = _dtype(dtype)
    recipe = _Recipe.read(methods, calibration)
    measured = None if text is None else _text(Path(text))
    source = open_source(src)
    _refuse_same(Path(src), Path(dst))
    key = _key(source.fingerprint, str(cast), format, max_shard_bytes, *methods, recipe.text, recipe.files)
    with FolderWriter(dst, resume_key=key, overwrite=overwrite, max_shard_bytes=max_shard_bytes) as writer:
        before = [_original(source, writer, cast, measured, progress)] if methods else []
        packed, dtype, done = recipe.run(source, cast, writer, progress)
        packed = packed if format == dense.NAME else drop_zeros(packed)
        pack(packed, writer, dtype, format, progress)
        partial = writer.finish(_config(packed, cast), _provenance(source, cast, done), packed.files)
        if not before and not _stock(partial):
            before = [_original(source, writer, cast, measured, progress)]
        row = replace(measure(partial, measured, progress=progress), name=Path(dst).name)
        writer.record({"measured": asdict(row)} | ({"original": asdict(before[0])} if before else {}))
        writer.publish()
    return Report((*before, row))


@dataclass(frozen=True)
class _Recipe:
    """The methods of a conversion, and the calibration text that they read. files: digests of what else they read."""

    steps: Sequence[Any] = ()
    text: str = ""
    name: str = ""
    files: tuple[str, ...] = ()

    @classmethod
    def read(cls, methods: Sequence[str], calibration: str | Path | None) -> _Recipe:
        if not methods:
            if calibration is not None:
                raise BadParameter("calibration is what methods read, and none is given; text is what is measured")
            return cls()
        from .converters.recipe import parse  # brings transformers, which a plain conversion does without

        steps = parse(methods)
        readers = [step.method.NAME for step in steps if step.reads == "text"]
        if readers and calibration is None:
            raise BadParameter(f"{readers[0]} reads a text; give --calibration FILE")
        if not readers and calibration is not None:
            raise BadParameter("no method of this recipe reads a calibration text; leave --calibration out")
        files = tuple(_digest(file) for step in steps for file in step.files)
        if calibration is None:
            return cls(steps, files=files)
        return cls(steps, _text(Path(calibration)), Path(calibration).name, files)

    def run(
        self, source: Source, cast: torch.dtype | None, writer: FolderWriter, progress: bool
    ) -> tuple[Source, torch.dtype | None, list[dict[str, Any]]]:
        """What to pack, in which dtype, and what was done."""
        if not self.steps:
            return source, cast, []
        from .converters.compress import compress

        packed, stored, done = compress(source, self.steps, self.text, self.name, writer.work, progress)
        return packed, cast or stored, done


def _original(source: Source, writer: FolderWriter, cast: torch.dtype | None, text: str | None, progress: bool) -> Row:
    """The same weights, dense, in the same dtype: packed beside the work, measured once, and deleted."""
    place = writer.work("original")
    known = place / "row.json"
    if known.exists():
        return Row(**json.loads(known.read_text()))
    with FolderWriter(place / "dense", resume_key=source.fingerprint) as dense_writer:
        pack(source, dense_writer, cast, dense.NAME, progress)
        folder = dense_writer.finish(_config(source, cast), {}, source.files)
        row = replace(measure(folder, text, progress=progress), name="original")
    replace_file(known, json.dumps(asdict(row)).encode())
    shutil.rmtree(dense_writer.partial)
    return row


def _stock(path: Path) -> bool:
    with open_folder(path) as folder:
        return folder.stock


def export(path: str | Path, out: str | Path, *, progress: bool = True, max_shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a compact folder's model as an ordinary dense Hugging Face folder, for other engines. Returns `out`.

    What was packed without loss comes back bit for bit. Where layers have fewer heads or neurons than others, zeros
    stand in for what they lack.
    """
    if Path(out).exists():
        raise FolderExists(f"{out} is already there, and an export replaces nothing; choose another name")
    with open_folder(path) as folder:
        digest = _key(*(file.sha256 for file in folder.manifest.files.values()), max_shard_bytes)
        with FolderWriter(out, resume_key=digest, max_shard_bytes=max_shard_bytes) as writer:
            _export_tensors(folder, writer, progress)
            files = {name: folder.path / name for name in folder.manifest.files if not _holds_weights(name)}
            config = {key: value for key, value in folder.config.items() if key != WIDTHS}
            writer.finish(config, {}, files, manifest=False)
            return writer.publish()


def _export_tensors(folder: Folder, writer: FolderWriter, progress: bool) -> None:
    spec = families.read(folder.config)
    linears, lost = spec.linears(), _lost(folder, spec)
    if routed := [path for unit in folder.manifest.units if unit.covers for path in unit.modules]:
        raise FolderError(
            f"{folder.path} routes its FFNs ({routed[0]} and {len(routed) - 1} more): which neurons count differs from "
            "token to token, and no dense checkpoint says so; load it with pared or through pared.hf"
        )
    own = [unit for unit in folder.manifest.units if linears.keys() >= unit.modules.keys()]  # a tied head is no tensor
    for name in folder.manifest.plain:
        if not writer.holds(name):
            writer.add_plain(name, folder.tensor(name))
    for unit in tqdm(own, "exporting", unit="unit", disable=not progress):
        tensors = {role: folder.tensor(name) for role, name in unit.tensors.items()}
        packed = Packed(unit.format, unit.version, unit.modules, tensors, unit.params)
        for path, shape in unit.modules.items():
            if not writer.holds(path):
                weights = _dense(packed, path, linears[path].transposed)
                if path in lost:
                    weights = {role: lost[path].pad(t, linears[path].transposed) for role, t in weights.items()}
                names = {role: f"{path}.{role}" for role in weights}
                entry = UnitEntry(dense.NAME, dense.VERSION, {path: shape}, names)
                writer.add_unit(entry, {names[role]: tensor for role, tensor in weights.items()})


def _lost(folder: Folder, spec: Spec) -> dict[str, Cut]:
    """What each module lacks of the width that the config gives to all layers."""
    stock = stock_spec(folder.config)
    places = within(spec, stock.layers[0])
    return {path: cut for i, kept in enumerate(places) for path, cut in cuts(stock, i, kept).items()}


def _dense(packed: Packed, path: str, transposed: bool) -> dict[str, torch.Tensor]:
    """The tensors of one module as a stock checkpoint has them, in the dtype that the folder stores."""
    weight = formats.by_name(packed.format).weight(packed, path)
    bias = packed.tensors.get("bias", packed.tensors.get(f"bias.{path}"))
    return {"weight": weight.t() if transposed else weight} | ({} if bias is None else {"bias": bias})


def _holds_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json")) or name == CONFIG


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise BadParameter(f"dtype must be bf16, fp16 or fp32, got {dtype!r}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as wrong:
        raise BadParameter(f"the text {path} cannot be read ({wrong})") from None


def _refuse_unknown(format: str | None) -> None:
    known = [module.NAME for module in formats.FORMATS]
    if format is not None and format not in known:
        raise BadParameter(f"no format is called {format!r}; known are {', '.join(known)}")


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as wrong:
        raise BadParameter(f"a method reads {path}, which cannot be read ({wrong.strerror})") from None


def _refuse_same(src: Path, dst: Path) -> None:
    if dst.resolve() == src.resolve():
        raise FolderExists(f"{src} is both source and target; choose another target")


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([__version__, *parts]).encode()).hexdigest()


def _config(source: Source, cast: torch.dtype | None) -> dict[str, Any]:
    """The source's config, with the dtype that its weights now have."""
    if cast is None:
        return source.config
    keys = [key for key in ("dtype", "torch_dtype") if key in source.config] or ["dtype"]
    return source.config | dict.fromkeys(keys, str(cast).removeprefix("torch."))


def _provenance(source: Source, cast: torch.dtype | None, methods: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "source": {"name": source.path.resolve().name, "kind": source.kind, "fingerprint": source.fingerprint},
        "cast": None if cast is None else str(cast).removeprefix("torch."),
        "methods": methods,
    }
