"""Checkpoints as the authors of Basis Sharing (arXiv 2410.03765) save them.

    <path of a linear>.weight             coefficients [N, R], in the place of the dense weight; the bias is unchanged
    model.<kind>_basis.<layer>.weight     basis [R, K], once for every layer though the layers of a group share it
    model.layers.<layer>.self_attn.<kind>_basis.weight   the same once more, in the Llama layout
    config.json                           num_basis_<kind>, <kind>_groups (lists of layers); model_type stays stock

Kinds are k, q, v (GPT-2: attn), o, gate, up and down. Where a kind or a layer has no basis it is dense.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ... import families
from ...errors import SourceError
from ...spec import Names, Spec
from .factored import Group, factored_source, stock_config
from .source import Source

_AT_MODEL = re.compile(r"(?:^|\.)(?P<kind>[a-z]+)_basis\.(?P<layer>\d+)\.weight$")
_AT_LAYER = re.compile(r"(?:^|\.)(?P<layer>\d+)\.(?:\w+\.)?(?P<kind>[a-z]+)_basis\.weight$")

Key = tuple[str, int]


def recognises(names: Iterable[str]) -> bool:
    """True when a checkpoint with these tensors is of this layout."""
    return any(_key(name) for name in names)


def open_source(plain: Source, names: list[str]) -> Source:
    """Read `plain` as this layout. Raises SourceError naming the tensor or the key that does not fit."""
    private = {key for key in plain.config if re.fullmatch(r"num_basis_[a-z]+|[a-z]+_groups", key)}
    config = stock_config(plain.config, private)
    spec = families.read(config)
    kinds = _kinds(spec.names)
    bases: dict[Key, list[str]] = {}
    for name in names:
        if key := _key(name):
            bases.setdefault(key, []).append(name)
    if foreign := sorted({kind for kind, _ in bases} - kinds.keys()):
        raise SourceError(f"{plain.path} has bases of kind {foreign[0]!r}; {spec.family} has {', '.join(kinds)}")
    ours = {spec.canonical(name): name for name in names if not _key(name)}
    used = [kind for kind in kinds if any(kind == other for other, _ in bases)]
    found = [
        (layers[0], _group(kind, layers, bases, spec, ours, plain))
        for kind in used
        for layers in _layers(kind, plain.config, bases, spec, plain.path)
    ]
    groups = [group for _, group in sorted(found, key=lambda pair: pair[0])]
    return factored_source(plain, "basis_sharing", config, groups)


def _key(name: str) -> Key | None:
    """(kind, layer) of a basis, whichever of its names this is."""
    found = _AT_MODEL.search(name) or _AT_LAYER.search(name)
    return (found["kind"], int(found["layer"])) if found else None


def _kinds(names: Names) -> dict[str, str]:
    """kind -> the module that it stands for, relative to its layer."""
    qkv = dict(zip("qkv", names.qkv, strict=True)) if len(names.qkv) == 3 else {"attn": names.qkv[0]}
    ffn = dict(zip(("gate", "up")[-len(names.ffn_in) :], names.ffn_in, strict=True))
    return {**qkv, "o": names.out, **ffn, "down": names.ffn_out}


def _layers(
    kind: str, config: Mapping[str, Any], bases: dict[Key, list[str]], spec: Spec, path: Path
) -> list[list[int]]:
    """The groups of a kind, from the config, held against the layers that the model has."""
    groups = config.get(f"{kind}_groups")
    if not isinstance(groups, list) or not all(isinstance(g, list) and g for g in groups):
        raise SourceError(f"{path} has {kind}_basis tensors, but no lists of layers under {kind}_groups in config.json")
    listed = [layer for group in groups for layer in group]
    for layer in listed:
        if not isinstance(layer, int) or not 0 <= layer < len(spec.layers):
            raise SourceError(
                f"{kind}_groups in {path / 'config.json'} names layer {layer!r} of a model with {len(spec.layers)} "
                "layers; if blocks were removed, share their bases anew: a group cannot reach across a removed block"
            )
        if listed.count(layer) > 1:
            raise SourceError(f"{kind}_groups in {path / 'config.json'} names layer {layer} twice")
    for other, layer in bases:
        if other == kind and layer not in listed:
            raise SourceError(
                f"{path} holds {bases[kind, layer][0]}, but layer {layer} is missing from {kind}_groups in config.json"
            )
    return groups


def _group(
    kind: str, layers: list[int], bases: dict[Key, list[str]], spec: Spec, ours: dict[str | None, str], plain: Source
) -> Group:
    found = tuple(name for layer in layers for name in bases.get((kind, layer), []))
    if not found:
        raise SourceError(f"{plain.path} holds no {kind}_basis tensor for the layers {layers} of {kind}_groups")
    paths = [spec.path(layer, _kinds(spec.names)[kind]) for layer in layers]
    return Group(
        bases=found,
        coefficients={path: ours.get(f"{path}.weight", f"{path}.weight") for path in paths},
        biases={path: ours.get(f"{path}.bias", f"{path}.bias") for path in paths if spec.linears()[path].bias},
        rank=plain.config.get(f"num_basis_{kind}"),
    )
