"""What `pared doctor` and `pared inspect` know, as plain rows: the command line only prints them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import __version__
from .compact import Folder, TensorEntry, UnitEntry

FFN_BIASES = ("gate_bias", "up_bias", "down_bias")
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


# --- doctor ------------------------------------------------------------------------------------


def environment() -> list[tuple[str, str]]:
    """(what, what is there) for everything that decides which kernels run."""
    return [
        ("pared", f"{__version__} in {Path(__file__).resolve().parent}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in ("torch", "triton", "transformers", "numpy")),
        ("hf kernels", hf_kernels()),
        *_cpu(),
        ("gpu", _gpu()),
    ]


def kernel_paths() -> list[tuple[str, str, str, str]]:
    """(op, dtype, path, why) for every device and dtype that this machine can run."""
    import torch

    from .kernels.dispatch import describe

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        (f"{op} on {device}" if len(devices) > 1 else op, str(dtype).removeprefix("torch."), path, why)
        for device in devices
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for op, path, why in describe(device, dtype)
    ]


def hf_kernels() -> str:
    """Whether Hugging Face's `kernels` package is here, and whether transformers can live with it."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        return "absent: nothing to clash with"
    if Path(spec.origin).resolve().parent == Path(__file__).resolve().parent / "kernels":
        return f"CLASH: {spec.origin} is importable as `kernels`; remove its __init__.py"
    needs = importlib.metadata.requires("transformers") or []
    wanted = {need.partition(";")[0] for need in needs if re.match(r"kernels\b", need)}
    return f"{_version('kernels')} in {Path(spec.origin).parent}; transformers wants {', '.join(wanted) or 'any'}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _cpu() -> list[tuple[str, str]]:
    import torch

    from .kernels.dispatch import cpus
    from .kernels.native import library

    native = library.load()
    features = f"torch sees {torch.backends.cpu.get_cpu_capability()}"
    if native is not None:
        features += f"; native kernels run {', '.join(native.levels())}"
    return [
        ("cpu", f"{_cpu_name()}, {cpus()} usable, torch uses {torch.get_num_threads()} threads"),
        ("cpu features", features),
        ("native library", str(native.path) if native is not None else library.why_not()),
    ]


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return f"none usable (torch is built for {built})" if built else "none: torch is built for CPU alone"
    names = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in names)


# --- inspect -----------------------------------------------------------------------------------


@dataclass
class Kind:
    """All modules of one kind (`self_attn.q_proj`, ...): bytes as stored, and as dense weights of the same dtype.

    count: modules. groups: units, fewer where modules share one. form: factored or pivoted; ranks: rank -> units.
    weights: what the conversion found in them -> modules.
    """

    kind: str
    format: str
    form: str = ""
    count: int = 0
    groups: int = 0
    ranks: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    compact_bytes: int = 0
    dense_bytes: int = 0


@dataclass(frozen=True)
class FolderReport:
    """What a compact folder holds. disk_bytes: all its files, tokenizer included."""

    path: str
    family: str
    stock: bool
    kinds: list[Kind]
    disk_bytes: int
    provenance: dict[str, Any]
    sleep: Sleep | None = None

    @property
    def total(self) -> Kind:
        """The sum over all kinds."""
        compact, dense = (sum(getattr(kind, name) for kind in self.kinds) for name in ("compact_bytes", "dense_bytes"))
        count, groups = (sum(getattr(kind, name) for kind in self.kinds) for name in ("count", "groups"))
        return Kind("total", "", count=count, groups=groups, compact_bytes=compact, dense_bytes=dense)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"total": asdict(self.total)}


@dataclass(frozen=True)
class Sleep:
    """What a token leaves out of a model with routed FFNs, as its conversion found on windows of a text.

    layers: layer -> share of its groups. saved_bytes: of weights, for a token that is decoded alone.
    """

    text: str
    layers: dict[str, float]
    saved_bytes: int


