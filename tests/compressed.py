"""Tiny models whose linears are factored, three ways from one set of units: as a compact folder written by the real
writer, as a transformers model that multiplies by two plain matrices, and as the published layouts of the methods."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from pared import families
from pared.compact import UnitEntry
from pared.compact_writer import FolderWriter
from pared.kernels import shared_basis
from pared.kernels.unit import Unit
from pared.spec import Spec
from pared.tests import tiny

Groups = dict[str, tuple[list[list[int]], int]]  # kind -> (groups of layers, rank)
LLAMA: Groups = {
    "q": ([[0, 1]], 9),
    "k": ([[0], [1]], 5),
    "v": ([[0], [1]], 5),
    "o": ([[0], [1]], 7),
    "gate": ([[0, 1]], 11),
    "up": ([[0, 1]], 10),
    "down": ([[0], [1]], 8),
}
OPT: Groups = {kind: ([[0, 1]], 9) for kind in ("q", "k", "v")} | {
    "o": ([[0], [1]], 7),
    "up": ([[0, 1]], 10),
    "down": ([[0], [1]], 8),
}
GPT2: Groups = {"attn": ([[0, 1]], 12), "o": ([[0, 1]], 7), "up": ([[0, 1]], 11), "down": ([[0], [1]], 8)}
MODULES = {
    "llama": {
        **{kind: f"self_attn.{kind}_proj" for kind in "qkvo"},
        **{kind: f"mlp.{kind}_proj" for kind in ("gate", "up", "down")},
    },
    "opt": {
        **{kind: f"self_attn.{kind}_proj" for kind in "qkv"},
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
    "phi3": {"attn": "self_attn.qkv_proj", "o": "self_attn.o_proj", "up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
    "gpt2": {"attn": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
}


class TwoLinears(nn.Module):
    """y = C (B x) + bias, in the plainest way."""

    def __init__(self, unit: Unit, path: str) -> None:
        super().__init__()
        self.unit, self.path = unit, path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self.unit.tensors
        y = x @ t["basis"].t() @ t[f"coefficients.{self.path}"].t()
        return y + t[f"bias.{self.path}"] if f"bias.{self.path}" in t else y


def spec_of(model: hf.PreTrainedModel) -> Spec:
    return families.read(json.loads(model.config.to_json_string()))


def units(model: hf.PreTrainedModel, groups: Groups) -> dict[tuple[str, ...], Unit]:
    """Random units in the places that `groups` names, with the model's own biases; large enough to matter."""
    spec, generator = spec_of(model), torch.Generator().manual_seed(3)
    linears, state, kinds = spec.linears(), tiny.state(model), MODULES[_layout(spec)]
    made = {}
    for kind, (layers, rank) in groups.items():
        for group in layers:
            paths = [spec.path(i, kinds[kind]) for i in group]
            k = linears[paths[0]].k
            tensors = {"basis": torch.randn(rank, k, generator=generator) * k**-0.5}
            for path in paths:
                tensors[f"coefficients.{path}"] = torch.randn(linears[path].n, rank, generator=generator) * rank**-0.5
                if linears[path].bias:
                    tensors[f"bias.{path}"] = state[f"{path}.bias"].clone()
            made[tuple(paths)] = Unit({p: (linears[p].n, k) for p in paths}, tensors)
    return made


def _layout(spec: Spec) -> str:
    return spec.family if spec.family in MODULES else "llama"


def plain_model(model: hf.PreTrainedModel, made: dict[tuple[str, ...], Unit]) -> hf.PreTrainedModel:
    """The model with `TwoLinears` in the places of the units."""
    model = copy.deepcopy(model).eval()
    for paths, unit in made.items():
        for path in paths:
            model.set_submodule(path, TwoLinears(unit, path))
    return model


