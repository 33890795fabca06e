"""Tiny models whose FFNs are routed: as a compact folder, and as a transformers model that masks its hidden values."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from pared import families
from pared.compact import UnitEntry, open_folder
from pared.compact_writer import FolderWriter
from pared.convert import convert
from pared.kernels import formats, routed_ffn
from pared.kernels.unit import Packed, Unit

SIZE = 8


def write(model: hf.PreTrainedModel, work: Path, tau: float = 0.5, dtype: str | None = None) -> Path:
    """A compact folder of `model` whose every FFN is routed by random routers; work: a folder for it."""
    model.save_pretrained(work / "hf")
    convert(work / "hf", work / "dense", progress=False, format="dense", dtype=dtype)
    with open_folder(work / "dense") as folder, FolderWriter(work / "routed", resume_key="r") as writer:
        spec = families.read(folder.config)
        ffns = spec.ffns()
        inside = {path for linears in ffns.values() for path in linears}
        units = {next(iter(unit.modules)): unit for unit in folder.manifest.units}
        for name in folder.manifest.plain:
            writer.add_plain(name, folder.tensor(name))
        for path, entry in units.items():
            if path not in inside:
                names = {} if path == spec.names.head and spec.tied else entry.tensors
                writer.add_unit(entry, {name: folder.tensor(name) for name in names.values()})
        for path, linears in ffns.items():
            given = {linear: _decoded(folder, units[linear]) for linear in linears}
            packed = routed_ffn.encode(unit_of(spec, path, given, tau))
            names = {role: f"{path}.{role}" for role in packed.tensors}
            covers = {linear: (one.n, one.k) for linear, one in linears.items()}
            entry = UnitEntry(packed.format, packed.version, packed.modules, names, packed.params, "", covers)
            writer.add_unit(entry, {names[role]: tensor for role, tensor in packed.tensors.items()})
        writer.finish(folder.config, {"source": {"name": "random"}, "methods": []}, {})
        return writer.publish()


def serving_folder(checkpoint: Path, work: Path) -> Path:
    """A routed folder of a checkpoint, with its tokenizer, so that it can be served."""
    folder = write(hf.AutoModelForCausalLM.from_pretrained(checkpoint), work)
    hf.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def _decoded(folder, entry: UnitEntry) -> dict[str, torch.Tensor]:
    tensors = {role: folder.tensor(name) for role, name in entry.tensors.items()}
    module = formats.by_name(entry.format)
    return module.decode(Packed(entry.format, entry.version, entry.modules, tensors, entry.params)).tensors


def unit_of(spec, path: str, linears: dict[str, dict[str, torch.Tensor]], tau: float) -> Unit:
    """The FFN of these linears with a router of its own."""
    *ins, down = linears.values()
    tensors: dict[str, torch.Tensor] = {}
    for part in ("weight", "bias"):
        rows = [
            tensor for one in ins if part in one for tensor in one[part].chunk(2 if len(ins) < spec.gated + 1 else 1)
        ]
        roles = ("gate", "up")[2 - len(rows) :] if rows else ()
        tensors |= {role if part == "weight" else f"{role}_bias": row for role, row in zip(roles, rows, strict=True)}
    tensors["down"] = down["weight"]
    if "bias" in down:
        tensors["down_bias"] = down["bias"]
    neurons, inputs = tensors["up"].shape
    generator = torch.Generator().manual_seed(sum(map(ord, path)))
    tensors["router"] = torch.randn(neurons // SIZE, inputs, generator=generator)
    params = {"group_size": SIZE, "tau": tau, "activation": spec.act}
    return Unit({path: (inputs, inputs)}, {role: tensor.contiguous() for role, tensor in tensors.items()}, params)


def masked(model: hf.PreTrainedModel, folder: Path) -> hf.PreTrainedModel:
    """`model` with hooks that silence the neurons of sleeping groups, as the folder's routers say."""
    with open_folder(folder) as opened:
        spec = families.read(opened.config)
        units = {next(iter(unit.modules)): unit for unit in opened.manifest.units}
        for path, linears in spec.ffns().items():
            router = opened.tensor(units[path].tensors["router"])
            limit = routed_ffn.threshold(units[path].params["tau"])
            names = [linear.removeprefix(f"{model.base_model_prefix}.") for linear in linears]
            _hook(*(model.base_model.get_submodule(names[i]) for i in (0, -1)), router, limit)
    return model


def _hook(first: torch.nn.Module, last: torch.nn.Module, router: torch.Tensor, limit: float) -> None:
    seen: list[torch.Tensor] = []

    def look(module: torch.nn.Module, args: tuple) -> None:
        seen[:] = [routed_ffn.decide(args[0].reshape(-1, args[0].shape[-1]), router, limit)]

    def silence(module: torch.nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        return (hidden.where(seen[0].repeat_interleave(SIZE, dim=1).view(hidden.shape), 0),)

    first.register_forward_pre_hook(look)
    last.register_forward_pre_hook(silence)
