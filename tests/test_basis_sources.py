"""Published checkpoints of factored weights: read as units, bit for bit, and refused by name where they are broken."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from pared import errors, families
from pared.compact import open_folder
from pared.compact_writer import FolderWriter
from pared.convert import convert, export
from pared.converters import modelling
from pared.converters.pack import pack
from pared.converters.sources.detect import open_source
from pared.runtime.loader import load
from pared.tests import compressed, tiny
from pared.tests.compressed import GPT2, LLAMA, OPT

TOKENS = torch.tensor([[1, 7, 3, 30, 39, 0, 12]])
CASES = {
    "llama": ("llama", LLAMA),
    "llama-tied-biased": ("llama-tied-biased", LLAMA),
    "mistral": ("mistral", LLAMA),
    "opt": ("opt-projected", OPT),
    "gpt2": ("gpt2", GPT2),
}


def everything(_: str) -> bool:
    return False


def same_unit(ours, theirs) -> bool:
    return (
        ours.modules == theirs.modules
        and ours.tensors.keys() == theirs.tensors.keys()
        and all(torch.equal(ours.tensors[role], theirs.tensors[role]) for role in theirs.tensors)
    )


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("pickled", [True, False], ids=["bin", "safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_a_published_checkpoint_becomes_units(tmp_path, case, pickled, shards):
    name, groups = CASES[case]
    model = tiny.model(name)
    path = compressed.publish(tmp_path / "src", model, groups)
    compressed.repack(path, shards, pickled)
    source = open_source(path)
    made = compressed.units(model, groups)
    found = {tuple(unit.modules): unit for unit in source.units()}
    assert source.kind == "basis_sharing"
    assert found.keys() == made.keys()
    assert all(same_unit(found[paths], made[paths]) for paths in made)
    assert [min(map(layer, paths)) for paths in found] == sorted(min(map(layer, paths)) for paths in found)

    served = {f"{p}.{role}" for paths in made for p in paths for role in ("weight", "bias")}
    rest = dict(source.tensors(everything))
    assert not any("_basis" in name or name in served for name in rest)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in rest.items())
    spec = families.read(source.config)
    assert spec == families.read(json.loads(model.config.to_json_string()))
    assert source.config["architectures"] == [type(model).__name__]
    private = [key for key in source.config if re.search(r"basis|_groups$", key)]
    assert not private and "use_cache" not in source.config


def layer(path: str) -> int:
    return next(int(part) for part in path.split(".") if part.isdigit())


def test_a_pickle_keeps_its_aliases_and_loses_nothing_where_it_lost_them(tmp_path):
    """Either way the basis of a group is read once."""
    model = tiny.model("llama")
    aliased = compressed.publish(tmp_path / "aliased", model, LLAMA)
    state = torch.load(aliased / "pytorch_model.bin", weights_only=True)
    names = [name for name in state if ".q_basis." in name]
    assert len(names) == 4 and len({state[name].data_ptr() for name in names}) == 1
    cloned = compressed.publish(
        tmp_path / "cloned", model, LLAMA, lambda s, _: s.update({n: t.clone() for n, t in s.items()})
    )
    for first, second in zip(open_source(aliased).units(), open_source(cloned).units(), strict=True):
        assert same_unit(first, second)
    one = compressed.publish(tmp_path / "one", model, LLAMA, lambda s, _: [s.pop(n) for n in names[1:]])
    assert len(list(open_source(one).units())) == len(compressed.units(model, LLAMA))


@pytest.mark.parametrize("case", CASES)
def test_converted_it_gives_the_logits_of_two_plain_products(tmp_path, case):
    name, groups = CASES[case]
    model = tiny.model(name)
    path = compressed.publish(tmp_path / "src", model, groups)
    before, after = convert(path, tmp_path / "out", progress=False).rows
    assert (before.name, after.name) == ("original", "out")
    assert after.bytes_per_token < before.bytes_per_token
    expected = compressed.plain_model(model, compressed.units(model, groups))(TOKENS).logits
    dense = hf.AutoModelForCausalLM.from_pretrained(export(tmp_path / "out", tmp_path / "dense", progress=False))
    scale = expected.abs().max()
    assert (dense.eval()(TOKENS).logits - expected).abs().max() <= 1e-5 * scale
    assert (model(TOKENS).logits - expected).abs().max() > 1e-2 * scale
    assert load(tmp_path / "out", device="cpu").dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
def test_it_becomes_a_model_in_memory(tmp_path, case):
    """What methods and recovery work on: BasisLinear modules, one basis to a group."""
    name, groups = CASES[case]
    model = tiny.model(name)
    made = compressed.units(model, groups)
    ours = modelling.instantiate(open_source(compressed.publish(tmp_path / "src", model, groups)))
    assert sum(isinstance(module, modelling.BasisLinear) for module in ours.modules()) == sum(map(len, made))
    expected = compressed.plain_model(model, made)(TOKENS).logits
    assert (ours(TOKENS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    found = modelling.units(ours)
    assert found.keys() == made.keys() and all(same_unit(found[paths], made[paths]) for paths in made)


def test_an_interrupted_conversion_goes_on_after_its_units(tmp_path):
    path = compressed.publish(tmp_path / "src", tiny.model("llama"), LLAMA)
    source = open_source(path)

    def some():
        for i, unit in enumerate(source.units()):
            if i == 4:
                raise KeyboardInterrupt
            yield unit

    def run(target: Path, units) -> Path:
        with FolderWriter(target, resume_key="k", max_shard_bytes=1000) as writer:
            pack(replace(source, units=units), writer, progress=False)
            writer.finish(source.config, {}, {})
            return writer.publish()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", some)
    kept = sorted(file.name for file in (tmp_path / "out.partial").glob("shard-*"))
    assert kept
    whole, resumed = run(tmp_path / "whole", source.units), run(tmp_path / "out", source.units)
    with open_folder(whole) as a, open_folder(resumed) as b:
        assert a.manifest == b.manifest


def test_kinds_and_layers_without_a_basis_are_dense(tmp_path):
    model = tiny.model("opt-projected")
    groups = {"q": ([[1]], 9), "down": ([[0, 1]], 8)}
    source = open_source(compressed.publish(tmp_path / "src", model, groups))
    assert [list(unit.modules) for unit in source.units()] == [
        ["model.decoder.layers.0.fc2", "model.decoder.layers.1.fc2"],
        ["model.decoder.layers.1.self_attn.q_proj"],
    ]
    rest = dict(source.tensors(everything))
    assert rest["model.decoder.layers.0.self_attn.q_proj.weight"].shape == (16, 16)


# --- broken ones ------------------------------------------------------------------------------------

Q0, Q1 = "model.q_basis.0.weight", "model.q_basis.1.weight"
BROKEN = {
    "rank above the matrix": (
        lambda s, c: (
            s.update({n: torch.ones(17, 16) for n in s if "q_basis" in n}),
            c.update(num_basis_q=17),
        ),
        r"q_basis\.0\.weight .* has rank 17, above what its \[32, 16\] matrix can have",
    ),
    "rank that the config denies": (
        lambda s, c: c.update(num_basis_q=8),
        r"q_basis\.0\.weight .* has rank 9, its config\.json says 8",
    ),
    "a group across a removed block": (
        lambda s, c: c.update(q_groups=[[0, 2]]),
        r"q_groups .* names layer 2 of a model with 2 layers; .*removed",
    ),
    "a layer missing from the groups": (
        lambda s, c: c.update(q_groups=[[0]]),
        r"model\.q_basis\.1\.weight, but layer 1 is missing from q_groups",
    ),
    "a layer in two groups": (lambda s, c: c.update(q_groups=[[0, 1], [1]]), "q_groups .* names layer 1 twice"),
    "no groups": (lambda s, c: c.pop("q_groups"), "no lists of layers under q_groups"),
    "groups of something else": (lambda s, c: c.update(q_groups=[0, 1]), "no lists of layers under q_groups"),
    "aliases that differ": (
        lambda s, c: s.update({Q1: s[Q1] + 1e-6}),
        rf"{Q0} and {Q1} .* stand for one basis and differ",
    ),
    "the basis of another layer's width": (
        lambda s, c: s.update({n: torch.ones(9, 24) for n in s if "q_basis" in n}),
        r"is \[9, 24\], but model\.layers\.0\.self_attn\.q_proj reads 16 inputs: it is the basis of another layer",
    ),
    "missing coefficients": (
        lambda s, c: s.pop("model.layers.1.self_attn.q_proj.weight"),
        r"holds no model\.layers\.1\.self_attn\.q_proj\.weight, though it holds the basis",
    ),
    "coefficients of another rank": (
        lambda s, c: s.update({"model.layers.1.self_attn.q_proj.weight": torch.ones(16, 8)}),
        r"q_proj\.weight .* is \[16, 8\], over its basis it must be \[16, 9\]",
    ),
    "a basis that is gone": (
        lambda s, c: (
            [s.pop(n) for n in list(s) if re.search(r"k_basis.1|1\..*k_basis", n)],
            c.update(k_groups=[[0], [1]]),
        ),
        r"no k_basis tensor for the layers \[1\]",
    ),
    "a kind that the family lacks": (
        lambda s, c: s.update({"model.attn_basis.0.weight": torch.ones(9, 16)}),
        "bases of kind 'attn'; llama has q, k, v, o, gate, up, down",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, what):
    change, message = BROKEN[what]
    path = compressed.publish(tmp_path / "src", tiny.model("llama"), LLAMA, change)
    with pytest.raises(errors.SourceError, match=message):
        list(open_source(path).units())


def test_a_missing_bias_is_refused_by_name(tmp_path):
    path = compressed.publish(
        tmp_path / "src", tiny.model("gpt2"), GPT2, lambda s, _: s.pop("transformer.h.1.attn.c_attn.bias")
    )
    with pytest.raises(errors.SourceError, match=r"no transformer\.h\.1\.attn\.c_attn\.bias"):
        list(open_source(path).units())


def test_nan_in_a_basis_is_refused_and_leaves_nothing(tmp_path):
    def poison(state, _):
        state[Q0][3, 5] = float("nan")  # all aliases are one storage

    path = compressed.publish(tmp_path / "src", tiny.model("llama"), LLAMA, poison)
    with pytest.raises(errors.BadWeights, match=r"layers\.0\.self_attn\.q_proj\.basis\[3, 5\] is nan"):
        convert(path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_code_in_a_pickle_does_not_run(tmp_path):
    path = compressed.publish(tmp_path / "src", tiny.model("llama"), LLAMA)
    torch.save({"x": Path}, path / "pytorch_model.bin")
    with pytest.raises(errors.SourceError, match="never runs"):
        open_source(path)


# --- adapters ---------------------------------------------------------------------------------------


def adapter(path: Path, base: Path | str, deltas: dict[str, tuple[int, int]], pickled: bool = False, **config) -> dict:
    """A PEFT folder of random factors of rank 2 for modules [N, K]; returns its tensors."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for module, (n, k) in deltas.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, k, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(n, 2, generator=generator)
    path.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": str(base)}
    (path / "adapter_config.json").write_text(json.dumps(settings | config))
    if pickled:
        torch.save(tensors, path / "adapter_model.bin")
    else:
        save_file(tensors, path / "adapter_model.safetensors")
    return tensors


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("options", "scale"), [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5)], ids=["plain", "rs"])
def test_an_adapter_is_merged_into_coefficients_and_bases(tmp_path, options, scale, pickled):
    model = tiny.model("llama")
    compressed.publish(tmp_path / "base", model, LLAMA)
    v, b = "model.layers.1.self_attn.v_proj", "model.v_basis.1"
    targets = {v: (8, 5), b: (5, 16), "model.layers.1.self_attn.v_basis": (5, 16)}
    factors = adapter(tmp_path / "lora", "../base", targets, pickled, **options)
    second = "base_model.model.model.layers.1.self_attn.v_basis"
    for side in "AB":  # the alias under the layer is the same module: train it alike
        factors[f"{second}.lora_{side}.weight"] = factors[f"base_model.model.{b}.lora_{side}.weight"]
    save = torch.save if pickled else save_file
    save(
        {n: t.clone() for n, t in factors.items()},
        tmp_path / "lora" / f"adapter_model.{'bin' if pickled else 'safetensors'}",
    )
    source = open_source(tmp_path / "lora")
    before = compressed.units(model, LLAMA)[(v,)].tensors
    (after,) = [unit.tensors for unit in source.units() if list(unit.modules) == [v]]

    def delta(module: str) -> torch.Tensor:
        a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        return scale * (b @ a)

    assert torch.allclose(after[f"coefficients.{v}"], before[f"coefficients.{v}"] + delta(v), atol=1e-6)
    assert torch.allclose(after["basis"], before["basis"] + delta(b), atol=1e-6)
    assert source.fingerprint != open_source(tmp_path / "base").fingerprint


