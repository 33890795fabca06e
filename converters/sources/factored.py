"""What the published layouts of factored weights have in common: y = C (B x), a coefficient [N, R] over a basis [R, K].

basis_sharing.py and svd_llm.py say which tensors belong together; here they are checked and become units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ... import families
from ...errors import SourceError
from ...kernels.shared_basis import BIAS, COEFFICIENTS
from ...kernels.unit import Unit
from ...spec import Linear, Spec
from .source import Skip, Source

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "opt": "OPTForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


@dataclass(frozen=True)
class Group:
    """Modules over one basis, by the names of their tensors in the checkpoint.

    bases: every name of the basis, which must all hold the same. coefficients, biases: by module path.
    rank: what the config says, if it says anything.
    """

    bases: tuple[str, ...]
    coefficients: dict[str, str]
    biases: dict[str, str]
    rank: int | None = None

    @property
    def names(self) -> set[str]:
        """All tensors of the group."""
        return {*self.bases, *self.coefficients.values(), *self.biases.values()}


def stock_config(config: Mapping[str, Any], private: set[str]) -> dict[str, Any]:
    """The config that transformers knows: without a method's keys, and with the stock class."""
    kept = {key: value for key, value in config.items() if key not in private | {"auto_map", "use_cache"}}
    architecture = _ARCHITECTURES.get(str(config.get("model_type")))
    return kept | ({"architectures": [architecture]} if architecture else {})


def factored_source(plain: Source, kind: str, config: dict[str, Any], groups: list[Group]) -> Source:
    """`plain` read as stock `config` says, its `groups` as units and everything else as tensors."""
    spec = families.read(config)
    hidden: set[str] = set().union(*(group.names for group in groups))

    def tensors(skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
        return plain.tensors(lambda name: name in hidden or skip(name))

    def units() -> Iterator[Unit]:
        state = dict(plain.tensors(lambda name: name not in hidden))  # mapped: read when a unit is
        for group in groups:
            yield _unit(group, state, spec, plain)

    return replace(plain, kind=kind, config=config, tensors=tensors, units=units)


def _unit(group: Group, state: dict[str, torch.Tensor], spec: Spec, plain: Source) -> Unit:
    linears = spec.linears()
    members = [linears[path] for path in group.coefficients]
    basis = _basis(group, state, members, plain)
    tensors = {"basis": basis}
    for linear in members:
        name = group.coefficients[linear.path]
        tensors[COEFFICIENTS + linear.path] = _need(state, name, (linear.n, basis.shape[0]), plain)
        if linear.bias:
            tensors[BIAS + linear.path] = _need(state, group.biases[linear.path], (linear.n,), plain)
    return Unit({linear.path: (linear.n, linear.k) for linear in members}, tensors)


def _basis(group: Group, state: dict[str, torch.Tensor], members: list[Linear], plain: Source) -> torch.Tensor:
    """The group's basis [R, K], equal under all of its names."""
    first, basis = group.bases[0], state[group.bases[0]]
    k, outputs = members[0].k, sum(linear.n for linear in members)
    if basis.dim() != 2 or basis.shape[1] != k:
        raise SourceError(
            f"{first} in {plain.path} is {list(basis.shape)}, but {members[0].path} reads {k} inputs: "
            "it is the basis of another layer, or config.json is not this checkpoint's"
        )
    rank = basis.shape[0]
    if rank > min(k, outputs):
        raise SourceError(f"{first} in {plain.path} has rank {rank}, above what its [{outputs}, {k}] matrix can have")
    if group.rank is not None and rank != group.rank:
        raise SourceError(f"{first} in {plain.path} has rank {rank}, its config.json says {group.rank}")
    for other in group.bases[1:]:
        if not _same_bits(state[other], basis):
            raise SourceError(
                f"{first} and {other} in {plain.path} stand for one basis and differ; "
                "the checkpoint was trained or saved with its sharing broken"
            )
    return basis


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def _need(state: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], plain: Source) -> torch.Tensor:
    if name not in state:
        raise SourceError(f"{plain.path} holds no {name}, though it holds the basis for it; is the download complete?")
    if tuple(state[name].shape) != shape:
        raise SourceError(
            f"{name} in {plain.path} is {list(state[name].shape)}, over its basis it must be {list(shape)}"
        )
    return state[name]
