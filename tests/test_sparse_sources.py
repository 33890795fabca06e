"""Checkpoints of pruned weights: dense with zeros, and the sparse layouts of compressed-tensors, bit for bit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

import pared.hf
from pared import errors
from pared.cli import main
from pared.compact import open_folder
from pared.convert import convert, export
from pared.converters.sources import compressed_tensors, huggingface
from pared.converters.sources.detect import open_source
from pared.converters.zeros import describe
from pared.evaluate import decoder_logits
from pared.reports import folder_report
from pared.runtime.loader import load
from pared.tests import tiny

assert pared.hf.METHOD  # importing it registers the quantizer

CONFIG = hf.LlamaConfig(
    hidden_size=64,
    intermediate_size=92,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
    max_position_embeddings=32,
)
TOKENS = torch.tensor([1, 7, 3, 30, 39, 0, 12])
LAYER = "model.layers.0."
State = dict[str, torch.Tensor]


def two_four(weight: torch.Tensor) -> torch.Tensor:
    """The two largest of every four neighbours."""
    groups = weight.view(weight.shape[0], -1, 4)
    smallest = groups.abs().topk(2, largest=False).indices
    return groups.scatter(2, smallest, 0).view_as(weight)


def half(weight: torch.Tensor) -> torch.Tensor:
    """Half of every row is zero."""
    smallest = weight.abs().topk(weight.shape[1] // 2, largest=False).indices
    return weight.scatter(1, smallest, 0)


def pruned(dtype: torch.dtype = torch.float16, prune: Callable = half, tied: bool = False) -> hf.PreTrainedModel:
    """A random model, all linears of its layers pruned, but layer 0's v is whole and its o 2:4."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            if "_proj" in name and not name.startswith(f"{LAYER}self_attn.v"):
                parameter.copy_(two_four(parameter) if name.startswith(f"{LAYER}self_attn.o") else prune(parameter))
    return model.to(dtype)


def folder(path: Path, config: dict, state: State, shards: int = 1, pickled: bool = False) -> Path:
    """A Hugging Face folder of these tensors with tiny's tokenizer, the tensors dealt out to the shards in turn."""
    tiny.checkpoint(path)
    (path / "model.safetensors").unlink()
    (path / "config.json").write_text(json.dumps(config))
    stem, ext, places = *(("pytorch_model", "bin") if pickled else ("model", "safetensors")), {}
    for i in range(shards):
        name = f"{stem}.{ext}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{ext}"
        part = {tensor: state[tensor].clone() for tensor in sorted(state)[i::shards]}
        places |= dict.fromkeys(part, name)
        torch.save(part, path / name) if pickled else save_file(part, path / name)
    if shards > 1:
        (path / f"{stem}.{ext}.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def stock_config(model: hf.PreTrainedModel) -> dict:
    return model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": str(model.dtype)[6:]}


def read(path: Path) -> State:
    return dict(open_source(path).tensors(lambda name: False))


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items()
    )


def stored(path: Path) -> dict[str, tuple[str, str]]:
    """Module -> (format, what the conversion found)."""
    with open_folder(path) as opened:
        return {module: (unit.format, unit.why) for unit in opened.manifest.units for module in unit.modules}


