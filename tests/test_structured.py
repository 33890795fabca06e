"""Layers with fewer heads and neurons: found as zeros or as smaller tensors, stored as they are, run exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import pared.hf
from pared import errors, families
from pared.compact import open_folder
from pared.compact_writer import FolderWriter
from pared.convert import convert, export
from pared.converters import modelling
from pared.converters.pack import pack
from pared.converters.removal import drop_zeros
from pared.converters.sources.detect import open_source
from pared.reports import folder_report
from pared.runtime.llm import LLM
from pared.runtime.loader import load
from pared.runtime.params import SamplingParams
from pared.tests import tiny
from pared.tests.compressed import spec_of
from pared.tests.test_model import Runner, theirs

assert pared.hf.METHOD  # importing it registers the quantizer

TOKENS = [1, 7, 3, 30, 39, 8, 12, 5, 22, 9]
NEURONS = (1, 4, 7, 9, 12, 15, 20, 23)
FAMILIES = ("llama", "llama-tied-biased", "qwen2-tied", "qwen3", "phi3", "opt-projected", "gpt2")


def gone(spec, i: int) -> list[int]:
    """The heads that layer i loses: in GQA the second group whole, or one head of each group; else two of four."""
    if spec.layers[i].kv_heads == spec.layers[i].heads:
        return [[1, 3], []][i]
    return [[2, 3], [0, 3]][i]


def expected_widths(name: str) -> list[tuple[int, int, int]]:
    ffn = 64 if name == "gpt2" else 24
    return [(2, 2, ffn - 8), (4, 4, ffn)] if name in ("opt-projected", "gpt2") else [(2, 1, ffn - 8), (2, 2, ffn)]


def pruned(name: str, side: str) -> hf.PreTrainedModel:
    """`tiny.model(name)` whose layer 0 lost eight neurons and some heads, layer 1 heads alone, saved as zeros.

    side: "inputs" zeroes what computes a neuron or a head's values, biases too; "outputs" what reads them.
    """
    model = tiny.model(name)
    spec, state = spec_of(model), dict(model.named_parameters())
    names, size = spec.names, spec.head_dim

    def zero(path: str, rows: list[int], dim: int) -> None:
        weight = state[f"{path}.weight"]
        (weight.t() if spec.transposed else weight).index_fill_(dim, torch.tensor(rows, dtype=torch.int64), 0)
        if dim == 0 and f"{path}.bias" in state:
            state[f"{path}.bias"][rows] = 0

    with torch.no_grad():
        for i, layer in enumerate(spec.layers):
            neurons, heads = (NEURONS if i == 0 else []), gone(spec, i)
            groups = sorted({h * layer.kv_heads // layer.heads for h in heads}) if i == 0 else []
            if side == "outputs" or not groups:
                zero(spec.path(i, names.out), [h * size + d for h in heads for d in range(size)], 1)
            else:
                before = 0 if len(names.qkv) == 3 else (layer.heads + layer.kv_heads) * size
                zero(spec.path(i, names.qkv[-1]), [before + g * size + d for g in groups for d in range(size)], 0)
            if side == "outputs":
                zero(spec.path(i, names.ffn_out), list(neurons), 1)
            else:
                up = [n + (layer.ffn if name.startswith("phi3") else 0) for n in neurons]
                zero(spec.path(i, names.ffn_in[-1]), up, 0)
    return model


def saved(path: Path, model: hf.PreTrainedModel) -> Path:
    """`model` with the tokenizer of tiny.checkpoint."""
    tiny.checkpoint(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path)
    return path


def close(ours: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool((ours - truth).abs().max() <= 1e-6 * max(1.0, float(truth.abs().max())))


def ours(folder: Path, prompt: int) -> torch.Tensor:
    """Logits of every position: the prompt in two chunks, the rest decoded token by token."""
    runner = Runner(load(folder, device="cpu"))
    sequence = runner.sequence(TOKENS, floor=prompt)
    runner.run([(sequence, prompt - 2)])
    runner.run([(sequence, 2)])
    while sequence.done < len(TOKENS):
        runner.run([(sequence, 1)])
    return torch.stack(sequence.logits)


def widths(folder: Path) -> list[tuple[int, int, int]]:
    with open_folder(folder) as opened:
        return [(y.heads, y.kv_heads, y.ffn) for y in families.read(opened.config).layers]


# --- saved as zeros ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_zero_goes_and_nothing_else_changes(tmp_path, name, side):
    model = pruned(name, side)
    src, out = saved(tmp_path / "src", model), tmp_path / "out"
    convert(src, out, progress=False)
    assert widths(out) == expected_widths(name)
    assert close(ours(out, 6), theirs(model, TOKENS, 6))

    through_hf = hf.AutoModelForCausalLM.from_pretrained(out).eval()
    assert close(theirs(through_hf, TOKENS, 6), theirs(model, TOKENS, 6))
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(torch.tensor([TOKENS]), **greedy)
    assert torch.equal(through_hf.generate(torch.tensor([TOKENS]), **greedy), answer)
    done = next(iter(LLM(out, device="cpu").generate([TOKENS], SamplingParams(max_tokens=6, ignore_eos=True))))
    assert done.token_ids == answer[0, len(TOKENS) :].tolist()

    plain = hf.AutoModelForCausalLM.from_pretrained(export(out, tmp_path / "plain", progress=False)).eval()
    assert close(theirs(plain, TOKENS, 6), theirs(model, TOKENS, 6))


def test_the_conversion_says_what_it_removed(tmp_path):
    convert(saved(tmp_path / "src", pruned("llama", "outputs")), tmp_path / "out", progress=False)
    with open_folder(tmp_path / "out") as opened:
        why = {path: unit.why for unit in opened.manifest.units for path in unit.modules}
        kinds = {kind.kind: kind for kind in folder_report(opened).kinds}
        assert not opened.stock
    assert why["model.layers.0.mlp.down_proj"] == "removed 8 of 24 neurons"
    assert why["model.layers.0.self_attn.k_proj"] == "removed 2 of 4 heads in 1 of 2 groups"
    assert why["model.layers.1.self_attn.q_proj"] == "removed 2 of 4 heads"
    assert why["model.layers.1.self_attn.k_proj"] == why["model.layers.1.mlp.up_proj"] == ""
    assert kinds["mlp.up_proj"].weights == {"removed 8 of 24 neurons": 1}
    assert kinds["mlp.up_proj"].compact_bytes == (16 + 24) * 16 * 4


def test_what_is_left_keeps_its_bits(tmp_path):
    """Cut in the stream, sharded, GPT-2's transposed weights included."""
    model = pruned("gpt2", "inputs")
    convert(saved(tmp_path / "src", model), tmp_path / "out", progress=False, max_shard_bytes=3000)
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) > 3
    kept = [n for n in range(64) if n not in NEURONS]
    with open_folder(tmp_path / "out") as opened:
        down, up = (opened.tensor(f"transformer.h.0.mlp.{name}.weight") for name in ("c_proj", "c_fc"))
        bias = opened.tensor("transformer.h.0.mlp.c_fc.bias")
    mlp = model.transformer.h[0].mlp
    assert torch.equal(down, mlp.c_proj.weight[kept])
    assert torch.equal(up, mlp.c_fc.weight[:, kept])
    assert torch.equal(bias, mlp.c_fc.bias[kept])


