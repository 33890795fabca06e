"""Reading checkpoints: every way in which the Hub stores one, and every way in which one can be broken."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from pared import errors
from pared.convert import convert
from pared.converters.sources import gguf as gguf_source
from pared.converters.sources.detect import open_source
from pared.tests import tiny


def read(path: Path) -> dict[str, torch.Tensor]:
    return dict(open_source(path).tensors(lambda name: False))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def as_bin(path: Path, shards: int, zipped: bool = True) -> Path:
    """Store the folder's weights as pickles in the place of safetensors."""
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    if shards == 1:
        torch.save(weights, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return path
    places = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(names)}
    for shard in set(places.values()):
        part = {name: weights[name] for name in names if places[name] == shard}
        torch.save(part, path / shard, _use_new_zipfile_serialization=zipped)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


# --- what is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-tied-biased"])
def test_safetensors_sharded_or_not(tmp_path, name, dtype):
    expected = tiny.state(tiny.model(name, dtype))
    assert same(read(tiny.checkpoint(tmp_path / "one", name, dtype)), expected)
    sharded = tiny.checkpoint(tmp_path / "many", name, dtype, max_shard_size="4KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert same(read(sharded), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bin_sharded_or_not(tmp_path, dtype, shards, zipped):
    expected = tiny.state(tiny.model("llama", dtype))
    assert same(read(as_bin(tiny.checkpoint(tmp_path / "bin", dtype=dtype), shards, zipped)), expected)


def test_what_is_skipped_is_not_read(tmp_path):
    source = open_source(tiny.checkpoint(tmp_path / "src"))
    names = [name for name, _ in source.tensors(lambda name: "mlp" in name)]
    assert names
    assert not any("mlp" in name for name in names)


def test_config_and_files_come_along_but_no_code(tmp_path):
    path = tiny.checkpoint(tmp_path / "src")
    (path / "modeling_evil.py").write_text("raise SystemExit")
    (path / "LICENSE").write_text("MIT")
    source = open_source(path)
    assert source.config == json.loads((path / "config.json").read_text())
    assert sorted(source.files) == ["LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert source.kind == "huggingface"


def test_the_fingerprint_follows_weights_and_config(tmp_path):
    path = tiny.checkpoint(tmp_path / "src")
    first = open_source(path).fingerprint
    assert open_source(path).fingerprint == first
    os.utime(path / "model.safetensors", ns=(1, 1))
    second = open_source(path).fingerprint
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert len({first, second, open_source(path).fingerprint}) == 3


# --- what is refused --------------------------------------------------------------------------------


def test_not_there_not_a_folder_empty(tmp_path):
    with pytest.raises(errors.SourceError, match="does not exist"):
        open_source(tmp_path / "nothing")
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(errors.SourceError, match=r"not GGUF; give the folder"):
        open_source(tmp_path / "note.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.SourceError, match=r"no config\.json"):
        open_source(tmp_path / "empty")


def test_config_broken_adapter_or_without_weights(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(errors.SourceError, match="is an adapter on None, which is no folder here"):
        open_source(tmp_path)
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(errors.SourceError, match=r"config\.json (cannot be read|is JSON but)"):
            open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "consolidated.00.pth").write_text("")
    with pytest.raises(errors.SourceError, match=r"it has consolidated\.00\.pth; is the download complete"):
        open_source(tmp_path)


def test_a_compressed_compact_folder_is_no_source(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "pared"}}')
    with pytest.raises(errors.SourceError, match="pared export"):
        open_source(tmp_path)


def test_an_index_that_names_a_missing_shard(tmp_path):
    path = tiny.checkpoint(tmp_path / "src", max_shard_size="4KB")
    lost = sorted(path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(errors.SourceError, match=rf"index\.json names {lost.name}, which is not in"):
        open_source(path)


@pytest.mark.parametrize("places", [None, {}, [], {"a": 3}, {"a": "../../secret.safetensors"}])
def test_an_index_that_is_none(tmp_path, places):
    path = tiny.checkpoint(tmp_path / "src", max_shard_size="4KB")
    (tmp_path.parent / "secret.safetensors").write_bytes(b"")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(errors.SourceError, match=r"no weight_map|not in"):
        open_source(path)


@pytest.mark.parametrize("keep", [0, 7, 100, 2000, -1])
def test_truncated_safetensors(tmp_path, keep):
    path = tiny.checkpoint(tmp_path / "src")
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(errors.SourceError, match=r"model\.safetensors is truncated.*download it again"):
        read(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_bin(tmp_path, zipped, share):
    path = as_bin(tiny.checkpoint(tmp_path / "src"), 1, zipped)
    content = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(content[: int(share * len(content))])
    with pytest.raises(errors.SourceError, match=r"pytorch_model\.bin is (truncated|damaged)"):
        read(path)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_does_not_run(tmp_path, zipped):
    path = as_bin(tiny.checkpoint(tmp_path / "src"), 1)
    content = {"w": torch.ones(1), "x": _Payload(tmp_path / "owned")}
    torch.save(content, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(errors.SourceError, match="holds code beside weights, which pared never runs"):
        read(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"state_dict": {"w": torch.ones(1)}}, torch.ones(1)])
def test_a_bin_that_is_no_state(tmp_path, content):
    path = as_bin(tiny.checkpoint(tmp_path / "src"), 1)
    torch.save(content, path / "pytorch_model.bin")
    with pytest.raises(errors.SourceError, match="flat dictionary of tensors"):
        read(path)


def test_safetensors_win_over_bin(tmp_path):
    path = tiny.checkpoint(tmp_path / "src")
    torch.save({}, path / "pytorch_model.bin")
    assert same(read(path), tiny.state(tiny.model()))
    save_file({"only": torch.ones(1)}, path / "model-00001-of-00001.safetensors")
    assert same(read(path), tiny.state(tiny.model()))


# --- GGUF -------------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name: str) -> str:
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    for ours, theirs in _GGUF_NAMES.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    return name.replace("model.layers.", "blk.")


def _llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of each head is Hugging Face's row i, row 2i + 1 its row i + D/2."""
    dim = weight.shape[0] // heads
    order = [h * dim + i + half * dim // 2 for h in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(path: Path, name: str = "llama", quantise: bool = False, **changes: object) -> Path:
    """`tiny.model(name)` as llama.cpp stores it; `changes` replace or (None) drop metadata."""
    model, config = tiny.model(name), tiny.CONFIGS[name]
    tokens = [f"t{i}" for i in range(37)] + ["a", "b", "ab"]
    metadata = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * 37],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | changes
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}[
                type(value)
            ](key, value)
    for stored, parameter in tiny.state(model).items():
        weight = parameter.numpy()
        if "q_proj" in stored or "k_proj" in stored:
            weight = _llama_cpp_rows(
                weight, config.num_attention_heads if "q_proj" in stored else config.num_key_value_heads
            )
        kind = gguf.GGMLQuantizationType.F16 if quantise and weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(stored), gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_gives_back_the_checkpoint_it_was_made_from(tmp_path):
    source = open_source(write_gguf(tmp_path / "m.gguf"))
    expected = tiny.state(tiny.model())
    assert same(dict(source.tensors(lambda name: False)), expected)
    assert "lm_head.weight" in expected
    original = tiny.CONFIGS["llama"].to_dict()
    told = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
    assert {key: source.config[key] for key in told} == {key: original[key] for key in told}
    assert source.config["rms_norm_eps"] == 1e-5
    assert source.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert not source.config["tie_word_embeddings"]
    assert not any("q_proj" in name for name, _ in source.tensors(lambda name: "q_proj" in name))


def test_gguf_halves_become_fp32(tmp_path):
    found = read(write_gguf(tmp_path / "m.gguf", quantise=True))
    expected = {n: t.half().float() if t.ndim == 2 else t for n, t in tiny.state(tiny.model()).items()}
    assert same(found, expected)


def test_gguf_tokenizer_and_files(tmp_path):
    files = open_source(write_gguf(tmp_path / "m.gguf", **{"tokenizer.chat_template": "{{ messages }}"})).files
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("t1ab").ids == [1, 39]
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["chat_template"] == "{{ messages }}"
    assert (settings["bos_token"], settings["eos_token"]) == ("t1", "t2")
    assert "unk_token" not in settings
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", r"general\.architecture 'mamba', pared reads 'llama'"),
        ("tokenizer.ggml.pre", "qwen2", r"tokenizer\.ggml\.pre 'qwen2', pared reads 'smollm'"),
        ("tokenizer.ggml.pre", None, r"tokenizer\.ggml\.pre None"),
        ("tokenizer.ggml.model", "llama", r"tokenizer\.ggml\.model 'llama'"),
        ("tokenizer.ggml.add_bos_token", True, "add_bos_token True"),
        ("llama.expert_count", 8, r"expert_count 8"),
        ("llama.rope.scaling.type", "yarn", r"rope\.scaling\.type 'yarn'"),
        ("llama.context_length", None, r"lacks llama\.context_length"),
        ("tokenizer.ggml.tokens", None, r"lacks tokenizer\.ggml\.tokens"),
    ],
)
def test_gguf_that_pared_does_not_know_exactly(tmp_path, key, value, message):
    with pytest.raises(errors.SourceError, match=message):
        open_source(write_gguf(tmp_path / "m.gguf", **{key: value}))