# --- dense with zeros -------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("pickled", [True, False], ids=["bin", "safetensors"])
def test_zeros_become_fewer_bytes_and_come_back_bit_for_bit(tmp_path, pickled, shards):
    """As GBLM-Pruner's folders are: fp16 with old fp32 rotary buffers, rows with zeros of their own on top."""
    model = pruned()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, ::3] = 0
        model.model.layers[0].self_attn.v_proj.weight[5, :40] = 0
    state = tiny.state(model)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8) for i in range(2)}
    src = folder(tmp_path / "src", stock_config(model), state | buffers, shards, pickled)
    convert(src, tmp_path / "out", progress=False, max_shard_bytes=20_000)
    found = stored(tmp_path / "out")
    assert found[f"{LAYER}self_attn.o_proj"] == ("two_four", "2:4")
    assert found[f"{LAYER}self_attn.v_proj"] == ("dense", "2.0 % zeros")
    assert found["lm_head"] == ("dense", "")
    assert found[f"{LAYER}mlp.up_proj"] == ("bitmap", "50.0 % zeros")
    assert found["model.layers.1.mlp.gate_proj"][0] == "bitmap"
    assert {format for format, _ in found.values()} == {"dense", "two_four", "bitmap"}
    assert same(read(export(tmp_path / "out", tmp_path / "back", progress=False)), state)
    with open_folder(tmp_path / "out") as opened:
        kinds = {(kind.kind, kind.format): kind for kind in folder_report(opened).kinds}
    assert kinds["self_attn.o_proj", "two_four"].weights == {"2:4": 1}
    bitmap = kinds["mlp.up_proj", "bitmap"]
    assert bitmap.weights == {"50.0 % zeros": 2}
    assert bitmap.compact_bytes == 2 * (92 * 8 + 92 * 32 * 2)


def test_a_folder_of_zeros_runs_as_it_did_dense(tmp_path):
    model = pruned(torch.float32)
    convert(folder(tmp_path / "src", stock_config(model), tiny.state(model)), tmp_path / "out", progress=False)
    truth = model(TOKENS[None]).logits[0].detach()
    through_hf = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS[None]).logits[0]
    for logits in (decoder_logits(load(tmp_path / "out", device="cpu"))(TOKENS), through_hf):
        assert (logits - truth).abs().max() < 1e-5 * truth.abs().max()


def test_the_format_that_is_asked_for(tmp_path):
    model = pruned(prune=two_four)
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.v_proj.weight
        weight.copy_(two_four(weight))
    src = folder(tmp_path / "src", stock_config(model), tiny.state(model))
    convert(src, tmp_path / "out", format="two_four", progress=False)
    found = {module: format for module, (format, _) in stored(tmp_path / "out").items()}
    assert found.pop("lm_head") == "dense"
    assert set(found.values()) == {"two_four"}


def test_one_group_too_full_is_named(tmp_path):
    model = pruned(prune=two_four)
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.v_proj.weight
        weight.copy_(two_four(weight))
        model.model.layers[1].mlp.down_proj.weight[7, 12:16] = 1
    src = folder(tmp_path / "src", stock_config(model), tiny.state(model))
    with pytest.raises(errors.SourceError, match=r"layers\.1\.mlp\.down_proj .*two_four: row 7, columns 12 to 15"):
        convert(src, tmp_path / "out", format="two_four", progress=False)
    convert(src, tmp_path / "out", progress=False)
    assert stored(tmp_path / "out")["model.layers.1.mlp.down_proj"][0] == "bitmap"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_no_number_is_named(tmp_path, value):
    model = pruned()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 3] = value
    src = folder(tmp_path / "src", stock_config(model), tiny.state(model))
    with pytest.raises(errors.BadWeights, match=rf"layers\.1\.mlp\.up_proj\.weight\[5, 3\] is {value}"):
        convert(src, tmp_path / "out", progress=False)


def test_inspect_prints_what_was_found(tmp_path, capsys, monkeypatch):
    model = pruned()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:9] = 0
    convert(folder(tmp_path / "src", stock_config(model), tiny.state(model)), tmp_path / "out", progress=False)
    monkeypatch.setattr("sys.argv", ["pared", "inspect", str(tmp_path / "out")])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main()
    lines = {line.split("\u2502")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "\u2502" in line}
    assert "50.0 % zeros (1), 57.0 % zeros (1)" in lines["mlp.down_proj"]
    assert "50.0 % zeros " in lines["mlp.up_proj"]
    assert "zeros" not in lines["lm_head"]
    assert "rank" not in "".join(lines)