def test_an_interrupted_conversion_goes_on(tmp_path):
    source = drop_zeros(open_source(saved(tmp_path / "src", pruned("llama", "outputs"))))

    def some(skip):
        for i, pair in enumerate(source.tensors(skip)):
            if i == 9:
                raise KeyboardInterrupt
            yield pair

    def run(target: Path, tensors) -> Path:
        with FolderWriter(target, resume_key="k", max_shard_bytes=1000) as writer:
            pack(replace(source, tensors=tensors), writer, progress=False)
            writer.finish(source.config, {}, {})
            return writer.publish()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", some)
    assert list((tmp_path / "out.partial").glob("shard-*"))
    whole, resumed = run(tmp_path / "whole", source.tensors), run(tmp_path / "out", source.tensors)
    with open_folder(whole) as a, open_folder(resumed) as b:
        assert a.manifest == b.manifest


def test_the_same_loss_everywhere_is_an_ordinary_folder(tmp_path):
    model = tiny.model("qwen3")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :8] = 0
            layer.self_attn.o_proj.weight[:, 16:] = 0
    convert(saved(tmp_path / "src", model), tmp_path / "out", progress=False)
    with open_folder(tmp_path / "out") as opened:
        assert opened.stock
        assert "layer_widths" not in opened.config
        told = [opened.config[k] for k in ("num_attention_heads", "num_key_value_heads", "intermediate_size")]
    assert told == [2, 1, 16]
    assert close(ours(tmp_path / "out", 6), theirs(model, TOKENS, 6))


