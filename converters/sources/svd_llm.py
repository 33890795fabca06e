"""Folders of private factors, as SVD-LLM's modelling code names them: each linear in two, no sharing.

<parent>.q_u_proj.weight [N, R], perhaps with a bias      <parent>.q_v_proj.weight [R, K]      for <parent>.q_proj
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ... import families
from ...errors import SourceError
from .factored import Group, factored_source, stock_config
from .source import Source

_FACTOR = re.compile(r"(?P<stem>(?:.+\.)?\w+)_(?P<side>[uv])_proj\.weight$")


def recognises(names: Iterable[str]) -> bool:
    """True when a checkpoint with these tensors is of this layout."""
    return any(_FACTOR.search(name) for name in names)


def open_source(plain: Source, names: list[str]) -> Source:
    """Read `plain` as this layout. Raises SourceError naming the tensor that does not fit."""
    config = stock_config(plain.config, {"ratio"})
    spec = families.read(config)
    ours = {spec.canonical(name): name for name in names}
    stems = {found["stem"]: found.group() for name in ours if name and (found := _FACTOR.search(name))}
    groups: dict[str, Group] = {}
    for stem, shown in stems.items():
        path = next((p for p in (f"{stem}_proj", stem) if p in spec.linears()), None)
        basis = ours.get(f"{stem}_v_proj.weight")
        if path is None or basis is None:
            lacks = f"no {stem}_v_proj.weight" if path else f"no linear {stem}_proj or {stem} in a {spec.family} model"
            raise SourceError(f"{plain.path} holds {shown}, but there is {lacks}")
        biases = {path: ours.get(f"{stem}_u_proj.bias", f"{stem}_u_proj.bias")} if spec.linears()[path].bias else {}
        groups[path] = Group((basis,), {path: ours.get(f"{stem}_u_proj.weight", f"{stem}_u_proj.weight")}, biases)
    ordered = [groups[path] for path in spec.linears() if path in groups]
    return factored_source(plain, "svd_llm", config, ordered)