def folder_report(folder: Folder) -> FolderReport:
    """Sizes and shapes of everything in an open compact folder, read from its manifest alone."""
    manifest, seen = folder.manifest, set(folder.manifest.plain)
    kinds: dict[tuple[str, str, str], Kind] = {}

    def add(kind: str, shape: list[int], compact: int, dense: int, format: str = "", form: str = "") -> Kind:
        row = kinds.setdefault((kind, format, form), Kind(kind, format, form))
        row.count += 1
        row.shapes[_times(shape)] = row.shapes.get(_times(shape), 0) + 1
        row.compact_bytes += compact
        row.dense_bytes += dense
        return row

    for unit in manifest.units:
        fresh = [name for name in unit.tensors.values() if name not in seen]
        seen.update(fresh)
        compact = sum(_bytes(manifest.tensors[name]) for name in fresh)
        kept = [manifest.tensors[name].dtype for role, name in unit.tensors.items() if role != "router"]
        item = max((ITEM_BYTES[dtype] for dtype in kept if "F" in dtype), default=0)  # indices are no weights
        form, rank = _form(folder, unit)
        for i, (path, shape) in enumerate(unit.modules.items()):
            stands_for = sum(map(math.prod, unit.covers.values())) or math.prod(shape)
            dense = stands_for * item + _bias_bytes(folder, unit.tensors, path) if fresh else 0
            kind = f"{_kind(path)} (tied)" if not fresh else _kind(path)
            row = add(kind, list(shape), compact if i == 0 else 0, dense, unit.format, form)
            row.groups += i == 0
            if unit.why:
                row.weights[unit.why] = row.weights.get(unit.why, 0) + 1
        if rank:
            row.ranks[str(rank)] = row.ranks.get(str(rank), 0) + 1
    for name in manifest.plain:
        size = _bytes(manifest.tensors[name])
        add(_kind(name.rpartition(".")[0]), list(manifest.tensors[name].shape), size, size)
    disk = sum(file.stat().st_size for file in folder.path.iterdir() if file.is_file())
    family = str(folder.config.get("model_type"))
    told = (manifest.provenance, _sleep(folder))
    return FolderReport(str(folder.path), family, folder.stock, list(kinds.values()), disk, *told)


def _sleep(folder: Folder) -> Sleep | None:
    """None where FFNs are not routed, or nobody has said how often they sleep."""
    routed = [unit for unit in folder.manifest.units if "router" in unit.tensors]
    sizes = {_layer(next(iter(u.modules))): _bytes(folder.manifest.tensors[u.tensors["groups"]]) for u in routed}
    for method in folder.manifest.provenance.get("methods", ()):
        if method["name"] == "lte" and routed:
            shares = {_layer(path): share for path, share in method["result"]["layers"].items()}
            saved = sum(share * sizes[layer] for layer, share in shares.items())
            return Sleep(method["calibration"]["name"], shares, round(saved))
    return None


def _layer(path: str) -> str:
    """The number of the layer in a module path, "" where there is none."""
    found = re.search(r"\.(\d+)\.", path)
    return found.group(1) if found else ""


def _form(folder: Folder, unit: UnitEntry) -> tuple[str, int]:
    """How a unit over a basis stores it, and its rank; the groups of a routed FFN, and 0; ("", 0) for any other."""
    if "router" in unit.tensors:
        router, all_bytes = (
            sum(_bytes(folder.manifest.tensors[unit.tensors[role]]) for role in roles)
            for roles in (["router"], unit.tensors)
        )
        groups, _ = folder.manifest.tensors[unit.tensors["router"]].shape
        return f"{groups} groups of {unit.params['group_size']}, router {100 * router / all_bytes:.1f} % of bytes", 0
    if "basis" not in unit.tensors:
        return "", 0
    rank = folder.manifest.tensors[unit.tensors["basis"]].shape[0]
    return "pivoted" if "pivots" in unit.tensors else "factored", rank


def _kind(path: str) -> str:
    """The module path without what differs from block to block: model.layers.3.mlp.up_proj -> mlp.up_proj."""
    return re.sub(r"^.*\.\d+\.", "", path).removeprefix("model.")


def _times(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _bytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * ITEM_BYTES[entry.dtype]


def _bias_bytes(folder: Folder, tensors: dict[str, str], path: str) -> int:
    names = [name for role, name in tensors.items() if role in ("bias", f"bias.{path}", *FFN_BIASES)]
    return sum(_bytes(folder.manifest.tensors[name]) for name in names)


# --- both --------------------------------------------------------------------------------------


def readable(count: int) -> str:
    """Bytes for people: 269.1 MB."""
    value, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 1000 and (larger := next(units, None)):
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