def test_what_contributes_stays(tmp_path):
    """A zero row with a bias that the activation lets through, a lone dead neuron, a head with a bias on its values."""
    model = tiny.model("opt-projected")
    first, second = model.model.decoder.layers
    with torch.no_grad():
        first.fc1.weight[:8] = 0
        first.fc1.bias[:8] = torch.tensor([-1, -2, 0, -3, -1, -1, -1, 0.5])  # relu: the last one is heard
        second.fc1.weight[3], second.fc1.bias[3] = 0, 0
        second.self_attn.v_proj.weight[:4], second.self_attn.v_proj.bias[:4] = 0, 0.1
    convert(saved(tmp_path / "src", model), tmp_path / "out", progress=False)
    assert widths(tmp_path / "out") == [(4, 4, 24), (4, 4, 24)]
    with torch.no_grad():
        first.fc1.bias[7] = -0.5
    convert(saved(tmp_path / "again", model), tmp_path / "out2", progress=False)
    assert widths(tmp_path / "out2") == [(4, 4, 16), (4, 4, 24)]
    assert close(ours(tmp_path / "out2", 6), theirs(model, TOKENS, 6))


def test_a_layer_without_anything_left_keeps_a_silent_head_and_neurons(tmp_path):
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    convert(saved(tmp_path / "src", model), tmp_path / "out", progress=False)
    assert widths(tmp_path / "out") == [(4, 2, 24), (1, 1, 8)]
    assert close(ours(tmp_path / "out", 6), theirs(model, TOKENS, 6))


def test_columns_of_a_two_four_matrix_go_by_whole_groups(tmp_path):
    model = tiny.model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            down = layer.mlp.down_proj.weight
            down.view(16, 6, 4)[:, :, :2] = 0
        down.view(16, 6, 4)[:, (1, 3, 4)] = 0
    convert(saved(tmp_path / "src", model), tmp_path / "out", progress=False)
    assert widths(tmp_path / "out") == [(4, 2, 24), (4, 2, 16)]
    with open_folder(tmp_path / "out") as opened:
        down = next(unit for unit in opened.manifest.units if "model.layers.1.mlp.down_proj" in unit.modules)
    assert down.why.startswith("removed 8 of 24 neurons; 2:4")
    assert close(ours(tmp_path / "out", 6), theirs(model, TOKENS, 6))


def test_dense_means_as_it_is(tmp_path):
    src = saved(tmp_path / "src", pruned("llama", "outputs"))
    convert(src, tmp_path / "out", format="dense", progress=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(src / "model.safetensors").items())


