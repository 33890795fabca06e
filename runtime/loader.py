"""From a compact folder to a `Decoder`, with a full account: nothing missing, nothing left over, no wrong shape.

The manifest says which unit serves which modules. Units that read the same input (q, k and v; gate and
up) are stacked where their format can, and each distinct set is prepared once, so that a basis shared
by several layers stays one tensor in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import families
from ..compact import Folder, UnitEntry, open_folder
from ..errors import BadParameter, MissingTensors, UnknownVersion, WrongShape
from ..kernels import formats, int8, routed_ffn
from ..kernels.unit import FP32_ROLES, Packed, Prepared, Unit
from ..spec import Spec
from .model import Block, Decoder, Ffn, Norm, Projection, RoutedFfn, Weights

Shape = tuple[int, ...]


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    int8_head: bool = False,
    head: bool = True,
) -> Decoder:
    """Load a compact folder for running.

    device: default is the GPU if there is one, else the CPU. dtype: of weights and activations; default
    is what the folder holds. int8_head: read the head as 8-bit integers, half the bytes of bf16 at a small loss.
    head: without it the decoder gives states but no logits.
    Raises the FolderError that names what is wrong with the folder.
    """
    target = pick_device(device)
    with open_folder(path) as folder:
        spec = check(folder)
        return Decoder(spec, _Loading(folder, spec, target, dtype, int8_head, head).weights())


def check(folder: Folder) -> Spec:
    """Hold an open folder against its model, and every unit against what it promises. Returns the model's spec.

    Raises MissingTensors, WrongShape, UnknownVersion, or UnsupportedModel.
    """
    spec = families.read(folder.config)
    _account(folder, spec)
    for entry in folder.manifest.units:
        _check_unit(folder, entry)
    return spec


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; by default the GPU if there is one. Raises BadParameter when torch cannot use it."""
    try:
        picked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise BadParameter(f"no device is called {device!r}; give cpu, or cuda with a GPU") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise BadParameter(f"device {device} is not usable, torch sees {torch.cuda.device_count()} GPUs; try cpu")
    return picked


def _account(folder: Folder, spec: Spec) -> None:
    """Hold the manifest against the model: every linear served once in its shape, every plain tensor there."""
    linears = spec.linears()
    wanted = {path: (linear.n, linear.k) for path, linear in linears.items()}
    if spec.tied:
        wanted[spec.names.head] = (spec.vocab, spec.embed_dim)
    served: dict[str, tuple[int, int]] = {}
    for entry in folder.manifest.units:
        _check_format(folder.path, entry)
        if entry.covers:
            _check_ffn(folder.path, entry, spec)
        for module, shape in entry.linears.items():
            if module in served:
                raise WrongShape(f"{folder.path}: module {module} is served by two units of the manifest")
            served[module] = shape
            if not entry.covers and entry.has_bias(module) != (module in linears and linears[module].bias):
                state = "has a bias, which this model does not have" if entry.has_bias(module) else "lacks its bias"
                raise WrongShape(f"{folder.path}: {module} {state}")
    _compare(folder.path, "module", wanted, served)
    _compare(folder.path, "tensor", spec.plain(), folder.manifest.plain_shapes)


def _check_ffn(path: Path, entry: UnitEntry, spec: Spec) -> None:
    """A unit in place of several linears is a routed FFN of this model: its linears, its activation, its biases."""
    (module,) = entry.modules or ("no module",)
    own = spec.ffns().get(module, {})
    if entry.format != routed_ffn.NAME or entry.covers != {name: (linear.n, linear.k) for name, linear in own.items()}:
        raise WrongShape(
            f"{path}: {module}, stored as {entry.format}, stands for linears that are no FFN of this model"
        )
    wanted = {"gate"} if spec.gated else set()
    biases = {"up_bias"} | {f"{role}_bias" for role in wanted} if spec.ffn_in_bias else set()
    biases |= {"down_bias"} if spec.ffn_out_bias else set()
    found = entry.tensors.keys() & set(routed_ffn.BIASES)
    if found != biases or entry.params.get("activation") != spec.act:
        raise WrongShape(
            f"{path}: {module} has biases {sorted(found)} and the activation {entry.params.get('activation')!r}, "
            f"this model {sorted(biases)} and {spec.act!r}"
        )


def _check_format(path: Path, entry: UnitEntry) -> None:
    newest = {module.NAME: module.VERSION for module in formats.FORMATS}
    if entry.version > newest.get(entry.format, 0):
        known = ", ".join(f"{name} {version}" for name, version in newest.items())
        raise UnknownVersion(
            f"{path}: {next(iter(entry.modules))} is stored as {entry.format} version {entry.version}, this pared reads"
            f" {known}; install a newer pared"
        )


def _check_unit(folder: Folder, entry: UnitEntry) -> None:
    stored = {role: folder.tensor(name) for role, name in entry.tensors.items()}
    module = formats.by_name(entry.format)
    try:
        reason = module.fits(module.decode(Packed(entry.format, entry.version, entry.modules, stored, entry.params)))
    except KeyError as missing:
        reason = f"it has no {missing}"
    if reason:
        raise WrongShape(f"{folder.path}: {next(iter(entry.modules))} is no whole {entry.format} unit: {reason}")