def write(target: Path, model: hf.PreTrainedModel, made: list[Unit], **options: object) -> Path:
    """A compact folder of these units, factored or pivoted as they are; everything else dense."""
    spec, state = spec_of(model), tiny.state(model)
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    served = {path for unit in made for path in unit.modules}
    with FolderWriter(target, resume_key="", **options) as writer:
        for name in spec.plain():
            writer.add_plain(name, state[name])
        if spec.tied:
            shape = {spec.names.head: (spec.vocab, spec.embed_dim)}
            writer.add_unit(UnitEntry("dense", 1, shape, {"weight": f"{spec.names.embed}.weight"}), {})
        for linear in spec.linears().values():
            if linear.path not in served:
                roles = ("weight", "bias") if linear.bias else ("weight",)
                tensors = {f"{linear.path}.{role}": state[f"{linear.path}.{role}"] for role in roles}
                params = {"transposed": True} if linear.transposed else {}
                names = {role: f"{linear.path}.{role}" for role in roles}
                writer.add_unit(UnitEntry("dense", 1, {linear.path: (linear.n, linear.k)}, names, params), tensors)
        for unit in made:
            writer.add_unit(*_packed(unit))
        writer.finish(config, {}, {})
        return writer.publish()


def _packed(unit: Unit) -> tuple[UnitEntry, dict[str, torch.Tensor]]:
    packed, first = shared_basis.encode(unit), next(iter(unit.modules))
    names = {}
    for role in packed.tensors:
        what, _, path = role.partition(".")
        names[role] = f"{path or first}.{what}"
    entry = UnitEntry(packed.format, packed.version, packed.modules, names, packed.params)
    return entry, {names[role]: tensor for role, tensor in packed.tensors.items()}


def pivoted(unit: Unit) -> Unit:
    return shared_basis.pivot(unit, torch.ones(next(iter(unit.modules.values()))[1]))


# --- the published layouts --------------------------------------------------------------------------


def published_state(model: hf.PreTrainedModel, made: dict[tuple[str, ...], Unit]) -> dict[str, torch.Tensor]:
    """The tensors as Basis Sharing saves them: bases per layer at the model, in Llama's layout under the layers too."""
    spec = spec_of(model)
    state = dict(model.state_dict())
    kinds = {module: kind for kind, module in MODULES[_layout(spec)].items()}
    root = spec.names.embed.rpartition(".")[0]
    for paths, unit in made.items():
        for path in paths:
            layer, module = _split(spec, path)
            state[f"{path}.weight"] = unit.tensors[f"coefficients.{path}"]
            state[f"{root}.{kinds[module]}_basis.{layer}.weight"] = unit.tensors["basis"]
            if spec.family == "llama":
                parent = path.rpartition(".")[0]
                state[f"{parent}.{kinds[module]}_basis.weight"] = unit.tensors["basis"]
    return state


def _split(spec: Spec, path: str) -> tuple[int, str]:
    for i in range(len(spec.layers)):
        if path.startswith(spec.path(i, "")):
            return i, path.removeprefix(spec.path(i, ""))
    raise KeyError(path)


def publish(target: Path, model: hf.PreTrainedModel, groups: Groups, change=lambda state, config: None) -> Path:
    """A published Basis Sharing checkpoint: one pickle, config.json with the method's own keys."""
    state = published_state(model, units(model, groups))
    stock = model.config.to_dict()
    config = stock | {
        "architectures": [f"Share{type(model).__name__}"],
        "use_cache": False,
        **{f"num_basis_{kind}": rank for kind, (_, rank) in groups.items()},
        **{f"{kind}_groups": layers for kind, (layers, _) in groups.items()},
    }
    change(state, config)
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config))
    torch.save(state, target / "pytorch_model.bin")
    return target


def repack(target: Path, shards: int, pickled: bool) -> None:
    """Spread the one pickle over `shards` files, as pickles or safetensors (which stores no aliases)."""
    state = torch.load(target / "pytorch_model.bin", weights_only=True)
    (target / "pytorch_model.bin").unlink()
    names, stem, ext = sorted(state), *(("pytorch_model", "bin") if pickled else ("model", "safetensors"))
    places = {}
    for i in range(shards):
        file = f"{stem}.{ext}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{ext}"
        part = {name: state[name] for name in names[i::shards]}
        places |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, target / file)
        else:
            save_file({name: tensor.clone() for name, tensor in part.items()}, target / file)
    if shards > 1:
        (target / f"{stem}.{ext}.index.json").write_text(json.dumps({"weight_map": places}))
