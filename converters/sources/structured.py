"""Folders of structured pruning: layers with fewer heads or FFN neurons than the config's one number says.

The widths are read from the tensors. config.json may have the numbers of the dense model, a list with a number for each
layer, or transformers' `per_layer_config`; lists must agree with the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from ... import families
from ...errors import SourceError
from ...spec import Spec
from ..widths import FFN, HEADS, described
from .source import Source


@dataclass(frozen=True)
class _Widths:
    """What the tensors of a layer agree on: inputs of the output projection, outputs of k, inputs of the last FFN."""

    q: int
    kv: int
    ffn: int


def open_source(plain: Source) -> Source:
    """`plain` with a config that says what its layers have; `plain` itself where the config does so already.

    Raises SourceError naming the layer where config and tensors cannot both be right.
    """
    keys = _keys(plain.config)
    _refuse_others(plain, keys)
    listed = {key: values for key in keys if (values := _listed(plain.config, key)) is not None}
    spec = families.read(_scalars(plain.config, keys, listed))
    found = _widths(plain, spec)
    if not listed and (None in found or all(w == _of(spec, i) for i, w in enumerate(found))):
        return plain  # as the config says, or in shapes of which each will be named
    if None in found:
        lacking = found.index(None)
        raise SourceError(
            f"{plain.path}: layer {lacking} lacks linears, or they do not fit each other; is the download complete?"
        )
    widths = [w for w in found if w]
    head_dim = _head_dim(plain, spec, widths, listed.get(keys[0]))
    layers = [_counts(plain, i, w, head_dim) for i, w in enumerate(widths)]
    for place, key in enumerate(keys):
        _agree(plain, key, listed.get(key), [counts[place] for counts in layers])
    return replace(plain, config=described(plain.config, spec.hidden, head_dim, layers))


def _keys(config: dict[str, Any]) -> tuple[str, str, str]:
    """The config's keys for heads, key/value heads and FFN width."""
    family = str(config.get("model_type"))
    return HEADS.get(family, "num_attention_heads"), "num_key_value_heads", FFN.get(family, "intermediate_size")


def _listed(config: dict[str, Any], key: str) -> list[Any] | None:
    """A number for each layer, where the config has that."""
    given, by_layer = config.get(key), config.get("per_layer_config") or {}
    if isinstance(given, list):
        return given
    if not any(key in own for own in by_layer.values()):
        return None
    own = {int(layer): numbers for layer, numbers in by_layer.items()}
    count = config.get("num_hidden_layers", config.get("n_layer"))
    return [own.get(i, {}).get(key, given) for i in range(count or 0)]


def _refuse_others(plain: Source, keys: Sequence[str]) -> None:
    """Raises SourceError for a per_layer_config that says more than widths."""
    by_layer = plain.config.get("per_layer_config") or {}
    try:
        given = sorted((int(layer), key) for layer, own in by_layer.items() for key in own)
    except (AttributeError, TypeError, ValueError):
        raise SourceError(f"{plain.path}: per_layer_config in config.json is no object of layers") from None
    if others := [(layer, key) for layer, key in given if key not in keys]:
        layer, key = others[0]
        raise SourceError(
            f"{plain.path}: per_layer_config gives layer {layer} its own {key}; pared knows {', '.join(keys)}"
        )


def _scalars(config: dict[str, Any], keys: Sequence[str], listed: dict[str, list[Any]]) -> dict[str, Any]:
    """The config with one number for each list, so that it can be read; which number does not matter yet."""
    numbers: dict[str, Any] = {
        key: max((n for n in values if isinstance(n, int)), default=1) for key, values in listed.items()
    }
    heads, kv_heads, _ = keys
    if listed.keys() & {heads, kv_heads}:
        numbers[kv_heads] = numbers.get(heads, config.get(heads))
    return config | numbers


def _widths(plain: Source, spec: Spec) -> list[_Widths | None]:
    """The widths of each layer; None where its tensors are missing or disagree. Shapes alone are looked at."""
    names = spec.names
    wanted = {f"{path}.weight" for path in spec.in_layers()}
    shapes = {
        str(spec.canonical(name)): tuple(tensor.shape)[:: -1 if spec.transposed else 1]
        for name, tensor in plain.tensors(lambda name: spec.canonical(name) not in wanted)
    }

    def layer(i: int) -> _Widths | None:
        found = {name: shapes.get(f"{spec.path(i, name)}.weight", ()) for name in _inner(spec)}
        if any(len(shape) != 2 for shape in found.values()):
            return None
        q, ffn = found[names.out][1], found[names.ffn_out][1]
        qkv, inputs = ([found[name][0] for name in group] for group in (names.qkv, names.ffn_in))
        kv = (sum(qkv) - q) // 2
        even = len(set(inputs)) == 1 and sum(inputs) == (1 + spec.gated) * ffn
        fits = even and qkv in ([q, kv, kv], [q + 2 * kv])
        return _Widths(q, kv, ffn) if fits and min(q, kv, ffn) > 0 else None

    return [layer(i) for i in range(len(spec.layers))]


def _inner(spec: Spec) -> tuple[str, ...]:
    return (*spec.names.qkv, spec.names.out, *spec.names.ffn_in, spec.names.ffn_out)


def _of(spec: Spec, i: int) -> _Widths:
    layer = spec.layers[i]
    return _Widths(layer.heads * spec.head_dim, layer.kv_heads * spec.head_dim, layer.ffn)


def _head_dim(plain: Source, spec: Spec, widths: list[_Widths], heads: list[Any] | None) -> int:
    """The head size: the config's, or what its list of heads makes of the widths, or that of a layer left whole."""
    if plain.config.get("head_dim"):
        return int(plain.config["head_dim"])
    if heads is not None:
        sizes = {w.q / h for w, h in zip(widths, heads, strict=False) if isinstance(h, int) and h > 0}
        if len(heads) == len(widths) and len(sizes) == 1 and (size := sizes.pop()).is_integer():
            return int(size)
    elif any(w.q == spec.layers[0].heads * spec.head_dim for w in widths):
        return spec.head_dim
    raise SourceError(
        f"{plain.path}: config.json leaves open how many heads are left in layers whose attention is "
        f"{sorted({w.q for w in widths})} wide; write the size of a head into it as head_dim"
    )


def _counts(plain: Source, i: int, widths: _Widths, head_dim: int) -> tuple[int, int, int]:
    heads, kv_heads = widths.q // head_dim, widths.kv // head_dim
    if widths.q % head_dim or widths.kv % head_dim or heads % kv_heads:
        raise SourceError(
            f"{plain.path}: layer {i} has {widths.q} outputs of q and {widths.kv} of k, which are not whole heads of "
            f"{head_dim}, or not as many for each key/value head; check head_dim in config.json"
        )
    return heads, kv_heads, widths.ffn


def _agree(plain: Source, key: str, listed: list[Any] | None, found: list[int]) -> None:
    for i, (said, has) in enumerate(zip_longest(listed or found, found)):
        if said != has:
            raise SourceError(
                f"{plain.path}: {key} in config.json lists {said} for layer {i}, its tensors have {has}; "
                "config and weights are of different models, or the list is out of order"
            )
