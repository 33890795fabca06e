"""Compressed folders in our runtime: equal to two plain products, one tensor for a shared basis, refused where broken;
and the golden folder that every later pared must read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from pared import errors
from pared.compact import file_sha256, open_folder
from pared.convert import export
from pared.evaluate import decoder_logits
from pared.kernels.unit import Unit
from pared.reports import folder_report
from pared.runtime.llm import LLM
from pared.runtime.loader import load
from pared.runtime.params import SamplingParams
from pared.tests import compressed, tiny
from pared.tests.compressed import GPT2, LLAMA, OPT

TOKENS = torch.tensor([1, 7, 3, 30, 39, 0, 12])
MODELS = {
    "llama": LLAMA,
    "llama-tied-biased": LLAMA,
    "qwen2-tied": LLAMA,
    "qwen3": {"q": ([[0, 1]], 9), "up": ([[0, 1]], 7)},
    "phi3": {"attn": ([[0, 1]], 12), "o": ([[1]], 5), "up": ([[0, 1]], 12), "down": ([[0], [1]], 8)},
    "opt-projected": OPT,
    "gpt2": GPT2,
}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    found, expected = found.detach(), expected.detach()
    assert expected.std() > 0.05, "the model says nothing: the comparison would prove nothing"
    return bool((found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_two_plain_products(tmp_path, name, form):
    model = tiny.model(name)
    made = compressed.units(model, MODELS[name])
    stored = [compressed.pivoted(unit) if form == "pivoted" else unit for unit in made.values()]
    folder = compressed.write(tmp_path / "out", model, stored, max_shard_bytes=9000)
    expected = compressed.plain_model(model, made)(TOKENS[None]).logits[0]
    assert not close(model(TOKENS[None]).logits[0], expected)
    assert close(decoder_logits(load(folder, "cpu"))(TOKENS), expected)
    dense = hf.AutoModelForCausalLM.from_pretrained(export(folder, tmp_path / "dense", progress=False)).eval()
    assert close(dense(TOKENS[None]).logits[0], expected)


def test_a_shared_basis_is_one_tensor_in_memory(tmp_path):
    model = tiny.model("llama")
    made = list(compressed.units(model, LLAMA).values())
    decoder = load(compressed.write(tmp_path / "out", model, made), "cpu")
    first, second = (block.qkv.parts[0][0].tensors for block in decoder.weights.blocks)
    assert first[1].data_ptr() == second[1].data_ptr()  # q's basis
    assert first[5].data_ptr() != second[5].data_ptr()  # k's are private


def test_it_generates(tmp_path, tiny_checkpoint):
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    made = compressed.units(model, LLAMA)
    folder = compressed.write(tmp_path / "out", model, [compressed.pivoted(unit) for unit in made.values()])
    for file in tiny_checkpoint.glob("*token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    (answer,) = LLM(folder, device="cpu").generate(
        ["abc"], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    )
    prompt = torch.tensor([answer.prompt_token_ids])
    plain = compressed.plain_model(model, made)
    expected = plain.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert list(answer.token_ids) == expected[0, prompt.shape[1] :].tolist()


def test_inspect_tells_form_ranks_and_groups(tmp_path):
    model = tiny.model("llama")
    made = compressed.units(model, LLAMA)
    stored = [compressed.pivoted(u) if "gate" in paths[0] else u for paths, u in made.items()]
    with open_folder(compressed.write(tmp_path / "out", model, stored)) as folder:
        report = folder_report(folder)
    kinds = {kind.kind: kind for kind in report.kinds}
    q, gate, k = (kinds[name] for name in ("self_attn.q_proj", "mlp.gate_proj", "self_attn.k_proj"))
    assert not report.stock
    assert (q.format, q.form, q.ranks, q.groups, q.count) == ("shared_basis", "factored", {"9": 1}, 1, 2)
    assert (gate.form, gate.ranks, gate.groups) == ("pivoted", {"11": 1}, 1)
    assert (k.ranks, k.groups) == ({"5": 2}, 2)
    assert q.dense_bytes == 2 * 16 * 16 * 4
    assert q.compact_bytes == (9 * 16 + 2 * 16 * 9) * 4
    assert gate.compact_bytes == (11 * 5 + 2 * 24 * 11) * 4 + 11 * 4
    assert (kinds["lm_head"].form, kinds["lm_head"].ranks, kinds["lm_head"].groups) == ("", {}, 1)
    assert report.as_json()["kinds"][0].keys() >= {"form", "ranks", "groups"}


def test_inspect_counts_dense_bytes_in_the_dtype_of_the_weights():
    """Pivots are int32 whatever the weights are."""
    with open_folder(GOLDEN) as folder:
        kinds = {(kind.kind, kind.form): kind for kind in folder_report(folder).kinds}
    assert kinds["mlp.gate_proj", "pivoted"].dense_bytes == 2 * 12 * 8 * 2
    assert kinds["mlp.gate_proj", "pivoted"].compact_bytes == (6 * 2 + 2 * 12 * 6) * 2 + 6 * 4
    assert kinds["mlp.down_proj", "pivoted"].dense_bytes == kinds["mlp.down_proj", "factored"].dense_bytes


# --- broken folders ---------------------------------------------------------------------------------


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change) -> None:
    """Change stored tensors, with manifest and file entry in agreement: what only the loader can notice."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dtypes = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16"}
    entries = {n: {"dtype": dtypes[t.dtype], "shape": list(t.shape)} for n, t in tensors.items()}
    file = {"bytes": (folder / "model.safetensors").stat().st_size, "sha256": file_sha256(folder / "model.safetensors")}
    edit(folder, lambda m: (m.update(tensors=entries), m["files"].update({"model.safetensors": file})))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A biased Llama, everything factored but gate, which is pivoted."""
    model = tiny.model("llama-tied-biased")
    made = compressed.units(model, LLAMA)
    stored = [compressed.pivoted(u) if "gate" in paths[0] else u for paths, u in made.items()]
    return compressed.write(tmp_path / "out", model, stored)


Q, GATE = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.gate_proj"


def unit_of(manifest: dict, path: str) -> dict:
    return next(unit for unit in manifest["units"] if path in unit["modules"])


def drop(manifest: dict, path: str, role: str) -> None:
    manifest["plain"].append(unit_of(manifest, path)["tensors"].pop(role))


STORED = {
    "coefficients of another rank": (
        lambda t: t.update({f"{Q.format(1)}.coefficients": torch.ones(16, 8)}),
        r"q_proj is no whole shared_basis unit: coefficients\.\S+layers\.1\S+ is \(16, 8\).*\(16, 9\)",
    ),
    "a basis of another width": (
        lambda t: t.update({f"{Q.format(0)}.basis": torch.ones(9, 15)}),
        "does not read 15 inputs",
    ),
    "a rank above the inputs": (
        lambda t: t.update({f"{Q.format(0)}.basis": torch.ones(17, 16)}),
        "rank 17 is above the 16 inputs",
    ),
    "a pivot twice": (
        lambda t: t[f"{GATE.format(0)}.pivots"].fill_(3),
        "pivots must be 11 different columns of 16, int32",
    ),
    "a pivot outside": (lambda t: t[f"{GATE.format(0)}.pivots"][-1:].fill_(16), "different columns of 16"),
    "a negative pivot": (lambda t: t[f"{GATE.format(0)}.pivots"][:1].fill_(-1), "different columns of 16"),
    "pivots of another dtype": (
        lambda t: t.update({f"{GATE.format(0)}.pivots": t[f"{GATE.format(0)}.pivots"].long()}),
        "int32",
    ),
    "two dtypes": (
        lambda t: t.update({f"{Q.format(1)}.coefficients": torch.ones(16, 9, dtype=torch.bfloat16)}),
        "bfloat16",
    ),
    "a tombstone with weights": (
        lambda t: t.update({f"{Q.format(1)}.weight": torch.ones(16, 16)}),
        r"layers\.1\.self_attn\.q_proj\.weight in \S+ is \[16, 16\]; beside compressed weights it must be \[0\]",
    ),
}
MANIFEST = {
    "a module that nothing serves": (
        lambda m: unit_of(m, Q.format(1))["modules"].pop(Q.format(1)),
        errors.LeftoverTensors,
        r"layers\.1\.self_attn\.q_proj\.weight",
    ),
    "no basis": (
        lambda m: drop(m, Q.format(0), "basis"),
        errors.WrongShape,
        r"tensor model\.layers\.0\.self_attn\.q_proj\.basis, which this model does not have",
    ),
    "no bias": (
        lambda m: drop(m, Q.format(1), f"bias.{Q.format(1)}"),
        errors.WrongShape,
        r"layers\.1\.self_attn\.q_proj lacks its bias",
    ),
    "a module served twice": (
        lambda m: m["units"].append(unit_of(m, Q.format(1)) | {"modules": {Q.format(1): [16, 16]}}),
        errors.WrongShape,
        r"layers\.1\.self_attn\.q_proj is served by two units",
    ),
    "a module of another shape": (
        lambda m: unit_of(m, Q.format(1))["modules"].update({Q.format(1): [16, 24]}),
        errors.WrongShape,
        r"q_proj is \[16, 24\], the config says \[16, 16\]",
    ),
    "a newer version of the format": (
        lambda m: unit_of(m, Q.format(1)).update(version=2),
        errors.UnknownVersion,
        r"stored as shared_basis version 2, .*shared_basis 1, int8 1, two_four 1, bitmap 1, routed_ffn 1; install",
    ),
    "a format that is not there": (
        lambda m: unit_of(m, Q.format(1)).update(format="wavelets"),
        errors.UnknownVersion,
        "stored as wavelets version 1",
    ),
    "a newer manifest": (lambda m: m.update(format_version=2), errors.UnknownVersion, "format_version 2"),
}


@pytest.mark.parametrize("what", STORED)
def test_tensors_that_make_no_unit(folder, what):
    change, message = STORED[what]
    rewrite(folder, change)
    with pytest.raises(errors.WrongShape, match=message):
        load(folder, "cpu")


@pytest.mark.parametrize("what", MANIFEST)
def test_a_manifest_that_does_not_account_for_the_model(folder, what):
    change, error, message = MANIFEST[what]
    edit(folder, change)
    with pytest.raises(error, match=message):
        load(folder, "cpu")


def test_missing_roles_are_named(folder):
    """Manifest and files agree, and yet a tensor of the unit is not there."""

    def without(role: str):
        name = f"{GATE.format(0)}.{role}"
        edit(folder, lambda m: unit_of(m, GATE.format(0))["tensors"].pop(role))
        rewrite(folder, lambda t: t.pop(name))

    without("pivots")
    with pytest.raises(
        errors.WrongShape, match="gate_proj is no whole shared_basis unit: rank 11 is above the 5 inputs"
    ):
        load(folder, "cpu")
    without("basis")
    with pytest.raises(errors.WrongShape, match=r"wants a basis .* the unit has None"):
        load(folder, "cpu")


# --- the golden folder of format version 1 ----------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden" / "shared_basis_v1"
GOLDEN_GROUPS = {
    "q": ([[0, 1]], 5),
    "k": ([[0], [1]], 3),
    "gate": ([[0, 1]], 6),
    "up": ([[0, 1]], 6),
    "down": ([[0], [1]], 4),
}


def write_golden(target: Path) -> Path:
    """How the golden folder was made, once: a tied, biased bf16 Llama; gate and layer 1's down are pivoted."""
    torch.manual_seed(7)
    config = hf.LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=16,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    made = compressed.units(model, GOLDEN_GROUPS).values()
    stored = [
        compressed.pivoted(u) if "gate" in next(iter(u.modules)) or "1.mlp.down" in next(iter(u.modules)) else u
        for u in made
    ]

    def half(unit: Unit) -> Unit:
        return Unit(unit.modules, {r: t.bfloat16() if t.is_floating_point() else t for r, t in unit.tensors.items()})

    return compressed.write(target, model.bfloat16(), [half(unit) for unit in stored], max_shard_bytes=1500)


