"""A source as a transformers model in memory, and the module that a compressed linear becomes in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .. import families, sentence_layout
from ..embedding import Embedding
from ..kernels.shared_basis import BIAS, COEFFICIENTS
from ..kernels.unit import Unit
from ..narrow import narrow
from ..spec import WIDTHS, Spec
from .routed import routed, routed_units
from .sources.source import Skip, Source
from .stream import Stream

Paths = tuple[str, ...]


class BasisLinear(nn.Module):
    """y = C (B x) + bias: a linear [N, K] as `coefficients` [N, R] over a `basis` [R, K] that others may share.

    Sharing is identity: the members of a group hold one and the same basis Parameter. scale: [K], the RMS of each
    input in calibration, where it is known.
    """

    def __init__(
        self,
        basis: nn.Parameter,
        coefficients: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.basis = basis
        self.coefficients = nn.Parameter(coefficients, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.basis), self.coefficients, self.bias)


def instantiate(source: Source, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode, frozen. dtype: default is that of the stored embedding.

    Units that the checkpoint brings become BasisLinear modules. Everything is held against the config, as when a
    folder is packed; code of the checkpoint never runs.
    """
    spec = families.read(source.config)
    stream = Stream(source, spec)
    compressed = list(source.units()) if source.units else []
    for unit in compressed:
        stream.serve(unit)
    state = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in stream.named()}
    stream.close()
    kind = state[f"{spec.names.embed}.weight"].dtype
    replaced = {f"{path}.{role}" for unit in compressed for path in unit.modules for role in ("weight", "bias")}
    for name in replaced & stream.shapes.keys():  # one zero stands in for each weight that a BasisLinear replaces
        state[name] = torch.zeros((), dtype=kind).expand(stream.shapes[name])
    model = from_state(source.config, state)
    for unit in compressed:
        _replace_group(model, unit, kind)
    return model


def _replace_group(model: nn.Module, unit: Unit, dtype: torch.dtype) -> None:
    tensors = {role: tensor.to(dtype) for role, tensor in unit.tensors.items()}
    basis = nn.Parameter(tensors["basis"], requires_grad=False)
    for path in unit.modules:
        replace_linear(model, path, BasisLinear(basis, tensors[COEFFICIENTS + path], tensors.get(BIAS + path)))


def from_state(config: dict[str, Any], state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A transformers model of this config around the tensors of `state`, in the dtype of its embedding."""
    spec = families.read(config)
    dtype = state[f"{spec.names.embed}.weight"].dtype
    made = AutoConfig.for_model(**config)
    if WIDTHS in config:
        return _of_own_widths(made, spec, {name: tensor.to(dtype) for name, tensor in state.items()})
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(made, dtype=dtype)
    model = type(empty).from_pretrained(None, config=made, state_dict=state, dtype=dtype)
    return model.eval().requires_grad_(False)


def _of_own_widths(made: PretrainedConfig, spec: Spec, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """As `from_state`, for layers that transformers builds too wide: their memory is never touched."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(made, dtype=state[f"{spec.names.embed}.weight"].dtype)
    narrow(model, spec)
    model.load_state_dict(state, strict=False, assign=True)  # what is missing is a tied head
    model.tie_weights()
    return model.eval().requires_grad_(False)


def replace_linear(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where the model has the module `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def weight_of(model: nn.Module, path: str, transposed: bool) -> torch.Tensor:
    """The weight [N, K] of a dense linear module, whichever way the family stores it."""
    weight = model.get_parameter(f"{path}.weight").detach()
    return weight.t() if transposed else weight


def units(model: nn.Module) -> dict[Paths, Unit]:
    """The BasisLinear modules of a model as units, by the paths of each group, in the model's order.

    Beside the roles of shared_basis a unit may have `scale`, which helps to lay it out and is not stored.
    """
    found: dict[int, list[tuple[str, BasisLinear]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, BasisLinear):
            found.setdefault(id(module.basis), []).append((path, module))
    return {tuple(path for path, _ in members): _unit(members) for members in found.values()}


def _unit(members: Iterable[tuple[str, BasisLinear]]) -> Unit:
    modules: dict[str, tuple[int, int]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path, module in members:
        tensors["basis"] = module.basis.detach()
        tensors[COEFFICIENTS + path] = module.coefficients.detach()
        if module.scale is not None:
            tensors["scale"] = module.scale
        if module.bias is not None:
            tensors[BIAS + path] = module.bias.detach()
        modules[path] = (module.coefficients.shape[0], module.basis.shape[1])
    return Unit(modules, tensors)


def as_source(model: PreTrainedModel, source: Source) -> Source:
    """The model as a source: its dense weights as a stream, its compressed ones as units; the rest is `source`'s.

    The config has what methods changed in the model's, and an encoder brings the files that say how it embeds.
    """
    spec = families.read(model.config.to_dict())
    compressed = (*(f"{path}." for paths in units(model) for path in paths), *(f"{path}." for path in routed(model)))

    def tensors(skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            if not name.startswith(compressed) and not skip(name):
                yield name, parameter.detach()

    def found() -> Iterator[Unit]:
        yield from units(model).values()
        yield from routed_units(model, spec).values()

    config = source.config | _changes(model, source)
    embedding: Embedding | None = getattr(model, "embedding", None)
    files = dict(source.files)
    if embedding is not None:
        files |= sentence_layout.files(embedding, families.read(config).embed_dim)
    return replace(source, config=config, files=files, tensors=tensors, units=found)


def _changes(model: PreTrainedModel, source: Source) -> dict[str, Any]:
    """What differs in the model's config from the source's, but for the dtype to compute in and the model's name."""
    before, after = (config.to_dict() for config in (AutoConfig.for_model(**source.config), model.config))
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    return {key: value for key, value in changed.items() if key not in ("dtype", "_name_or_path")}
