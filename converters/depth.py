"""Fewer layers: a config and a model cut to the layers that stay, per-layer lists included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModel
from ..spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTS = ("num_hidden_layers", "n_layer")
LISTS = ("layer_types",)  # config keys with an entry a layer


def layer_count(config: Mapping[str, Any]) -> int | None:
    """How many layers a config.json states, if it does."""
    found = next((config[key] for key in COUNTS if key in config), None)
    return found if isinstance(found, int) else None


def shorten_config(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A config.json for the layers `kept`, by their indices until now. Raises UnsupportedModel.

    A rule that goes by a layer's index is written out as a list before it is cut.
    """
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise UnsupportedModel(
            "scale_attn_by_inverse_layer_idx is true: a layer that moves up would scale its attention otherwise, "
            "so no layer of this model can be removed"
        )
    cut = dict(config)
    if config.get("use_sliding_window") and config.get("layer_types") is None:
        first = config.get("max_window_layers", 28)
        count = layer_count(config) or 0
        cut["layer_types"] = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    cut |= {key: [cut[key][i] for i in kept] for key in LISTS if cut.get(key)}
    return cut | {key: len(kept) for key in COUNTS if key in config}


def shorten_model(model: PreTrainedModel, spec: Spec, kept: Sequence[int]) -> None:
    """Leave the layers `kept` in place, renumbered. `model.layer_origins` then has the index each had at first.

    Raises UnsupportedModel.
    """
    before = model.config.to_dict()
    changes = {k: v for k, v in shorten_config(before, kept).items() if before.get(k) != v}
    origins = getattr(model, "layer_origins", range(len(spec.layers)))
    parent, _, name = spec.names.layer.removesuffix(".{i}.").rpartition(".")
    layers = getattr(model.get_submodule(parent), name)
    setattr(model.get_submodule(parent), name, nn.ModuleList(layers[i] for i in kept))
    for i, layer in enumerate(getattr(model.get_submodule(parent), name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.layer_origins = [origins[i] for i in kept]