def test_an_adapter_on_one_alias_alone_breaks_the_sharing(tmp_path):
    compressed.publish(tmp_path / "base", tiny.model("llama"), LLAMA)
    adapter(tmp_path / "lora", "../base", {"model.q_basis.1": (9, 16)})
    with pytest.raises(errors.SourceError, match=rf"q_basis\S+ and {Q1} .* differ"):
        list(open_source(tmp_path / "lora").units())


@pytest.mark.parametrize("flip", [False, True])
def test_an_adapter_on_a_dense_model_is_what_peft_would_merge(tmp_path, flip):
    model = tiny.model("gpt2" if flip else "llama")
    tiny.checkpoint(tmp_path / "base", "gpt2" if flip else "llama")
    module = "transformer.h.0.attn.c_attn" if flip else "model.layers.0.self_attn.q_proj"
    factors = adapter(
        tmp_path / "lora", tmp_path / "base", {module: (48, 16) if flip else (16, 16)}, fan_in_fan_out=flip
    )
    a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    delta = 4 * (b @ a)
    merged = dict(open_source(tmp_path / "lora").tensors(everything))
    stored = model.state_dict()
    assert torch.allclose(merged.pop(f"{module}.weight"), stored[f"{module}.weight"] + (delta.t() if flip else delta))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in merged.items())