def test_what_is_no_number_is_named_even_where_it_would_go(tmp_path):
    model = pruned("llama", "outputs")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[4, 2] = torch.inf
    with pytest.raises(errors.BadWeights, match=r"layers\.0\.mlp\.up_proj\.weight\[4, 2\] is inf"):
        convert(saved(tmp_path / "src", model), tmp_path / "out", progress=False)


LOAD = """
import sys, transformers as hf
try:
    hf.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as stopped:
    print("stopped:", " ".join(str(stopped).split()))
assert not any(name.split(".")[0] == "pared" for name in sys.modules)
"""


def test_without_us_it_stops_loudly(tmp_path):
    convert(saved(tmp_path / "src", pruned("llama", "outputs")), tmp_path / "out", progress=False)
    done = subprocess.run([sys.executable, "-P", "-c", LOAD, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("stopped:")
    assert "mismatch" in done.stdout


# --- saved as smaller tensors -----------------------------------------------------------------------


def narrow(path: Path, change=lambda state, config: None) -> tuple[Path, hf.PreTrainedModel]:
    """A Llama folder whose layer 0 lacks eight neurons and the second group, cut by hand; and the model with zeros."""
    model = pruned("llama", "outputs")
    with torch.no_grad():  # layer 1 whole
        model.model.layers[1].load_state_dict(tiny.model("llama").model.layers[1].state_dict())
    src = saved(path, model)
    state, config = load_file(src / "model.safetensors"), json.loads((src / "config.json").read_text())
    kept = [n for n in range(24) if n not in NEURONS]
    for name in ("gate", "up"):
        key = f"model.layers.0.mlp.{name}_proj.weight"
        state[key] = state[key][kept].clone()
    state["model.layers.0.mlp.down_proj.weight"] = state["model.layers.0.mlp.down_proj.weight"][:, kept].clone()
    for name, rows in {"q": 8, "k": 4, "v": 4}.items():
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        state[key] = state[key][:rows].clone()
    state["model.layers.0.self_attn.o_proj.weight"] = state["model.layers.0.self_attn.o_proj.weight"][:, :8].clone()
    change(state, config)
    save_file(state, src / "model.safetensors")
    (src / "config.json").write_text(json.dumps(config))
    return src, model


def per_layer(config: dict) -> None:
    own = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    config["per_layer_config"] = {"00": own}


CONFIGS = {
    "the dense model's numbers": lambda state, config: config.pop("head_dim"),
    "one wrong number": lambda state, config: config.update(intermediate_size=16),
    "lists": lambda state, config: (
        config.pop("head_dim"),
        config.update(num_attention_heads=[2, 4], num_key_value_heads=[1, 2], intermediate_size=[16, 24]),
    ),
    "a list of widths alone": lambda state, config: config.update(intermediate_size=[16, 24]),
    "per_layer_config": lambda state, config: per_layer(config),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_tensors_say_how_wide_a_layer_is(tmp_path, case):
    src, model = narrow(tmp_path / "src", CONFIGS[case])
    convert(src, tmp_path / "out", progress=False)
    assert widths(tmp_path / "out") == [(2, 1, 16), (4, 2, 24)]
    assert close(ours(tmp_path / "out", 6), theirs(model, TOKENS, 6))
    through_hf = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert close(theirs(through_hf, TOKENS, 6), theirs(model, TOKENS, 6))


def keep(state: dict, rows: dict[str, int]) -> None:
    """The first rows, or columns of o and down, of these linears of both layers."""
    for i in range(2):
        for name, count in rows.items():
            key = f"model.layers.{i}.{name}_proj.weight"
            state[key] = (state[key][:, :count] if name[-2:] in (".o", "wn") else state[key][:count]).clone()


BROKEN = {
    "lists of another order": (
        lambda s, c: c.update(intermediate_size=[24, 16]),
        "intermediate_size in config.json lists 24 for layer 0, its tensors have 16",
    ),
    "a short list": (
        lambda s, c: c.update(num_key_value_heads=[1]),
        "num_key_value_heads in config.json lists None for layer 1, its tensors have 2",
    ),
    "a number of heads for which heads differ in size": (
        lambda s, c: (c.pop("head_dim"), c.update(num_attention_heads=[4, 4], num_key_value_heads=[2, 2])),
        r"leaves open how many heads .* \[8, 16\] wide; write the size of a head into it as head_dim",
    ),
    "no whole head": (lambda s, c: c.update(head_dim=6), "layer 0 has 8 outputs of q and 4 of k, which are not whole"),
    "no layer left whole": (
        lambda s, c: (
            c.pop("head_dim"),
            keep(s, {"self_attn.q": 8, "self_attn.k": 4, "self_attn.v": 4, "self_attn.o": 8}),
        ),
        r"leaves open how many heads .* \[8\] wide",
    ),
    "more than widths by layer": (
        lambda s, c: c.update(per_layer_config={"00": {"intermediate_size": 16}, "01": {"sliding_window": 4}}),
        "per_layer_config gives layer 1 its own sliding_window; pared knows num_attention_heads",
    ),
    "a list of layers that is none": (
        lambda s, c: c.update(per_layer_config={"first": {"intermediate_size": 16}}),
        "per_layer_config in config.json is no object of layers",
    ),
    "gate and up of different widths": (
        lambda s, c: keep(s, {"mlp.gate": 12}) or c.update(intermediate_size=[16, 24]),
        "layer 0 lacks linears, or they do not fit each other",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_where_config_and_tensors_disagree_the_layer_is_named(tmp_path, case):
    change, message = BROKEN[case]
    src, _ = narrow(tmp_path / "src", change)
    with pytest.raises(errors.SourceError, match=message):
        convert(src, tmp_path / "out", progress=False)


def test_one_tensor_of_a_wrong_shape_is_still_that(tmp_path):
    src, _ = narrow(tmp_path / "src", lambda s, c: s.update({"model.layers.1.mlp.up_proj.weight": torch.ones(23, 16)}))
    with pytest.raises(errors.WrongShape, match=r"its config\.json says"):
        convert(src, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"heads": 4, "kv_heads": 2, "ffn": 24}], "must list 2 layers"),
        ([{"heads": 3, "kv_heads": 2, "ffn": 24}] * 2, "gives layer 0 .*multiples of kv_heads"),
        ([{"heads": 4, "kv_heads": 2, "ffn": 0}] * 2, "gives layer 0 .*positive"),
        ([4, 2], "gives layer 0 4"),
    ],
)
def test_widths_of_a_damaged_config(given, message):
    config = json.loads(tiny.CONFIGS["llama"].to_json_string()) | {"layer_widths": given}
    with pytest.raises(errors.UnsupportedModel, match=message):
        families.read(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_methods_see_the_narrow_model(tmp_path, name):
    """What a method works on, and what it hands on."""
    model = pruned(name, "outputs")
    narrow_source = drop_zeros(open_source(saved(tmp_path / "src", model)))
    made = modelling.instantiate(narrow_source)
    truth = model(torch.tensor([TOKENS])).logits.detach()
    assert close(made(torch.tensor([TOKENS])).logits, truth)
    again = modelling.instantiate(modelling.as_source(made, narrow_source))
    assert close(again(torch.tensor([TOKENS])).logits, truth)
    shapes = {n: p.shape for n, p in made.named_parameters()}
    assert shapes == {n: p.shape for n, p in again.named_parameters()}
    assert shapes != {n: p.shape for n, p in model.named_parameters()}


def test_blocks_of_a_narrow_model_can_go(tmp_path):
    src, model = narrow(tmp_path / "src")
    convert(src, tmp_path / "out", methods=["sleb:remove=1"], progress=False)
    assert widths(tmp_path / "out") == [(2, 1, 16)]
    del model.model.layers[1]
    assert close(ours(tmp_path / "out", 6), theirs(model, TOKENS, 6))
