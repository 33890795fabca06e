"""The transformers door: importing this module lets `AutoModelForCausalLM.from_pretrained` load compressed folders.

    import pared.hf
    model = AutoModelForCausalLM.from_pretrained("OUT")

transformers reads the shards; the linears of compressed units, and FFNs that are routed as a whole, become modules that
multiply by pared's kernels. Nothing is unpacked, and a basis that several layers share stays one tensor. Without the
import transformers stops at the [0]-shaped weights of such a folder; folders that are dense need neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .compact import STOCK_FORMAT, Manifest, UnitEntry, open_folder
from .errors import FolderError, KernelError, MissingTensors
from .kernels import formats
from .kernels.unit import FP32_ROLES, Packed, Prepared
from .narrow import narrow
from .runtime.loader import check
from .spec import WIDTHS

METHOD = "pared"


class ParedConfig(QuantizationConfigMixin):
    """The manifest of a compact folder, under the name by which transformers finds the quantizer."""

    def __init__(self, **manifest: Any) -> None:
        self.__dict__.update(manifest)
        self.quant_method = METHOD


class ParedQuantizer(HfQuantizer):
    """Puts `PackedLinear` modules into a model that is still on the meta device; transformers then loads as usual."""

    requires_calibration = True  # only folders that pared has written: nothing is compressed on the fly
    is_trainable = False
    is_compileable = True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Raises FolderError: a folder's manifest vouches for its files, so they are copied and not written again."""
        raise FolderError(
            "save_pretrained cannot write a compressed folder; copy the folder that the model was loaded from, "
            "or `pared export` it to a dense one"
        )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        manifest = Manifest.parse(self.quantization_config.to_dict())
        if checkpoint_files:
            with open_folder(Path(checkpoint_files[0]).parent) as folder:
                spec = check(folder)
            if WIDTHS in folder.config:
                narrow(model, spec, lambda path: _inside(model, path))
        for entry in manifest.units:
            if entry.format != STOCK_FORMAT:
                _install(model, entry, manifest)
        model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict or ()) | FP32_ROLES
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.unit.check_devices()
        return model.requires_grad_(False)  # the kernels have no backward pass


class SharedUnit:
    """A unit whose tensors lie in modules of the model, laid out for its device when it is first used.

    places: role -> (the module that owns the tensor, its attribute there).
    """

    def __init__(self, entry: UnitEntry, places: dict[str, tuple[nn.Module, str]]) -> None:
        self.entry, self.places = entry, places
        self._prepared: Prepared | None = None

    def apply(self, x: torch.Tensor, path: str) -> torch.Tensor:
        """x [M, K] contiguous -> [M, N] of module `path`."""
        if self._prepared is None:
            tensors = self._tensors()
            packed = Packed(self.entry.format, self.entry.version, self.entry.modules, tensors, self.entry.params)
            device = next(iter(tensors.values())).device
            self._prepared = formats.by_name(self.entry.format).prepare(packed, device)
        return formats.by_name(self.entry.format).apply(x, self._prepared, path)

    def forget(self) -> None:
        """The tensors have changed or moved: lay them out again at the next use."""
        self._prepared = None

    def check_devices(self) -> None:
        """Raises KernelError where a device map has put the unit's tensors on several devices, or offloaded them."""
        devices = {str(tensor.device) for tensor in self._tensors().values()}
        if len(devices) > 1 or devices == {"meta"}:
            raise KernelError(
                f"the unit of {next(iter(self.entry.modules))} lies on {', '.join(sorted(devices))}: layers that share "
                'weights must be on one device; load with device_map={"": 0} or without a device_map'
            )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {role: getattr(module, name).detach() for role, (module, name) in self.places.items()}


