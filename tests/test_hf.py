"""The transformers door: a compressed folder loads exactly with it, and stops loudly without it."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys

import pytest
import torch
import transformers as hf

import pared.hf as door
from pared import errors
from pared.convert import export
from pared.hf import PackedLinear
from pared.tests import compressed, tiny
from pared.tests.compressed import LLAMA
from pared.tests.test_compressed import (
    GOLDEN,
    GOLDEN_TOKENS,
    MODELS,
    STORED,
    Q,
    check_golden_logits,
    close,
    edit,
    rewrite,
)

DENSE_GOLDEN = GOLDEN.with_name("dense_v1")
TOKENS = torch.tensor([[1, 7, 3, 30, 39, 0, 12]])


def written(path, name="llama", form="factored", **options):
    """(folder, model of two plain products)"""
    model = tiny.model(name)
    made = compressed.units(model, MODELS[name])
    stored = [compressed.pivoted(unit) if form == "pivoted" else unit for unit in made.values()]
    return compressed.write(path, model, stored, **options), compressed.plain_model(model, made)


def auto(path, **options):
    return hf.AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("name", MODELS)
def test_a_compressed_folder_loads_exactly(tmp_path, name, form):
    folder, plain = written(tmp_path / "out", name, form, max_shard_bytes=9000)
    model, info = auto(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not model.training and model.dtype == torch.float32
    assert close(model(TOKENS).logits[0], plain(TOKENS).logits[0])
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 8}
    assert torch.equal(model.generate(TOKENS, **greedy), plain.generate(TOKENS, **greedy))


def test_only_compressed_modules_are_replaced_and_a_shared_basis_is_one_tensor(tmp_path):
    folder, _ = written(tmp_path / "out")
    model = auto(folder)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == {path for paths in compressed.units(tiny.model(), LLAMA) for path in paths}
    assert type(model.lm_head) is torch.nn.Linear
    bases = [name for name, _ in model.named_parameters() if name.endswith(".basis")]
    assert len(bases) == len(compressed.units(tiny.model(), LLAMA)) < len(packed)
    first, second = (model.model.layers[i].self_attn.q_proj for i in (0, 1))
    model(TOKENS)
    assert second.unit is first.unit
    assert second.unit._prepared.tensors[1].data_ptr() == first.basis.data_ptr()
    assert "shared_basis, in_features=16, out_features=16" in repr(first)


def test_dtypes_and_moving(tmp_path):
    folder, plain = written(tmp_path / "out", form="pivoted")
    model = auto(folder, dtype=torch.bfloat16)
    gate = model.model.layers[0].mlp.gate_proj
    assert gate.basis.dtype == torch.bfloat16 and gate.pivots.dtype == torch.int32
    assert model(TOKENS).logits.dtype == torch.bfloat16
    back = model.to(torch.float32)  # laid out anew: the tensors of the first use are gone
    expected = plain(TOKENS).logits
    assert (back(TOKENS).logits - expected).abs().max() < 0.1 * expected.abs().max()
    state = {name: tensor * 2 if name.endswith("basis") else tensor for name, tensor in model.state_dict().items()}
    before = back(TOKENS).logits
    back.load_state_dict(state)
    assert not torch.equal(back(TOKENS).logits, before)


def test_a_copy_shares_its_own_basis(tmp_path):
    folder, plain = written(tmp_path / "out")
    model = auto(folder)
    copied = copy.deepcopy(model)
    first, second = (copied.model.layers[i].self_attn.q_proj for i in (0, 1))
    assert first.unit is second.unit and first.unit is not model.model.layers[0].self_attn.q_proj.unit
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.basis.zero_()
    assert close(copied(TOKENS).logits[0], plain(TOKENS).logits[0])


def test_continuous_batching_treats_it_as_any_other_model(tmp_path):
    folder, plain = written(tmp_path / "out")
    greedy = hf.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=99, pad_token_id=0)
    paging = hf.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    prompts = [TOKENS[0].tolist(), TOKENS[0, :3].tolist()]

    def answers(model: hf.PreTrainedModel) -> dict[tuple[int, ...], list[int]]:
        done = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=paging)
        return {tuple(answer.prompt_ids): answer.generated_tokens for answer in done.values()}

    found = answers(auto(folder))
    assert len(found) == 2 and found == answers(plain)


def test_the_backbone_alone(tmp_path):
    folder, plain = written(tmp_path / "out")
    backbone = hf.AutoModel.from_pretrained(folder)
    assert close(backbone(TOKENS).last_hidden_state[0], plain.model(TOKENS).last_hidden_state[0])


def test_gradients_are_off_and_nothing_needs_no_grad(tmp_path):
    model = auto(written(tmp_path / "out")[0])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(TOKENS).logits.requires_grad


def test_it_compiles_to_one_graph(tmp_path):
    folder, plain = written(tmp_path / "out", form="pivoted")
    model = auto(folder)
    with torch.no_grad():
        model(TOKENS)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert close(compiled(TOKENS, use_cache=False).logits[0], plain(TOKENS).logits[0])


def test_saving_is_refused_with_what_to_do(tmp_path):
    model = auto(written(tmp_path / "out")[0])
    with pytest.raises(errors.FolderError, match=r"copy the folder .* or `pared export`"):
        model.save_pretrained(tmp_path / "again")


def test_importing_twice_registers_once(tmp_path):
    folder, plain = written(tmp_path / "out")
    importlib.reload(door)
    assert close(auto(folder)(TOKENS).logits[0], plain(TOKENS).logits[0])


def test_a_dense_checkpoint_cannot_be_asked_to_become_compressed(tmp_path):
    tiny.checkpoint(tmp_path / "src")
    with pytest.raises(ValueError, match="pre-quantized"):
        auto(tmp_path / "src", quantization_config=door.ParedConfig())


def test_damage_is_named(tmp_path):
    folder, _ = written(tmp_path / "one")
    rewrite(folder, STORED["coefficients of another rank"][0])
    with pytest.raises(errors.WrongShape, match="is no whole shared_basis unit"):
        auto(folder)
    folder, _ = written(tmp_path / "two")
    edit(folder, lambda m: m.update(format_version=2))
    with pytest.raises(errors.UnknownVersion, match="format_version 2"):
        auto(folder)
    folder, _ = written(tmp_path / "three")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(Exception, match=r"truncated|incomplete|beyond|InvalidOffset|out of bounds|not fully covered"):
        auto(folder)


def test_a_basis_cannot_be_split_over_devices(tmp_path):
    model = auto(written(tmp_path / "out")[0])
    second = model.get_submodule(Q.format(1))
    second.coefficients = torch.nn.Parameter(second.coefficients.to("meta"), requires_grad=False)
    with pytest.raises(errors.KernelError, match=r"q_proj lies on cpu, meta: .*device_map"):
        second.unit.check_devices()


def test_the_golden_folder_through_this_door():
    check_golden_logits(auto(GOLDEN, dtype=torch.float32)(GOLDEN_TOKENS[None]).logits[0, -1])


# --- in other processes -----------------------------------------------------------------------------

LOAD = "import sys, transformers as hf\nmodel = hf.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
LOAD_ALL = """
import sys, transformers as hf
for path in sys.argv[1:]:
    try:
        hf.AutoModelForCausalLM.from_pretrained(path)
    except RuntimeError as stopped:
        print("stopped:", " ".join(str(stopped).split()))
    else:
        print("loaded:", path)