DIGEST = "c9c4cafa3bb58659e222bc4219328e06eb2e32d529089a5e27b290758ac2264a"
TOP = ([6, 14, 15], [1.3051, 1.1905, 0.9171])


def check_golden_logits(logits: torch.Tensor) -> None:
    top = logits.float().topk(3)
    assert top.indices.tolist() == TOP[0]
    assert torch.allclose(top.values, torch.tensor(TOP[1]), atol=1e-3)


GOLDEN_TOKENS = torch.tensor([1, 5, 9, 14])


def test_the_golden_compressed_folder_loads_for_ever(tmp_path):
    """Written once, by format version 1; never write it again. Every door must open it."""
    digest = hashlib.sha256()
    with open_folder(GOLDEN) as folder:
        folder.verify()
        assert folder.manifest.format_version == 1
        assert len(folder.manifest.shards) > 1
        assert {unit.format: unit.version for unit in folder.manifest.units} == {"dense": 1, "shared_basis": 1}
        forms = [set(unit.tensors) & {"pivots"} for unit in folder.manifest.units if unit.format == "shared_basis"]
        assert any(forms) and not all(forms)
        for name in sorted(folder.manifest.tensors):
            tensor = folder.tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == DIGEST
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 40_000

    check_golden_logits(decoder_logits(load(GOLDEN, "cpu", torch.float32))(GOLDEN_TOKENS)[-1])
    dense = hf.AutoModelForCausalLM.from_pretrained(
        export(GOLDEN, tmp_path / "dense", progress=False), dtype=torch.float32
    )
    exported = dense(GOLDEN_TOKENS[None]).logits[0, -1]
    assert (exported.topk(3).values - torch.tensor(TOP[1])).abs().max() < 0.05  # the product is rounded to bf16