REFUSED_ADAPTERS = {
    "a base elsewhere": ({"base_model_name_or_path": "org/name"}, r"adapter on 'org/name', which is no folder here"),
    "DoRA": ({"use_dora": True}, "use_dora True"),
    "trained biases": ({"bias": "all"}, "bias 'all'"),
    "another method": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha None"),
}


@pytest.mark.parametrize("what", REFUSED_ADAPTERS)
def test_adapters_that_cannot_be_merged_exactly(tmp_path, what):
    config, message = REFUSED_ADAPTERS[what]
    tiny.checkpoint(tmp_path / "base")
    adapter(tmp_path / "lora", tmp_path / "base", {"model.layers.0.self_attn.q_proj": (16, 16)}, **config)
    with pytest.raises(errors.SourceError, match=message):
        open_source(tmp_path / "lora")


def test_adapters_that_do_not_fit_their_base(tmp_path):
    tiny.checkpoint(tmp_path / "base")
    adapter(tmp_path / "far", tmp_path / "base", {"model.layers.7.self_attn.q_proj": (16, 16)})
    with pytest.raises(errors.SourceError, match=r"adapts model\.layers\.7\.self_attn\.q_proj\.weight, which its base"):
        open_source(tmp_path / "far")
    adapter(tmp_path / "wide", tmp_path / "base", {"model.layers.0.self_attn.q_proj": (16, 24)})
    with pytest.raises(
        errors.SourceError, match=r"is \[16, 16\], its adapter's factors are A \[2, 24\] and B \[16, 2\]"
    ):
        list(open_source(tmp_path / "wide").tensors(everything))
    tensors = adapter(tmp_path / "half", tmp_path / "base", {"model.layers.0.self_attn.q_proj": (16, 16)})
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(tensors, tmp_path / "half" / "adapter_model.safetensors")
    with pytest.raises(errors.SourceError, match="only one of lora_A and lora_B"):
        open_source(tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    with pytest.raises(errors.SourceError, match="adapter without"):
        open_source(tmp_path / "half")
    adapter(tmp_path / "odd", tmp_path / "base", {})
    save_file(
        {"base_model.model.x.lora_magnitude_vector": torch.ones(2)}, tmp_path / "odd" / "adapter_model.safetensors"
    )
    with pytest.raises(errors.SourceError, match="lora_magnitude_vector, which is no LoRA factor"):
        open_source(tmp_path / "odd")


# --- SVD-LLM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt-projected"])
def test_private_factors(tmp_path, name):
    model = tiny.model(name)
    groups = {kind: ([[0], [1]], rank) for kind, (_, rank) in (OPT if name != "llama" else LLAMA).items()}
    made = compressed.units(model, groups)

    def split(state, config):
        for paths in made:
            (path,) = paths
            stem = path.removesuffix("_proj")
            unit = made[paths].tensors
            state[f"{stem}_u_proj.weight"] = unit[f"coefficients.{path}"]
            state[f"{stem}_v_proj.weight"] = unit["basis"]
            state.pop(f"{path}.weight")
            if f"bias.{path}" in unit:
                state[f"{stem}_u_proj.bias"] = state.pop(f"{path}.bias")
        for key in [key for key in state if "_basis" in key]:
            state.pop(key)
        config.update(architectures=["SVD_LlamaForCausalLM"], ratio=0.8)

    path = compressed.publish(tmp_path / "src", model, groups, split)
    source = open_source(path)
    assert source.kind == "svd_llm"
    found = {tuple(unit.modules): unit for unit in source.units()}
    assert found.keys() == made.keys() and all(same_unit(found[paths], made[paths]) for paths in made)
    state = torch.load(path / "pytorch_model.bin", weights_only=True)
    state.pop(next(key for key in state if key.endswith("_v_proj.weight")))
    torch.save(state, path / "pytorch_model.bin")
    with pytest.raises(errors.SourceError, match=r"_u_proj\.weight, but there is no .*_v_proj\.weight"):
        open_source(path)