def test_zeros_in_words():
    weight = torch.ones(8, 16)
    assert describe(weight) == ""
    weight[0, 0] = 0
    assert describe(weight) == "0.8 % zeros"
    weight = two_four(torch.randn(8, 16))
    assert describe(weight) == "2:4"
    weight[0] = 0
    assert describe(weight) == "2:4, 56.2 % zeros"
    shifted = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]).repeat(4, 3)
    assert describe(shifted) == "4:8"
    assert describe((torch.arange(16) < 8).repeat(4, 1)) == "50.0 % zeros"


# --- compressed-tensors -----------------------------------------------------------------------------


def packed(weight: torch.Tensor, format: str) -> State:
    """The parts of one tensor, written from the description of the layout alone."""
    shape = torch.tensor(weight.shape)
    if format == compressed_tensors.TWO_FOUR:  # two of every four are kept, zeros among them
        mask = torch.zeros_like(weight, dtype=torch.bool).view(-1, 4)
        mask.scatter_(1, weight.float().abs().view(-1, 4).topk(2).indices, True)
        mask, shape = mask.view_as(weight), shape[:, None]
        values = weight[mask].view(weight.shape[0], -1)
    else:
        mask = weight != 0
        values = weight[mask]
    bits = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    parts = {"shape": shape, "compressed": values, "bitmask": bits}
    if format == compressed_tensors.BITMASK:
        counts = mask.sum(-1)
        parts["row_offsets"] = counts.cumsum(0) - counts if mask.dim() > 1 else torch.tensor(0)
    return parts


def published(
    path: Path, model: hf.PreTrainedModel, format: str, dialect: str, shards: int = 1, change=lambda state, config: None
) -> Path:
    """A folder as compressed-tensors writes it; layer 0's v and the head stay plain where targets can say so."""
    state: State = {}
    for name, tensor in tiny.state(model).items():
        targeted = "_proj" in name and not name.startswith(f"{LAYER}self_attn.v")
        if dialect == "new" and not targeted:
            state[name] = tensor
            continue
        stem = name.removesuffix(".weight") if dialect == "new" else name
        state |= {f"{stem}.{part}": t for part, t in packed(tensor, format).items()}
    sparsity = {
        "format": format,
        "sparsity_structure": "2:4" if format == compressed_tensors.TWO_FOUR else "unstructured",
        "global_sparsity": 0.4,
        "targets": ["Linear"] if dialect == "new" else None,
        "ignore": ["lm_head", f"{LAYER}self_attn.v_proj"] if dialect == "new" else None,
        "registry_requires_subclass": False,
    }
    holder = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity, "ignore": []}
    key = "quantization_config" if dialect == "new" else "compression_config"
    config = stock_config(model) | {key: holder}
    change(state, config)
    return folder(path, config, state, shards)


LAYOUTS = [
    (compressed_tensors.BITMASK, "new"),
    (compressed_tensors.BITMASK, "old"),
    (compressed_tensors.TWO_FOUR, "new"),
]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("format", "dialect"), LAYOUTS)
def test_sparse_layouts_are_read_bit_for_bit(tmp_path, format, dialect, dtype, shards):
    """92 columns end within a byte; the parts of a tensor are dealt out to four shards."""
    model = pruned(dtype, two_four if format == compressed_tensors.TWO_FOUR else half, tied=True)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2] = 0
    src = published(tmp_path / "src", model, format, dialect, shards)
    source, expected = open_source(src), tiny.state(model)
    assert same(dict(source.tensors(lambda name: False)), expected)
    assert sorted(source.names()) == sorted(expected)
    only = [name for name, _ in source.tensors(lambda name: "up_proj" not in name)]
    assert sorted(only) == sorted(name for name in expected if "up_proj" in name)
    assert source.kind == f"compressed-tensors {format}"
    assert not source.config.keys() & {"quantization_config", "compression_config"}