def test_gguf_with_a_foreign_tensor(tmp_path):
    with pytest.raises(errors.SourceError, match=r"holds rope_freqs\.weight"):
        gguf_source._name(tmp_path, "rope_freqs.weight")


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.03, 0.05, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_truncated_gguf(tmp_path, share):
    path = write_gguf(tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: max(5, int(share * len(content)))])
    with pytest.raises(errors.SourceError, match="truncated"):
        open_source(path)


@pytest.mark.parametrize("field", [4, 8, 16, 24])
@pytest.mark.parametrize("value", [1, 2**31, 2**63 + 5])
def test_gguf_with_hostile_counts(tmp_path, field, value):
    """Version, tensor count, key count and the first string's length, in turn."""
    path = write_gguf(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    size = 4 if field == 4 else 8
    content[field : field + size] = struct.pack("<Q", value)[:size]
    path.write_bytes(content)
    with pytest.raises((errors.SourceError, errors.MissingTensors)):
        convert(path, tmp_path / "out", progress=False)


def test_the_real_gguf_file(smollm2_gguf):
    """Facts about SmolLM2-135M that are published elsewhere than in the file."""
    source = open_source(smollm2_gguf)
    shapes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    assert {key: source.config[key] for key in shapes} == shapes
    assert source.config["tie_word_embeddings"]
    tokenizer = Tokenizer.from_str(source.files["tokenizer.json"].decode())
    assert tokenizer.encode("jumped   12").tokens == ["j", "umped", "ĠĠĠ", "1", "2"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1
    text = "Größe, naïve 漢字 🙂\n\ttabs and  spaces"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
