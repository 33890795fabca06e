"""The whole way: checkpoint to compact folder and back, bit for bit, through every interruption."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from pared import errors
from pared.compact import open_folder
from pared.compact_writer import FolderWriter
from pared.convert import convert, export
from pared.converters.pack import pack
from pared.converters.sources.detect import open_source
from pared.evaluate import decoder_logits
from pared.runtime.accounting import decode_traffic
from pared.runtime.loader import load
from pared.tests import tiny

TOKENS = torch.tensor([[1, 7, 3, 30, 39, 0, 12]])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in sorted(path.glob("model*.safetensors")) for name, t in load_file(shard).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def stock(path: Path) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(path).eval()


def run(src: Path, dst: Path, **options: object) -> Path:
    convert(src, dst, progress=False, **options)
    return dst


def change_weights(path: Path, change) -> None:
    stored = load_file(path / "model.safetensors")
    change(stored)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def src(tmp_path) -> Path:
    return tiny.checkpoint(tmp_path / "src")


# --- lossless, both ways ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("shard", [4000, 10**9], ids=["sharded", "single"])
def test_a_converted_folder_is_the_checkpoint_to_transformers_and_back(tmp_path, name, shard):
    src = tiny.checkpoint(tmp_path / "src", name)
    out = run(src, tmp_path / "out", max_shard_bytes=shard)
    original, converted = stock(src), stock(out)
    assert type(converted) is type(original)
    assert same(tiny.state(converted), tiny.state(original))
    assert torch.equal(converted(TOKENS).logits, original(TOKENS).logits)

    back = export(out, tmp_path / "back", progress=False)
    assert same(weights(back), weights(src))
    kept = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert {n: (back / n).read_bytes() for n in kept} == {n: (src / n).read_bytes() for n in kept}
    assert {p.name for p in tmp_path.iterdir()} == {"src", "out", "back"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_source_is_kept(tmp_path, dtype):
    src = tiny.checkpoint(tmp_path / "src", dtype=dtype)
    out = run(src, tmp_path / "out")
    assert same(weights(out), weights(src))
    assert stock(out).dtype == dtype


def test_transformers_reads_it_in_a_process_without_pared(tmp_path, src):
    out = run(src, tmp_path / "out")
    script = (
        "import sys, torch, transformers as hf\n"
        "model = hf.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "torch.save(model(torch.tensor([[1, 7, 3, 30, 39, 0, 12]])).logits, sys.argv[2])\n"
        "assert not any(name.split('.')[0] == 'pared' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script, out, tmp_path / "logits"], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), stock(src)(TOKENS).logits)


def test_a_tied_head_is_stored_once_and_served_by_the_embedding(tmp_path):
    out = run(tiny.checkpoint(tmp_path / "src", "qwen2-tied"), tmp_path / "out")
    assert "lm_head.weight" not in weights(out)
    with open_folder(out) as folder:
        (head,) = [unit for unit in folder.manifest.units if "lm_head" in unit.modules]
        assert head.tensors == {"weight": "model.embed_tokens.weight"}
        assert head.modules == {"lm_head": (40, 16)}


def test_conv1d_keeps_its_layout_and_says_so(tmp_path):
    src = tiny.checkpoint(tmp_path / "src", "gpt2")
    with open_folder(run(src, tmp_path / "out")) as folder:
        units = {path: unit for unit in folder.manifest.units for path in unit.modules}
        fused = units["transformer.h.0.attn.c_attn"]
        assert fused.modules == {"transformer.h.0.attn.c_attn": (48, 16)}
        assert fused.params == {"transposed": True}
        assert folder.tensor(fused.tensors["weight"]).shape == (16, 48)


def test_a_second_copy_of_a_tied_head(tmp_path):
    src = tiny.checkpoint(tmp_path / "src", "llama-tied-biased")
    expected = weights(src)
    change_weights(src, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert same(weights(run(src, tmp_path / "equal")), expected)
    change_weights(src, lambda w: w["lm_head.weight"].add_(1))
    with pytest.raises(
        errors.SourceError, match=r"stands for .*embed.* a second time and differs; .*tie_word_embeddings"
    ):
        run(src, tmp_path / "different")


@pytest.mark.parametrize("name", ["llama-tied-biased", "opt-projected", "gpt2"])
def test_the_checkpoint_of_a_bare_backbone_gets_its_prefix(tmp_path, name):
    src = tiny.checkpoint(tmp_path / "src", name)
    model = tiny.model(name)
    model.base_model.save_pretrained(src)
    assert not any(stored.startswith(("model.", "transformer.")) for stored in weights(src))
    out = run(src, tmp_path / "out")
    assert torch.equal(stock(out)(TOKENS).logits, model(TOKENS).logits)


def test_buffers_of_old_checkpoints_are_dropped(tmp_path, src):
    expected = weights(src)
    change_weights(src, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert same(weights(run(src, tmp_path / "out")), expected)


def test_a_dense_compact_folder_can_be_converted_again(tmp_path, src):
    first = run(src, tmp_path / "first")
    second = run(first, tmp_path / "second", dtype="bf16")
    with open_folder(second) as folder:
        assert "pared" not in folder.config
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights(second).values())


def test_a_cast_is_done_once_and_written_down(tmp_path, src):
    out = run(src, tmp_path / "out", dtype="bf16")
    assert same(weights(out), {name: tensor.bfloat16() for name, tensor in weights(src).items()})
    assert stock(out).dtype == torch.bfloat16
    with open_folder(out) as folder:
        assert folder.manifest.provenance["cast"] == "bfloat16"
        assert folder.config["dtype"] == "bfloat16"


def test_a_compressed_folder_stops_a_stock_loader(tmp_path, src):
    """Without us transformers must not fill a packed module with random numbers: it meets the [0]-shaped weight."""
    with open_folder(run(src, tmp_path / "dense")) as folder, FolderWriter(tmp_path / "out", resume_key="k") as writer:
        for name in folder.manifest.plain:
            writer.add_plain(name, folder.tensor(name))
        for i, unit in enumerate(folder.manifest.units):
            (name,) = unit.tensors.values()
            packed = name.replace(".weight", ".packed")
            entry = replace(unit, format="later", tensors={"packed": packed}) if i == 3 else unit
            writer.add_unit(entry, {packed if i == 3 else name: folder.tensor(name)})
        writer.finish(folder.config, {}, {})
        writer.publish()
    with open_folder(tmp_path / "out") as folder:
        assert not folder.manifest.stock
    script = "import sys, transformers as hf\nhf.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    done = subprocess.run([sys.executable, "-P", "-c", script, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode != 0 and "mismatch" in done.stderr.lower()
    with pytest.raises(errors.UnknownVersion, match="later version 1"):
        load(tmp_path / "out", "cpu")
    with pytest.raises(errors.SourceError, match="pared export"):
        run(tmp_path / "out", tmp_path / "again")


# --- measured -----------------------------------------------------------------------------------------


def test_the_report_and_its_provenance(tmp_path, src):
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 40}" for i in range(100)))
    report = convert(src, tmp_path / "out", text=tmp_path / "text.txt", progress=False)
    (row,) = report.rows
    assert row.name == "out"
    assert row.bytes_per_token == sum(decode_traffic(tmp_path / "out").values())
    assert row.tokens_per_second > 0
    assert 1 < row.perplexity < 1000
    with open_folder(tmp_path / "out") as folder:
        folder.verify()
        measured = folder.manifest.provenance["measured"]
        assert measured["perplexity"] == row.perplexity
        assert folder.manifest.provenance["source"]["name"] == "src"
        assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_progress_is_shown_and_can_be_silent(tmp_path, src, capsys):
    convert(src, tmp_path / "loud")
    assert "packing: 100%" in capsys.readouterr().err
    convert(src, tmp_path / "silent", progress=False)
    assert capsys.readouterr().err == ""


# --- refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_weights_are_named_with_their_index(tmp_path, src, value):
    change_weights(src, lambda w: w["model.layers.1.mlp.up_proj.weight"].__setitem__((5, 3), value))
    with pytest.raises(errors.BadWeights, match=rf"model\.layers\.1\.mlp\.up_proj\.weight\[5, 3\] is {value}"):
        run(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cast_that_overflows(tmp_path, src):
    change_weights(src, lambda w: w["model.norm.weight"].__setitem__(2, 1e6))
    with pytest.raises(errors.BadWeights, match=r"norm\.weight\[2\] is inf once cast from .*float32 to .*float16"):
        run(src, tmp_path / "out", dtype="fp16")
    run(src, tmp_path / "out", dtype="bf16")


def test_missing_leftover_misshapen_and_foreign_tensors(tmp_path):
    def missing(w):
        del w["model.layers.1.mlp.up_proj.weight"], w["model.layers.0.input_layernorm.weight"]

    def leftover(w):
        w["model.layers.2.mlp.up_proj.weight"] = torch.ones(24, 16)

    def bias(w):
        w["model.layers.1.mlp.up_proj.bias"] = torch.ones(24)

    def shape(w):
        w["model.layers.1.mlp.up_proj.weight"] = torch.ones(24, 15)

    def dtype(w):
        w["model.layers.1.mlp.up_proj.weight"] = torch.ones(24, 16, dtype=torch.int8)

    cases = [
        (missing, errors.MissingTensors, r"no model\.layers\.0\.input_layernorm\.weight and 1 more"),
        (leftover, errors.LeftoverTensors, r"model\.layers\.2\.mlp\.up_proj\.weight"),
        (bias, errors.LeftoverTensors, r"model\.layers\.1\.mlp\.up_proj\.bias"),
        (shape, errors.WrongShape, r"up_proj\.weight in .* is \[24, 15\], .* says \[24, 16\]"),
        (dtype, errors.SourceError, r"up_proj\.weight is stored as torch\.int8"),
    ]
    for i, (change, error, message) in enumerate(cases):
        src = tiny.checkpoint(tmp_path / f"src{i}")
        change_weights(src, change)
        with pytest.raises(error, match=message):
            run(src, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


def test_mixed_dtypes_inside_a_module_need_a_cast(tmp_path):
    src = tiny.checkpoint(tmp_path / "src", "qwen2-tied", torch.bfloat16)
    change_weights(src, lambda w: w.update({n: t.float() for n, t in w.items() if n.endswith("q_proj.bias")}))
    with pytest.raises(errors.SourceError, match=r"q_proj fits no format .*--dtype"):
        run(src, tmp_path / "out")
    assert stock(run(src, tmp_path / "out", dtype="bf16")).dtype == torch.bfloat16


def test_a_model_type_that_pared_does_not_know(tmp_path, src):
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(errors.UnsupportedModel, match="mamba"):
        run(src, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["magic:blocks=3"]}, "no method is called 'magic'; known are sleb, l3prune, "),
        ({"methods": ["basis_sharing"]}, "basis_sharing reads a text; give --calibration FILE"),
        ({"calibration": "text.txt"}, "calibration is what methods read, and none is given"),
        ({"format": "zip"}, "no format is called 'zip'; known are dense, shared_basis"),
        ({"dtype": "int4"}, "dtype must be bf16, fp16 or fp32, got 'int4'"),
        ({"dtype": torch.float64}, r"got torch\.float64"),
        ({"text": "nowhere.txt"}, r"nowhere\.txt cannot be read"),
    ],
)
def test_options_that_do_not_exist(tmp_path, src, options, message):
    with pytest.raises(errors.BadParameter, match=message):
        run(src, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_targets_are_refused_and_left_as_they_are(tmp_path, src):
    out = run(src, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(errors.FolderExists, match="--overwrite"):
        run(src, out, dtype="bf16")
    with pytest.raises(errors.FolderExists, match="both source and target"):
        run(out, tmp_path / "src" / ".." / "out", overwrite=True)
    with pytest.raises(errors.FolderExists, match="not a compact folder"):
        run(out, src, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    run(src, out, dtype="bf16", overwrite=True)
    assert stock(out).dtype == torch.bfloat16
    assert not list(tmp_path.glob("*.replaced"))


# --- interrupted --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pared.compact_writer import FolderWriter
from pared.convert import convert

flush, done = FolderWriter._flush, []

def dying(writer):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(writer)
    done.append(writer)

FolderWriter._flush = dying
convert(sys.argv[1], sys.argv[2], max_shard_bytes=4000, progress=False)
"""