class PackedModule(nn.Module):
    """A module [N, K] of a compressed unit: a linear, or a whole FFN."""

    def __init__(self, path: str, outputs: int, inputs: int) -> None:
        super().__init__()
        self.path, self.out_features, self.in_features = path, outputs, inputs
        self.unit: SharedUnit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]"""
        y = self.unit.apply(x.reshape(-1, self.in_features).contiguous(), self.path)
        return y.view(*x.shape[:-1], self.out_features)

    def hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Make the place into which transformers will load the stored tensor."""
        empty = torch.empty(shape, dtype=dtype, device="meta")
        if dtype.is_floating_point:
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        else:
            self.register_buffer(name, empty)

    def extra_repr(self) -> str:
        return f"{self.unit.entry.format}, in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Any, recurse: bool = True) -> PackedModule:
        super()._apply(fn, recurse)
        self.unit.forget()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.unit.forget()


class PackedLinear(PackedModule):
    """A linear of a compressed unit. `weight` is the [0]-shaped one at which other loaders stop."""

    def __init__(self, path: str, outputs: int, inputs: int) -> None:
        super().__init__(path, outputs, inputs)
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Covered(nn.Module):
    """Where a linear was whose work a whole FFN does: it has the [0]-shaped weight, and lets x pass.

    through: the FFN, where the family has no module for it and so calls the first of its linears.
    """

    def __init__(self, through: PackedModule | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self._through = (through,)  # a module in a tuple is no child: its tensors lie elsewhere

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., K]"""
        (ffn,) = self._through
        return x if ffn is None else ffn(x)


_DTYPES = {"I32": torch.int32, "I64": torch.int64, "U8": torch.uint8}


def _install(model: PreTrainedModel, entry: UnitEntry, manifest: Manifest) -> None:
    """Replace the modules that the unit serves. A backbone without its head has no module for the head's unit."""
    known = dict(model.named_modules())
    inside = {path: _inside(model, path) for path in (*entry.modules, *entry.linears)}
    if missing := [path for path in entry.linears if inside[path] not in known]:
        if len(missing) == len(entry.linears) and model.get_output_embeddings() is None and not _in_block(missing[0]):
            return
        raise MissingTensors(f"the model that transformers built has no module {missing[0]}, which the folder serves")
    kind = PackedModule if entry.covers else PackedLinear
    made = {path: kind(path, n, k) for path, (n, k) in entry.modules.items()}
    places: dict[str, tuple[nn.Module, str]] = {}
    for role, tensor in entry.tensors.items():
        path, _, name = tensor.rpartition(".")
        stored = manifest.tensors[tensor]
        dtype = torch.float32 if role in FP32_ROLES else torch.get_default_dtype()
        made[path].hold(name, stored.shape, _DTYPES.get(stored.dtype, dtype))
        places[role] = made[path], name
    unit = SharedUnit(entry, places)
    for path, module in made.items():
        module.unit = unit
        if entry.covers:
            _cover(model, module, [inside[linear] for linear in entry.covers], inside[path])
        else:
            model.set_submodule(inside[path], module)


def _cover(model: PreTrainedModel, ffn: PackedModule, linears: list[str], name: str) -> None:
    """Put a whole FFN in the place of these linears, under its name in the folder."""
    parent, _, own = name.rpartition(".")
    layer = model.get_submodule(parent)
    if hasattr(layer, own):
        for linear in linears:
            ffn.add_module(linear.removeprefix(f"{name}."), Covered())
    else:  # OPT: the layer itself calls fc1, the activation and fc2
        first, *others = linears
        model.set_submodule(first, Covered(ffn))
        for linear in others:
            model.set_submodule(linear, Covered())
        layer.activation_fn = nn.Identity()
    layer.add_module(own, ffn)


def _inside(model: PreTrainedModel, path: str) -> str:
    """The module's path in this model: a backbone loaded alone lacks the leading part."""
    prefix = f"{model.base_model_prefix}."
    return path.removeprefix(prefix) if model.base_model is model else path


def _in_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _register() -> None:
    """Once per process, however often this file is imported or reloaded: transformers refuses a second time."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(ParedConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(ParedQuantizer)


_register()