assert not any(name.split(".")[0] == "pared" for name in sys.modules)
"""


def process(script: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-P", "-c", script, *arguments], capture_output=True, text=True)


def test_without_us_a_stock_process_stops_loudly_and_loads_what_is_dense(tmp_path):
    folders = [written(tmp_path / form, form=form)[0] for form in ("factored", "pivoted")]
    dense = export(folders[0], tmp_path / "dense", progress=False)
    done = process(LOAD_ALL, *folders, GOLDEN, DENSE_GOLDEN, dense)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert [line.split(":")[0] for line in told] == ["stopped"] * 3 + ["loaded"] * 2
    assert all("mismatch" in line for line in told[:3])
    assert "q_proj.weight" in done.stderr and "MISMATCH" in done.stderr


def test_with_the_import_a_fresh_process_loads_it(tmp_path):
    folder, plain = written(tmp_path / "out", "gpt2", "pivoted")
    script = (
        f"import pared.hf\n{LOAD}import torch\n"
        f"torch.save(model(torch.tensor({TOKENS.tolist()})).logits[0], sys.argv[2])\n"
    )
    done = process(script, folder, tmp_path / "logits")
    assert done.returncode == 0, done.stderr
    assert close(torch.load(tmp_path / "logits", weights_only=True), plain(TOKENS).logits[0])
