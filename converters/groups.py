"""Which modules of which layers share a basis: runs of consecutive layers, and the paper's rule for each family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import BadParameter
from ..spec import Spec


@dataclass(frozen=True)
class Kind:
    """A linear of every layer. observed: the kind whose inputs are also this one's (q for q, k and v)."""

    name: str
    observed: str
    shared: bool


@dataclass(frozen=True)
class Group:
    """Modules of one kind that may share a basis. size: the configured number of layers, which the rank takes.

    observed: per module, the path whose input stands for its own.
    """

    kind: str
    paths: tuple[str, ...]
    size: int
    observed: tuple[str, ...]

    def apart(self) -> list[Group]:
        """The same modules with a basis each."""
        return [Group(self.kind, (p,), 1, (o,)) for p, o in zip(self.paths, self.observed, strict=True)]


@dataclass(frozen=True)
class Run:
    """Consecutive layers that are compressed together."""

    layers: tuple[int, ...]
    size: int

    def group(self, spec: Spec, kind: Kind) -> Group:
        """Every layer of this run in one group."""
        paths, observed = (tuple(spec.path(i, n) for i in self.layers) for n in (kind.name, kind.observed))
        return Group(kind.name, paths, self.size, observed)

    def groups(self, spec: Spec, kind: Kind, shared: bool) -> list[Group]:
        """One group, or each module its own."""
        together = self.group(spec, kind)
        return [together] if shared else together.apart()


def runs(spec: Spec, size: int, layers: Sequence[int] | None = None, origins: Sequence[int] | None = None) -> list[Run]:
    """Layers in runs of `size` from layer 0 on; a shorter last one.

    layers: only these, in whole runs. origins: the index each layer had before blocks were removed; a run that
    was not consecutive then is refused. Raises BadParameter.
    """
    count = len(spec.layers)
    wanted = set(range(count) if layers is None else layers)
    if wrong := sorted(i for i in wanted if not 0 <= i < count):
        raise BadParameter(f"layers names layer {wrong[0]}, the model has layers 0 to {count - 1}")
    cut = [tuple(range(start, min(start + size, count))) for start in range(0, count, size)]
    for run in cut:
        if 0 < len(wanted.intersection(run)) < len(run):
            raise BadParameter(
                f"layers cuts the group of layers {run[0]} to {run[-1]} (group={size}); give whole groups"
            )
        before = [origins[i] for i in run] if origins is not None else list(run)
        if wanted.intersection(run) and before[-1] - before[0] != len(run) - 1:
            raise BadParameter(
                f"the group of layers {run[0]} to {run[-1]} reaches across a removed block (they were {before}); "
                f"choose group=1, or compress before blocks are removed"
            )
    return [Run(run, size) for run in cut if wanted.intersection(run)]


def kinds(spec: Spec, modules: Sequence[str] | None = None) -> list[Kind]:
    """The linears of a layer, in the order of the forward pass, by the paper's rule of what is shared.

    Shared: what reads the residual stream (q, k, v, gate, up), and GPT-2's attention output. Private: other
    outputs and down, and k and v where they have fewer heads than q. modules: only these, by last name.
    """
    names = spec.names
    grouped = any(layer.kv_heads < layer.heads for layer in spec.layers)
    found = [
        *(Kind(name, names.qkv[0], not (grouped and j > 0)) for j, name in enumerate(names.qkv)),
        Kind(names.out, names.out, spec.family == "gpt2"),
        *(Kind(name, names.ffn_in[0], True) for name in names.ffn_in),
        Kind(names.ffn_out, names.ffn_out, False),
    ]
    known = {alias: kind for kind in found for alias in _aliases(found, kind)}
    for name in modules or ():
        if name not in known:
            raise BadParameter(f"modules names {name!r}, the linears of a layer are {', '.join(k.name for k in found)}")
    chosen = None if modules is None else {known[name].name for name in modules}
    return [kind for kind in found if chosen is None or kind.name in chosen]


def _aliases(found: list[Kind], kind: Kind) -> Iterator[str]:
    """The layer-relative name, and its last part where that is unique (GPT-2 has two c_proj)."""
    yield kind.name
    last = kind.name.rpartition(".")[2]
    if sum(other.name.rpartition(".")[2] == last for other in found) == 1:
        yield last
