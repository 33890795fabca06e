"""Routed FFNs on disk: from the method and from a published state dict to a folder, and through our decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from pared import families
from pared.compact import open_folder
from pared.convert import convert
from pared.converters.methods import lte
from pared.converters.routed import Groups, hard, place, routed
from pared.converters.routing import route
from pared.converters.sources.detect import open_source
from pared.errors import BadParameter, SourceError
from pared.evaluate import decoder_logits
from pared.runtime.loader import load
from pared.tests import tiny

NAMES = ("llama-tied-biased", "qwen3", "phi3", "opt-projected", "gpt2")
RECIPE = "lte:size=8,tokens=256,length=16,batch=2,lr=1e-3,router_lr=1e-2,eta=2"
TOKENS = torch.randint(0, 40, (20,), generator=torch.Generator().manual_seed(5))
SIZE, TAU = 8, 0.4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = torch.randint(0, 40, (2000,), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{word}" for word in words.tolist()))
    return path


def by_decoder(folder: Path) -> torch.Tensor:
    return decoder_logits(load(folder, "cpu"))(TOKENS)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_becomes_a_folder_that_the_decoder_runs(tmp_path, text, name, monkeypatch):
    """What the decoder computes is what the model of the conversion did, and every FFN lies as routed_ffn."""
    made: list[hf.PreTrainedModel] = []
    whole = lte.apply
    monkeypatch.setattr(lte, "apply", lambda model, record: (whole(model, record), made.append(model))[0])
    src = tiny.checkpoint(tmp_path / "src", name)
    report = convert(src, tmp_path / "out", methods=[RECIPE], calibration=text, progress=False)
    assert [row.name for row in report.rows] == ["original", "out"]
    (model,) = made
    with torch.no_grad():
        close(by_decoder(tmp_path / "out"), model(TOKENS[None]).logits[0])
    with open_folder(tmp_path / "out") as folder:
        units = {path: unit for unit in folder.manifest.units for path in unit.modules if unit.format == "routed_ffn"}
        assert units.keys() == families.read(folder.config).ffns().keys()
        for path, unit in units.items():
            assert unit.params["group_size"] == 8
            assert folder.tensor(unit.tensors["router"]).dtype == torch.float32
            assert folder.tensor(f"{next(iter(unit.covers))}.weight").shape == (0,), path
        (method,) = folder.manifest.provenance["methods"]
        assert method["name"] == "lte"
        assert 0 <= method["result"]["sparsity"] <= 1
        assert [stage["steps"] for stage in method["result"]["stages"]] == [8, 8]


def test_routers_stay_fp32_in_a_bf16_folder(tmp_path, text):
    src = tiny.checkpoint(tmp_path / "src")
    convert(src, tmp_path / "out", methods=[RECIPE], calibration=text, dtype="bf16", progress=False)
    with open_folder(tmp_path / "out") as folder:
        (first, *_) = (unit for unit in folder.manifest.units if unit.format == "routed_ffn")
        assert folder.tensor(first.tensors["groups"]).dtype == torch.bfloat16
        assert folder.tensor(first.tensors["router"]).dtype == torch.float32


def test_a_routed_ffn_is_not_stored_as_another_format(tmp_path, text):
    src = tiny.checkpoint(tmp_path / "src")
    with pytest.raises(SourceError, match=r"layers\.0\.mlp is a routed FFN, which bitmap does not store"):
        convert(src, tmp_path / "out", methods=[RECIPE], calibration=text, format="bitmap", progress=False)


def test_methods_that_would_meet_routed_ffns_are_refused(tmp_path, text):
    src = tiny.checkpoint(tmp_path / "src")
    methods = ["magnitude:pattern=2:4", RECIPE, "magnitude:pattern=4:8"]
    with pytest.raises(BadParameter, match="magnitude does not know routed FFNs; give --method lte as the last one"):
        convert(src, tmp_path / "out", methods=methods, calibration=text, progress=False)


# --- a published state dict ------------------------------------------------------------------------


def publish(
    target: Path, name: str, give: str = "permutation", change=lambda state, config: None
) -> hf.PreTrainedModel:
    """A stage-2 checkpoint of layer 1 routed, layer 0 dense; returns the routed model.

    give: where the groups are said, `permutation`, `labels`, or nowhere, as neurons lie in them.
    """
    model = tiny.model(name).requires_grad_(False)
    spec = families.read(model.config.to_dict())
    width = spec.layers[1].ffn
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(width, generator=generator).view(-1, SIZE).sort(dim=1).values.flatten()
    order = torch.arange(width) if give == "nothing" else order
    router = torch.randn(width // SIZE, spec.hidden, generator=generator)
    tiny.checkpoint(target, name)
    state, config = load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())
    ffn = list(spec.ffns())[1]
    state[f"{ffn}.router.weight"] = router
    if give == "permutation":
        state[f"{ffn}.permutation"] = order
    if give == "labels":
        state[f"{ffn}.labels"] = (order.argsort() // SIZE).int()
    config["lte"] = {"tau": TAU}
    change(state, config)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    module = route(model, spec, 1, order, Groups(SIZE, TAU))
    module.router.weight.data, module.rule = router, hard
    assert place(spec, 1) in routed(model)
    return model


@pytest.mark.parametrize("give", ["permutation", "labels", "nothing"])
@pytest.mark.parametrize("name", NAMES)
def test_a_published_state_dict_is_read(tmp_path, name, give):
    model = publish(tmp_path / "src", name, give)
    assert open_source(tmp_path / "src").kind == "lte"
    convert(tmp_path / "src", tmp_path / "out", progress=False)
    with torch.no_grad():
        close(by_decoder(tmp_path / "out"), model(TOKENS[None]).logits[0])
    (module,) = routed(model).values()
    assert 0 < module.shares.mean() < 1
    with open_folder(tmp_path / "out") as folder:
        formats = [unit.format for unit in folder.manifest.units]
        assert formats.count("routed_ffn") == 1
        assert "lte" not in folder.config


def _set(name: str, tensor: torch.Tensor):
    def change(state: dict[str, torch.Tensor], config: dict[str, object]) -> None:
        state[f"model.layers.1.mlp.{name}"] = tensor

    return change


def _drop(name: str):
    return lambda state, config: state.pop(f"model.layers.1.mlp.{name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("router.weight", torch.zeros(3, 15)), r"mlp.router.weight in .* is \[3, 15\]; for 24 neurons"),
        (_set("router.weight", torch.zeros(5, 16)), r"mlp.router.weight in .* is \[5, 16\]; for 24 neurons"),
        (_set("router.weight", torch.zeros(2, 16)), r"groups of 8, 16, 32 it must be \[24 / size, 16\]"),
        (_set("permutation", torch.arange(23)), "mlp.permutation in .* is no order of 24 neurons"),
        (_set("permutation", torch.zeros(24, dtype=torch.int64)), "mlp.permutation in .* is no order of 24 neurons"),
        (_drop("up_proj.weight"), "holds no model.layers.1.mlp.up_proj.weight, though it holds a router"),
        (lambda state, config: config.update(lte={"tau": 1.0}), "lte in config.json gives tau 1.0"),
        (
            lambda state, config: state.update({"model.layers.7.mlp.router.weight": torch.zeros(3, 16)}),
            "holds model.layers.7.mlp.router.weight, but a llama model has no FFN model.layers.7.mlp",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    publish(tmp_path / "src", "llama", change=change)
    with pytest.raises(SourceError, match=message):
        convert(tmp_path / "src", tmp_path / "out", progress=False)


def test_labels_that_are_not_balanced_are_refused(tmp_path):
    uneven = _set("labels", torch.tensor([0] * 9 + [1] * 7 + [2] * 8))
    publish(tmp_path / "src", "llama", "labels", uneven)
    with pytest.raises(SourceError, match=r"mlp\.labels in .* must give each of 3 groups 8 of 24 neurons"):
        convert(tmp_path / "src", tmp_path / "out", progress=False)