@pytest.mark.parametrize(("format", "dialect"), LAYOUTS)
def test_sparse_layouts_become_compact_folders(tmp_path, format, dialect):
    model = pruned(torch.float32, two_four if format == compressed_tensors.TWO_FOUR else half)
    convert(published(tmp_path / "src", model, format, dialect, 3), tmp_path / "out", progress=False)
    expected = "two_four" if format == compressed_tensors.TWO_FOUR else "bitmap"
    assert stored(tmp_path / "out")["model.layers.1.mlp.up_proj"][0] == expected
    assert same(read(export(tmp_path / "out", tmp_path / "back", progress=False)), tiny.state(model))
    with open_folder(tmp_path / "out") as opened:
        assert opened.manifest.provenance["source"]["kind"] == f"compressed-tensors {format}"


def by_hand(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> State:
    """A safetensors file spelled out byte by byte, as it is read."""
    header, blob = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(blob), len(blob) + len(content)]}
        blob += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob)
    return {name.rpartition(".")[2]: tensor for name, tensor in huggingface.read(path, lambda name: False)}


def test_golden_bytes_of_sparse_bitmask(tmp_path):
    """fp16 1 = 3c00, -2 = c000, 0.5 = 3800; column 0 is the lowest bit of a row's first byte."""
    parts = by_hand(
        tmp_path / "golden.safetensors",
        {
            "m.shape": ("I64", [2], bytes([3, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0])),
            "m.compressed": ("F16", [4], bytes([0x00, 0x3C, 0x00, 0xC0, 0x00, 0x38, 0x00, 0x3C])),
            "m.bitmask": ("U8", [3, 2], bytes([0b00000010, 0b1, 0, 0, 0b10000001, 0])),
            "m.row_offsets": ("I64", [3], bytes([0] * 8 + [2] + [0] * 7 + [2] + [0] * 7)),
        },
    )
    expected = torch.zeros(3, 9, dtype=torch.float16)
    expected[0, 1], expected[0, 8], expected[2, 0], expected[2, 7] = 1, -2, 0.5, 1
    assert torch.equal(compressed_tensors.decode("m", parts, compressed_tensors.BITMASK), expected)


def test_golden_bytes_of_sparse_24_bitmask(tmp_path):
    """bf16 1 = 3f80, -2 = c000; the second group keeps a zero."""
    parts = by_hand(
        tmp_path / "golden.safetensors",
        {
            "m.shape": ("I64", [2, 1], bytes([1, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0])),
            "m.compressed": ("BF16", [1, 4], bytes([0x80, 0x3F, 0x00, 0xC0, 0x00, 0x00, 0x80, 0x3F])),
            "m.bitmask": ("U8", [1, 1], bytes([0b01011010])),
        },
    )
    expected = torch.tensor([[0, 1, 0, -2, 0, 0, 1, 0]], dtype=torch.bfloat16)
    assert torch.equal(compressed_tensors.decode("m", parts, compressed_tensors.TWO_FOUR), expected)


def test_groups_of_sparse_24_bitmask_may_reach_from_row_to_row():
    weight = torch.tensor([[1, 0, 0, 2, 0, 3], [0, 4, 5, 0, 0, 6]], dtype=torch.bfloat16)
    parts = packed(weight, compressed_tensors.TWO_FOUR)
    assert parts["compressed"].shape == (2, 3)
    assert torch.equal(compressed_tensors.decode("m", parts, compressed_tensors.TWO_FOUR), weight)


# --- broken ones ------------------------------------------------------------------------------------

UP = f"{LAYER}mlp.up_proj"