def _compare(path: Path, kind: str, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise MissingTensors(f"{path}: the manifest lacks {kind} {missing[0]}" + _and_more(missing))
    for name, shape in found.items():
        if name not in wanted:
            raise WrongShape(f"{path}: the manifest has {kind} {name}, which this model does not have")
        if tuple(shape) != tuple(wanted[name]):
            raise WrongShape(f"{path}: {kind} {name} is {list(shape)}, the config says {list(wanted[name])}")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


@dataclass
class _Loading:
    """The state of one load: tensors already on the device, sets of units already prepared."""

    folder: Folder
    spec: Spec
    device: torch.device
    dtype: torch.dtype | None
    int8_head: bool = False
    head: bool = True
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _prepared: dict[str, Prepared] = field(default_factory=dict)
    _units: dict[str, UnitEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._units = {module: entry for entry in self.folder.manifest.units for module in entry.modules}

    def weights(self) -> Weights:
        spec, names = self.spec, self.spec.names
        embed = self._tensor(f"{names.embed}.weight")
        return Weights(
            embed=embed,
            positions=self._tensor(f"{names.positions}.weight") if names.positions else None,
            project_in=self._projection([names.project_in]) if spec.projected else None,
            blocks=tuple(self._block(i) for i in range(len(spec.layers))),
            final_norm=self._norm(names.final_norm, spec.hidden) if spec.final_norm else None,
            project_out=self._projection([names.project_out]) if spec.projected else None,
            head=self._head(names.head) if self.head else None,
        )

    def _block(self, i: int) -> Block:
        spec, names = self.spec, self.spec.names

        def paths(*modules: str) -> list[str]:
            return [spec.path(i, module) for module in modules]

        def norm(name: str, width: int) -> Norm:
            return self._norm(spec.path(i, name), width)

        return Block(
            layer=spec.layers[i],
            attn_norm=norm(names.attn_norm, spec.hidden),
            qkv=self._projection(paths(*names.qkv)),
            out=self._projection(paths(names.out)),
            ffn_norm=norm(names.ffn_norm, spec.hidden),
            ffn=self._ffn(i),
            q_norm=norm(names.q_norm, spec.head_dim) if spec.qk_norm else None,
            k_norm=norm(names.k_norm, spec.head_dim) if spec.qk_norm else None,
        )

    def _ffn(self, i: int) -> Ffn | RoutedFfn:
        spec, names = self.spec, self.spec.names
        whole = spec.path(i, names.ffn)
        if whole in self._units:
            return RoutedFfn(self._prepare(whole), whole)
        ins = self._projection([spec.path(i, name) for name in names.ffn_in])
        return Ffn(ins, self._projection([spec.path(i, names.ffn_out)]), spec.act, spec.gated)

    def _projection(self, paths: list[str]) -> Projection:
        """Stack the units behind these modules if their format can; else run them one after the other."""
        parts = [(self._prepare(path), path) for path in paths]
        if len(parts) > 1 and len({prepared.format for prepared, _ in parts}) == 1:
            stacked = formats.by_name(parts[0][0].format).stack(parts)
            if stacked:
                return Projection(((stacked, paths[0]),))
        return Projection(tuple(parts))

    def _head(self, path: str) -> Projection:
        return self._int8(path) if self.int8_head else self._projection([path])

    def _int8(self, path: str) -> Projection:
        """A module as rows of 8-bit integers, whatever the folder holds it as."""
        packed = self._packed(self._units[path])
        tensors = {"weight": formats.by_name(packed.format).weight(packed, path)}
        if "bias" in packed.tensors:
            tensors["bias"] = packed.tensors["bias"]
        rows = int8.quantize(Unit({path: packed.modules[path]}, tensors))
        return Projection(((int8.prepare(int8.encode(rows), self.device), path),))

    def _prepare(self, path: str) -> Prepared:
        """The unit that serves this module, laid out for the device; kept only while other layers will ask for it."""
        entry = self._units[path]
        key = next(iter(entry.modules))
        if key in self._prepared:
            return self._prepared[key]
        prepared = formats.by_name(entry.format).prepare(self._packed(entry), self.device)
        if len(entry.modules) > 1:
            self._prepared[key] = prepared
        return prepared

    def _packed(self, entry: UnitEntry) -> Packed:
        tensors = {role: self._tensor(name, role in FP32_ROLES) for role, name in entry.tensors.items()}
        return Packed(entry.format, entry.version, entry.modules, tensors, entry.params)

    def _tensor(self, name: str, keep_dtype: bool = False) -> torch.Tensor:
        """A tensor of the folder on the device; kept only where a second user is known (the tied embedding)."""
        if name in self._tensors:
            return self._tensors[name]
        found = self.folder.tensor(name)
        if found.is_floating_point() and not keep_dtype:
            found = found.to(self.dtype or found.dtype)
        found = found.to(self.device)
        if name in self.folder.manifest.plain:
            self._tensors[name] = found
        return found

    def _norm(self, path: str, width: int) -> Norm:
        def parameter(part: str, absent: float) -> torch.Tensor:
            if f"{path}.{part}" in self.folder.manifest.plain:
                return self.folder.tensor(f"{path}.{part}").to(self.device, torch.float32)
            return torch.full((width,), absent, dtype=torch.float32, device=self.device)

        return Norm(self.spec.norm, self.spec.norm_eps, parameter("weight", 1.0), parameter("bias", 0.0))