def test_kill_9_leaves_the_target_untouched_and_resumes(tmp_path, src):
    out = run(src, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    killed = subprocess.run([sys.executable, "-P", "-c", KILLED, src, tmp_path / "new"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    finished = sorted((tmp_path / "new.partial").glob("shard-*.safetensors"))
    assert len(finished) == 2
    inodes = [shard.stat().st_ino for shard in finished]

    resumed = run(src, tmp_path / "new", max_shard_bytes=4000)
    assert [shard.stat().st_ino for shard in sorted(resumed.glob("model-*.safetensors"))[:2]] == inodes
    fresh = run(src, tmp_path / "fresh", max_shard_bytes=4000)
    files = {file.name: file.read_bytes() for file in fresh.iterdir() if file.name != "config.json"}
    assert {file.name: file.read_bytes() for file in resumed.iterdir() if file.name != "config.json"} == files
    assert torch.equal(stock(resumed)(TOKENS).logits, stock(src)(TOKENS).logits)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize("name", ["llama-tied-biased", "opt-projected", "gpt2"])
def test_every_shard_is_a_place_to_resume_from(tmp_path, name, monkeypatch):
    src = tiny.checkpoint(tmp_path / "src", name)
    expected, shards = weights(src), 0
    while True:
        with monkeypatch.context() as patch:
            flush = FolderWriter._flush
            budget = iter([True])

            def one_shard(writer: FolderWriter, flush=flush, budget=budget) -> None:
                if not next(budget, False):
                    raise KeyboardInterrupt
                flush(writer)

            patch.setattr(FolderWriter, "_flush", one_shard)
            try:
                run(src, tmp_path / "out", max_shard_bytes=3000)
                break
            except KeyboardInterrupt:
                shards += 1
                assert len(list((tmp_path / "out.partial").glob("shard-*"))) == shards
    assert shards > 3
    assert same(weights(tmp_path / "out"), expected)


def test_no_more_than_a_shard_is_held_in_memory(tmp_path, src):
    """Every tensor of the stream is counted until it is let go."""
    source, live, peak = open_source(src), [0], [0]

    def counted(skip):
        for name, tensor in source.tensors(skip):
            live[0] += tensor.nbytes
            peak[0] = max(peak[0], live[0])
            weakref.finalize(tensor, lambda size=tensor.nbytes: live.__setitem__(0, live[0] - size))
            yield name, tensor
            del tensor

    with FolderWriter(tmp_path / "out", resume_key="k", max_shard_bytes=4000) as writer:
        pack(replace(source, tensors=counted), writer, progress=False)
    largest = max(tensor.nbytes for tensor in weights(src).values())
    assert 4000 - largest < peak[0] <= 4000 + 2 * largest < sum(t.nbytes for t in weights(src).values()) / 2


def test_another_source_or_option_does_not_resume(tmp_path, src):
    subprocess.run([sys.executable, "-P", "-c", KILLED, src, tmp_path / "new"], capture_output=True)
    assert list((tmp_path / "new.partial").glob("shard-*.safetensors"))
    out = run(src, tmp_path / "new", max_shard_bytes=4000, dtype="bf16")
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}


def test_a_full_disk_is_said_and_survived(tmp_path, src, monkeypatch):
    flush, done = FolderWriter._flush, []

    def filling(writer: FolderWriter) -> None:
        if len(done) == 1:
            (writer.partial / "shard-00002.safetensors").symlink_to("/dev/full")
        done.append(writer)
        flush(writer)

    monkeypatch.setattr(FolderWriter, "_flush", filling)
    with pytest.raises(errors.DiskFull, match=r"no space left for .*shard-00002.*it resumes"):
        run(src, tmp_path / "out", max_shard_bytes=4000)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out.partial").glob("shard-*")] == ["shard-00001.safetensors"]
    assert same(weights(run(src, tmp_path / "out", max_shard_bytes=4000)), weights(src))


def test_two_conversions_into_one_target(tmp_path, src):
    with FolderWriter(tmp_path / "out", resume_key="other"), pytest.raises(errors.FolderBusy, match="another process"):
        run(src, tmp_path / "out")
    run(src, tmp_path / "out")


def test_a_folder_that_does_not_load_is_not_published(tmp_path, src, monkeypatch):
    def broken(*args, **kwargs):
        raise errors.WrongShape("a mistake of ours")

    monkeypatch.setattr(sys.modules["pared.convert"], "measure", broken)
    with pytest.raises(errors.WrongShape):
        run(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- frozen -------------------------------------------------------------------------------------------


GOLDEN = Path(__file__).parent / "golden" / "dense_v1"


def test_the_golden_folder_of_version_1_loads_for_ever():
    """Written once, by format version 1: a tied, biased bf16 Llama of 16 tokens in two shards. Never write it again."""
    digest = hashlib.sha256()
    with open_folder(GOLDEN) as folder:
        folder.verify()
        assert folder.manifest.format_version == 1
        assert folder.manifest.shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        for name in sorted(folder.manifest.tensors):
            digest.update(name.encode() + folder.tensor(name).view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == "240a8ccdc74473c6c6b1fbdd4fae1e9fc7ff674613e78f259182c2b2e204a604"

    tokens = torch.tensor([1, 5, 9, 14])
    ours = decoder_logits(load(GOLDEN, "cpu", torch.float32))(tokens)[-1]
    theirs = hf.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)(tokens[None]).logits[0, -1]
    for logits in (ours, theirs):
        top = logits.topk(3)
        assert top.indices.tolist() == [14, 15, 7]
        assert torch.allclose(top.values, torch.tensor([1.5242, 1.3153, 1.1635]), atol=1e-4)


def test_the_real_model_is_whole(smollm2):
    with open_folder(smollm2) as folder:
        folder.verify()
        assert len(folder.manifest.units) == 211
        assert folder.manifest.stock
        assert sum(t.numel() for t in map(folder.tensor, folder.manifest.tensors)) == 134_515_008
