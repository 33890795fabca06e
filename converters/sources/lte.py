"""Folders of LTE models: an ordinary checkpoint of the second stage, with a router beside each routed FFN.

<ffn>.router.weight   [groups, hidden]   `mlp` of a layer, also for OPT, which has no such module: layers.0.mlp.router
<ffn>.permutation     int [F], where neurons do not lie in groups: those of group g are the g-th `size` entries
<ffn>.labels          int [F], or the group of each neuron instead

Nobody has published one: this is what ours could be given as. config.json may say tau under `lte`: {"tau": 0.5}.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ... import families
from ...errors import SourceError
from ...kernels.routed_ffn import GROUP_SIZES
from ...kernels.unit import Unit
from ...spec import Linear, Spec
from .factored import stock_config
from .source import Skip, Source

_ROUTER, _PERMUTATION, _LABELS = ".router.weight", ".permutation", ".labels"
TAU = 0.5


def recognises(names: Iterable[str]) -> bool:
    """True when a checkpoint with these tensors is of this layout."""
    return any(name.endswith(f".mlp{_ROUTER}") for name in names)


def open_source(plain: Source, names: list[str]) -> Source:
    """Read `plain` as this layout. Raises SourceError naming the tensor that does not fit."""
    config = stock_config(plain.config, {"lte"})
    spec = families.read(config)
    said = plain.config.get("lte", {})
    tau = said.get("tau", TAU) if isinstance(said, dict) else said
    if not isinstance(tau, float) or not 0 < tau < 1:
        raise SourceError(f"{plain.path}: lte in config.json gives tau {tau!r}, which must lie between 0 and 1")
    ours = {canonical: name for name in names if (canonical := spec.canonical(name))}
    routed = {path: parts for path, parts in spec.ffns().items() if f"{path}{_ROUTER}" in ours}
    private = {f"{path}{end}" for path in spec.ffns() for end in (_ROUTER, _PERMUTATION, _LABELS)}
    for name in ours:
        path = name.removesuffix(_ROUTER)
        if path != name and path not in routed:
            raise SourceError(f"{plain.path} holds {ours[name]}, but a {spec.family} model has no FFN {path}")
    inside = {f"{linear.path}.{role}" for parts in routed.values() for linear in parts.values() for role in _ROLES}
    hidden = {ours[name] for name in (private | inside) & ours.keys()}

    def tensors(skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
        return plain.tensors(lambda name: name in hidden or skip(name))

    def units() -> Iterator[Unit]:
        state = {spec.canonical(name): tensor for name, tensor in plain.tensors(lambda name: name not in hidden)}
        for path, parts in routed.items():
            yield _FFN(plain, spec, state, path, list(parts.values())).unit(tau)

    return replace(plain, kind="lte", config=config, tensors=tensors, units=units)


_ROLES = ("weight", "bias")


class _FFN:
    """One routed FFN among the tensors of a checkpoint; `state` has them under this model's names."""

    def __init__(
        self, plain: Source, spec: Spec, state: dict[str | None, torch.Tensor], path: str, parts: list[Linear]
    ) -> None:
        self.plain, self.spec, self.state, self.path = plain, spec, state, path
        *self.ins, self.down = parts
        self.width = self.down.k

    def unit(self, tau: float) -> Unit:
        """The unit of the format routed_ffn, its neurons in groups."""
        router = self._need(f"{self.path}{_ROUTER}")
        groups = router.shape[0] if router.dim() else 0
        size = self.width // max(1, groups)
        if router.shape[1:] != (self.down.n,) or groups * size != self.width or size not in GROUP_SIZES:
            raise SourceError(
                f"{self.path}{_ROUTER} in {self.plain.path} is {list(router.shape)}; for {self.width} neurons in "
                f"groups of {', '.join(map(str, GROUP_SIZES))} it must be [{self.width} / size, {self.down.n}]"
            )
        order = self._order(groups, size)
        tensors = {"router": router.float(), "down": self._matrix(self.down)[:, order].contiguous()}
        if self.down.bias:
            tensors["down_bias"] = self._bias(self.down)
        roles = ("gate", "up") if self.spec.gated else ("up",)
        weights = torch.cat([self._matrix(linear) for linear in self.ins]).chunk(len(roles))
        tensors |= {role: weight[order] for role, weight in zip(roles, weights, strict=True)}
        if self.ins[0].bias:
            biases = torch.cat([self._bias(linear) for linear in self.ins]).chunk(len(roles))
            tensors |= {f"{role}_bias": bias[order] for role, bias in zip(roles, biases, strict=True)}
        params = {"group_size": size, "tau": tau, "activation": self.spec.act}
        return Unit({self.path: (self.down.n, self.down.n)}, tensors, params)

    def _order(self, groups: int, size: int) -> torch.Tensor:
        """The neurons in the order in which groups lie, int64 [F]."""
        order, labels = (self.state.get(f"{self.path}{end}") for end in (_PERMUTATION, _LABELS))
        if order is None and labels is None:
            return torch.arange(self.width)
        if order is None:
            assert labels is not None
            counts = torch.bincount(labels.long().clamp(min=0), minlength=groups)
            if labels.shape != (self.width,) or counts.tolist() != [size] * groups or labels.min() < 0:
                raise SourceError(
                    f"{self.path}{_LABELS} in {self.plain.path} must give each of {groups} groups {size} of "
                    f"{self.width} neurons"
                )
            return labels.long().argsort(stable=True)
        if order.shape != (self.width,) or not torch.equal(order.long().sort().values, torch.arange(self.width)):
            raise SourceError(f"{self.path}{_PERMUTATION} in {self.plain.path} is no order of {self.width} neurons")
        return order.long()

    def _matrix(self, linear: Linear) -> torch.Tensor:
        """The weight [N, K]."""
        weight = self._need(f"{linear.path}.weight")
        weight = weight.t() if linear.transposed else weight
        if tuple(weight.shape) != (linear.n, linear.k):
            raise SourceError(
                f"{linear.path}.weight in {self.plain.path} is {list(weight.shape)}, its config.json says "
                f"{[linear.n, linear.k]}"
            )
        return weight

    def _bias(self, linear: Linear) -> torch.Tensor:
        return self._need(f"{linear.path}.bias")

    def _need(self, name: str) -> torch.Tensor:
        if name not in self.state:
            raise SourceError(f"{self.plain.path} holds no {name}, though it holds a router for it; is it complete?")
        return self.state[name]
