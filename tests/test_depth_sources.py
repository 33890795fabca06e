"""Checkpoints that lost layers: short folders with a wrong config, and L3Prune's merged and adapter folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pared import families
from pared.convert import convert
from pared.converters.modelling import instantiate
from pared.converters.sources.detect import open_source
from pared.embedding import Embedding
from pared.errors import MissingTensors, SourceError
from pared.tests import trained

TOKENS = torch.tensor([[1, 7, 3, 30, 39, 0, 12]])


def edit(path: Path, **changes: object) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


def cut(folder: Path, kept: list[int], renumbered: bool = True) -> Path:
    """Delete the other layers' tensors, as after a removal in memory; config.json still counts them."""
    state = load_file(folder / "model.safetensors")
    found = {}
    for name, tensor in state.items():
        before, _, rest = name.partition("layers.")
        layer, _, after = rest.partition(".")
        if not rest:
            found[name] = tensor
        elif int(layer) in kept:
            place = kept.index(int(layer)) if renumbered else int(layer)
            found[f"{before}layers.{place}.{after}"] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_short_folder_with_a_wrong_count_is_repaired(tmp_path, family):
    folder = cut(trained.checkpoint(tmp_path / "src", family), [0, 2, 5])
    with pytest.warns(UserWarning, match=r"holds 3 layers, its config\.json says 6"):
        source = open_source(folder)
    assert source.config["num_hidden_layers"] == 3
    with pytest.warns(UserWarning, match="holds 3 layers"):
        convert(folder, tmp_path / "out", progress=False)
    right = trained.model(family)
    layers = right.base_model.layers if family == "llama" else right.base_model.decoder.layers
    for i in (4, 3, 1):
        del layers[i]
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(stock(TOKENS).logits, right(TOKENS, use_cache=False).logits, atol=1e-5)


def test_a_short_folder_with_the_right_count_is_an_ordinary_one(tmp_path):
    folder = cut(trained.checkpoint(tmp_path / "src"), [0, 2, 5])
    edit(folder / "config.json", num_hidden_layers=3)
    assert open_source(folder).config["num_hidden_layers"] == 3


def test_layers_of_two_kinds_cannot_be_told_apart(tmp_path):
    folder = cut(trained.checkpoint(tmp_path / "src", "qwen2"), [0, 2, 5])
    with pytest.raises(SourceError, match=r"layer_types in its config\.json does not tell which ones"):
        open_source(folder)
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    edit(folder / "config.json", layer_types=kinds)  # a list that was cut with the blocks
    with pytest.warns(UserWarning, match="holds 3 layers"):
        assert open_source(folder).config["layer_types"] == kinds


def test_gaps_and_missing_tensors_are_refused(tmp_path):
    folder = cut(trained.checkpoint(tmp_path / "src"), [0, 1, 3, 5], renumbered=False)
    with pytest.raises(SourceError, match=r"holds 4 of 6 layers, layer 2 is not among them; .*sleb:remove="):
        open_source(folder)
    state = load_file(trained.checkpoint(tmp_path / "torn") / "model.safetensors")
    state.pop("model.layers.5.mlp.up_proj.weight")
    save_file(state, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensors, match=r"layers\.5\.mlp\.up_proj"):
        convert(tmp_path / "torn", tmp_path / "out", progress=False)


# --- L3Prune ------------------------------------------------------------------------------------


