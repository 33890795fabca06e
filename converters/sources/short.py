"""Checkpoints with fewer layers than their config says, as `save_pretrained` leaves them once blocks were deleted.

A loader that believes the config fills the rest with random numbers. Here the layers that are there count.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

from ...errors import SourceError
from ..depth import LISTS, layer_count, shorten_config
from .source import Skip, Source

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, by its name; None for what is outside of layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def repaired(source: Source) -> Source:
    """`source` with the number of layers that its weights have; a warning says so where the config said more.

    Raises SourceError where layers are missing in between, or it cannot be told which of several kinds are left.
    """
    stated = layer_count(source.config)
    present = {layer for name in source.names() if (layer := layer_of(name)) is not None}
    if stated is None or not present or max(present) >= stated or len(present) == stated:
        return source
    count = len(present)
    if gaps := sorted(set(range(count)) - present):
        raise SourceError(
            f"{source.path} holds {count} of {stated} layers, layer {gaps[0]} is not among them; if blocks were "
            "removed, convert the dense checkpoint with --method sleb:remove=..., else the download is not complete"
        )
    config = dict(source.config)
    for key in LISTS:
        entries = config.get(key) or []
        if len(entries) == count:
            config[key] = entries + entries[:1] * (stated - count)
        elif len(set(entries)) > 1:
            raise SourceError(
                f"{source.path} holds {count} of {stated} layers, and {key} in its config.json does not tell which "
                "ones are left; convert the dense checkpoint with --method sleb:remove=..."
            )
    warnings.warn(
        f"{source.path} holds {count} layers, its config.json says {stated}: read as a model of {count}", stacklevel=2
    )
    return replace(source, config=shorten_config(config, range(count)))


def first_layers(source: Source, count: int) -> Source:
    """The first `count` layers of `source`, and what is outside of layers."""

    def above(name: str) -> bool:
        layer = layer_of(name)
        return layer is not None and layer >= count

    def beyond(skip: Skip) -> Skip:
        return lambda name: above(name) or skip(name)

    config = shorten_config(source.config, range(count))
    return replace(source, config=config, tensors=lambda skip: source.tensors(beyond(skip)))