def edit(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    return lambda state, config: state.update({f"{UP}.{part}": change(state[f"{UP}.{part}"])})


def sparsity(**changes: object) -> Callable:
    return lambda state, config: config["quantization_config"]["sparsity_config"].update(changes)


def three_of_four(mask: torch.Tensor) -> torch.Tensor:
    mask[3, 1] = mask[3, 1] & 0xF0 | 0b0111
    return mask


BITMASK_BROKEN = {
    "truncated bitmask": (
        edit("bitmask", lambda t: t[:, :-1].clone()),
        r"up_proj.* the bitmask is \[92, 7\]",
    ),
    "bitmask of another weight": (edit("bitmask", lambda t: t[:-1].clone()), r"the bitmask is \[91, 8\]"),
    "bitmask of another dtype": (edit("bitmask", lambda t: t.int()), r"\[92, 8\] of torch\.int32"),
    "truncated values": (edit("compressed", lambda t: t[:-5].clone()), r"up_proj.*keeps 2944 .*compressed holds 2939"),
    "row offsets of another weight": (edit("row_offsets", lambda t: t + 1), "up_proj.*row_offsets do not count"),
    "no shape at all": (edit("shape", lambda t: t[:0].clone()), r"up_proj.* stored with shape \[\]"),
    "another shape": (edit("shape", lambda t: t.flip(0)), r"up_proj.* a weight \[64, 92\] has one of \[64, 12\]"),
    "a part missing": (
        lambda s, c: s.pop(f"{UP}.bitmask"),
        r"shape of .*up_proj.*no bitmask",
    ),
    "Inf": (
        edit("compressed", lambda t: t.index_fill(0, torch.tensor([9]), torch.inf)),
        r"up_proj\.weight\[0, \d+\] is inf",
    ),
    "quantised values": (edit("compressed", lambda t: t.to(torch.float8_e4m3fn)), "float8_e4m3fn, which .* quantised"),
    "unknown format": (sparsity(format="marlin-24"), "format 'marlin-24'; pared reads sparse-bitmask"),
    "no sparsity_config": (lambda s, c: c.pop("quantization_config"), "bitmasks, but its config.json has no sparsity"),
    "quantised": (
        lambda s, c: c["quantization_config"].update(format="pack-quantized", config_groups={"group_0": {}}),
        "is quantised by compressed-tensors .format 'pack-quantized'.*before quantisation",
    ),
}
TWO_FOUR_BROKEN = {
    "three of four": (
        edit("bitmask", three_of_four),
        r"up_proj.*as 2:4, but .* 3 of 4 in row 3, columns 8 to 11",
    ),
    "values of another weight": (
        edit("compressed", lambda t: t[:, :-1].clone()),
        r"keeps 2944 .* holds 2852",
    ),
    "declared, but dense": (sparsity(ignore=["lm_head"]), r"v_proj.* is declared 2:4, but it has [34] of 4 in row 0"),
}


@pytest.mark.parametrize("case", BITMASK_BROKEN)
def test_a_broken_bitmask_folder_is_refused_by_name(tmp_path, case):
    change, message = BITMASK_BROKEN[case]
    src = published(tmp_path / "src", pruned(), compressed_tensors.BITMASK, "new", change=change)
    with pytest.raises((errors.SourceError, errors.BadWeights), match=message):
        convert(src, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", TWO_FOUR_BROKEN)
def test_a_broken_two_four_folder_is_refused_by_name(tmp_path, case):
    change, message = TWO_FOUR_BROKEN[case]
    src = published(tmp_path / "src", pruned(prune=two_four), compressed_tensors.TWO_FOUR, "new", change=change)
    with pytest.raises(errors.SourceError, match=message):
        convert(src, tmp_path / "out", progress=False)


def test_plain_tensors_that_are_declared_two_four_are_held_to_it(tmp_path):
    """llm-compressor's default: format dense, zeros in place."""
    model = pruned(prune=two_four)
    said = {"format": "dense", "sparsity_structure": "2:4", "targets": ["re:.*mlp.*"], "ignore": []}
    config = stock_config(model) | {
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": said}
    }
    src = folder(tmp_path / "src", config, tiny.state(model))
    assert same(read(src), tiny.state(model))
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[4, 20:24] = 1
    with pytest.raises(errors.SourceError, match=r"gate_proj\.weight .* declared 2:4, .* 4 of 4 in row 4, columns 20"):
        read(folder(tmp_path / "wrong", config, tiny.state(model)))