def merged(folder: Path, keep: int = 4, family: str = "llama", **settings: object) -> Path:
    """What L3Prune publishes: a bare backbone under `model.`, its config nested, and code that must not run."""
    model = trained.model(family)
    prefix = {"llama": "model.", "qwen2": "model.", "opt": "model.decoder.", "gpt2": "transformer."}[family]
    layers = {"gpt2": "h"}.get(family, "layers")
    state = {
        name: tensor.bfloat16().clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head") and not any(name.startswith(f"{prefix}{layers}.{i}.") for i in range(keep, 6))
    }
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    nested = model.config.to_dict() | {"num_hidden_layers": keep, "_name_or_path": "x/y"}
    if nested.get("layer_types"):
        nested["layer_types"] = nested["layer_types"][:keep]
    config = {
        "architectures": ["LLMEncoder"],
        "auto_map": {"AutoConfig": "llmencoder.LLMEncoderConfig", "AutoModel": "llmencoder.LLMEncoder"},
        "model_type": "llm_encoder",
        "base_model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "pooling_mode": "weighted_mean",
        "max_length": 512,
        "doc_max_length": 400,
        "skip_instruction": True,
        "model_config": nested,
    }
    (folder / "config.json").write_text(json.dumps(config | settings))
    (folder / "llmencoder.py").write_text("raise SystemExit('remote code ran')")
    trained.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_merged_encoder_is_read_without_its_code(tmp_path, family):
    folder = merged(tmp_path / "src", family=family)
    convert(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "llmencoder.py").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config and "model_config" not in config
    assert config["pared"]["provenance"]["source"]["kind"] == "l3prune"
    stock = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert config["architectures"] == [type(stock).__name__]
    right = trained.model(family)
    for parameter in right.parameters():
        parameter.copy_(parameter.bfloat16())
    hidden = right.base_model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states[4]
    norm = right.model.decoder.final_layer_norm if family == "opt" else right.model.norm
    assert torch.allclose(stock(TOKENS).last_hidden_state, norm(hidden), atol=1e-4)
    embedding = Embedding.parse(json.loads((tmp_path / "out" / "embedding.json").read_text()))
    assert embedding == Embedding("weighted_mean", "llama3", 512)


def test_a_merged_encoder_with_a_wrong_count(tmp_path):
    folder = merged(tmp_path / "src")
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", model_config=config["model_config"] | {"num_hidden_layers": 6})
    with pytest.warns(UserWarning, match="holds 4 layers"):
        assert len(families.read(open_source(folder).config).layers) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_config": None}, "no decoder's config under model_config"),
        ({"pooling_mode": "max"}, "pooling_mode 'max'"),
        ({"max_length": 0}, "max_length 0"),
    ],
)
def test_a_merged_encoder_that_is_none(tmp_path, settings, message):
    with pytest.raises(SourceError, match=message):
        open_source(merged(tmp_path / "src", **settings))


@pytest.mark.parametrize(("mode", "ours"), [("eos_token", "last"), ("last_token", "last"), ("bos_token", "cls")])
def test_other_poolings(tmp_path, mode, ours):
    source = open_source(merged(tmp_path / "src", pooling_mode=mode, skip_instruction=False, base_model="else"))
    assert Embedding.parse(json.loads(source.files["embedding.json"])) == Embedding(ours, skip_instruction=False)


def adapter(folder: Path, base: Path, layers: int) -> dict[str, torch.Tensor]:
    """A PEFT folder on the bare backbone's first layers, as L3Prune's training leaves it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 48)}
    tensors = {}
    for i in range(layers):
        for name, (n, k) in shapes.items():
            path = f"base_model.model.layers.{i}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(2, k, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(n, 2, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    own = {"pooling_mode": "mean", "max_length": 128, "doc_max_length": 100, "skip_instruction": True}
    (folder / "l3prune_config.json").write_text(json.dumps(own))
    return tensors


@pytest.mark.parametrize("place", ["4", "0.25", "run"])
def test_an_adapter_is_merged_into_the_layers_that_it_knows(tmp_path, place):
    base = trained.checkpoint(tmp_path / "base")
    factors = adapter(tmp_path / place / "checkpoint-9", base, 4)
    source = open_source(tmp_path / place / "checkpoint-9")
    assert len(families.read(source.config).layers) == 4
    found, right = instantiate(source), trained.model()
    assert {name for name in found.state_dict() if ".4." in name or ".5." in name} == set()
    for i in range(4):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            a, b = (factors[f"base_model.model.layers.{i}.{name}.lora_{side}.weight"] for side in "AB")
            weight = right.get_parameter(f"model.layers.{i}.{name}.weight")
            assert torch.allclose(found.get_parameter(f"model.layers.{i}.{name}.weight"), weight + 2 * b @ a, atol=1e-5)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert Embedding.parse(json.loads(source.files["embedding.json"])) == Embedding("mean", max_length=128)


def test_an_adapter_in_another_place(tmp_path):
    base = trained.checkpoint(tmp_path / "base")
    adapter(tmp_path / "5" / "checkpoint-9", base, 4)
    with pytest.raises(SourceError, match=r"adapts 4 layers, but by its place 5/ it has 5 of 6"):
        open_source(tmp_path / "5" / "checkpoint-9")
    shutil.copytree(tmp_path / "5", tmp_path / "named")
    assert len(families.read(open_source(tmp_path / "named" / "checkpoint-9").config).layers) == 4
