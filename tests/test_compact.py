"""The contract on disk: round trips, atomic and resumed writes, and every damage with its own error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from pared import compact, errors
from pared.compact import UnitEntry, open_folder
from pared.compact_writer import FolderWriter

CONFIG = {"model_type": "llama", "hidden_size": 4}
LINEAR = UnitEntry("dense", 1, {"a.q": (6, 4)}, {"weight": "a.q.weight"})
TIED = UnitEntry("dense", 1, {"lm_head": (10, 4)}, {"weight": "embed.weight"})
TENSORS = {
    "embed.weight": torch.arange(40, dtype=torch.float32).reshape(10, 4),
    "a.q.weight": torch.arange(24, dtype=torch.bfloat16).reshape(6, 4),
    "norm.weight": torch.ones(4, dtype=torch.float16),
}


def write(target: Path, key: str = "k", publish: bool = True, shard: int = 100, **options: object) -> FolderWriter:
    writer = FolderWriter(target, resume_key=key, max_shard_bytes=shard, **options)
    with writer:
        if not writer.holds("embed.weight"):
            writer.add_plain("embed.weight", TENSORS["embed.weight"])
            writer.add_unit(TIED, {})
        if not writer.holds("a.q"):
            writer.add_unit(LINEAR, {"a.q.weight": TENSORS["a.q.weight"]})
        if not writer.holds("norm.weight"):
            writer.add_plain("norm.weight", TENSORS["norm.weight"])
        writer.finish(CONFIG, {"source": "made here"}, {"tokenizer.json": b"{}"})
        if publish:
            writer.publish()
    return writer


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def tree(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".pared.journal"}


@pytest.mark.parametrize("shard", [100, 10**9])
def test_round_trip_is_bitwise_and_leaves_no_trace(tmp_path, shard):
    write(tmp_path / "out", shard=shard)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    one = {"model.safetensors"}
    two = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert names == {"config.json", "tokenizer.json"} | (one if shard > 100 else two)
    with open_folder(tmp_path / "out") as folder:
        folder.verify()
        assert folder.config == CONFIG
        assert folder.manifest.units == (TIED, LINEAR)
        assert folder.manifest.plain_shapes == {"embed.weight": (10, 4), "norm.weight": (4,)}
        assert folder.manifest.provenance == {"source": "made here"}
        for name, expected in TENSORS.items():
            assert folder.tensor(name).dtype == expected.dtype
            assert torch.equal(folder.tensor(name), expected)


def test_tensors_are_mapped_privately_and_outlive_the_folder(tmp_path):
    write(tmp_path / "out")
    with open_folder(tmp_path / "out") as folder:
        first, again = folder.tensor("embed.weight"), folder.tensor("embed.weight")
        assert first.data_ptr() == again.data_ptr()
    first.fill_(7)
    with open_folder(tmp_path / "out") as folder:
        assert torch.equal(folder.tensor("embed.weight"), TENSORS["embed.weight"])
        folder.verify()
        with pytest.raises(errors.MissingTensors, match=r"nowhere\.weight"):
            folder.tensor("nowhere.weight")


_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(_DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6))
def test_any_dtype_and_shape_survives(tmp_path_factory, kinds):
    target = tmp_path_factory.mktemp("any") / "out"
    made = {f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    with FolderWriter(target, resume_key="k") as writer:
        for name, tensor in made.items():
            writer.add_plain(name, tensor)
        writer.finish(CONFIG, {}, {})
        writer.publish()
    with open_folder(target) as folder:
        assert folder.manifest.plain == tuple(made)
        assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in made.items())


def test_strided_views_are_stored_as_they_read(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    with FolderWriter(tmp_path / "out", resume_key="k") as writer:
        writer.add_plain("t", matrix.t())
        with pytest.raises(ValueError, match="already written"):
            writer.add_plain("t", matrix)
        writer.finish(CONFIG, {}, {})
        writer.publish()
    with open_folder(tmp_path / "out") as folder:
        assert torch.equal(folder.tensor("t"), matrix.t())


def test_a_compressed_unit_gets_a_tombstone_and_the_other_config_key(tmp_path):
    unit = UnitEntry("bitmap", 1, {"a.q": (6, 4)}, {"values": "a.q.values"}, {"nnz": 3})
    with FolderWriter(tmp_path / "out", resume_key="k") as writer:
        writer.add_unit(unit, {"a.q.values": torch.ones(3)})
        writer.finish(CONFIG, {}, {})
        writer.publish()
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["quantization_config"]["quant_method"] == "pared"
    assert "pared" not in stored
    with open_folder(tmp_path / "out") as folder:
        assert folder.config == CONFIG
        assert folder.manifest.units == (unit,)
        assert folder.tensor("a.q.weight").shape == (0,)


# --- atomic, resumed, refused ----------------------------------------------------------------------


def test_an_existing_target_is_refused_and_replaced_only_on_request(tmp_path):
    write(tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(errors.FolderExists, match="--overwrite"):
        write(tmp_path / "out", shard=10**9)
    assert tree(tmp_path / "out") == before
    write(tmp_path / "out", shard=10**9, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out.replaced").exists()


def test_overwrite_never_replaces_what_is_no_compact_folder(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("text")
    for name in ("home", "file"):
        with pytest.raises(errors.FolderExists, match="not a compact folder"):
            write(tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home"]


def test_a_folder_that_only_looks_replaced_is_left_alone(tmp_path):
    write(tmp_path / "out.replaced")
    write(tmp_path / "out")
    write(tmp_path / "else")
    with pytest.raises(errors.FolderExists, match=r"out\.replaced is in the way"):
        write(tmp_path / "out", shard=10**9, overwrite=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "out.replaced") == tree(tmp_path / "else")


def test_a_foreign_partial_folder_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(errors.FolderExists, match="did not make it"):
        write(tmp_path / "out")
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_resume_skips_finished_shards_and_another_key_starts_anew(tmp_path):
    with FolderWriter(tmp_path / "out", resume_key="k", max_shard_bytes=100) as writer:
        writer.add_plain("embed.weight", TENSORS["embed.weight"])
        writer.add_unit(TIED, {})
        writer.add_unit(LINEAR, {"a.q.weight": TENSORS["a.q.weight"]})  # the first shard is full: flushed
    journal = tmp_path / "out.partial" / ".pared.journal"
    journal.write_text(journal.read_text() + '{"torn": ')
    first = tmp_path / "out.partial" / "shard-00001.safetensors"
    inode = first.stat().st_ino
    with FolderWriter(tmp_path / "out", resume_key="k", max_shard_bytes=100) as writer:
        assert [writer.holds(n) for n in ("embed.weight", "lm_head", "a.q", "norm.weight")] == [
            True,
            True,
            False,
            False,
        ]
        assert first.stat().st_ino == inode
    write(tmp_path / "out", publish=False)
    with FolderWriter(tmp_path / "out", resume_key="k", max_shard_bytes=100) as writer:
        assert writer.holds("norm.weight")
    write(tmp_path / "out")
    write(tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")

    write(tmp_path / "other", publish=False)
    with FolderWriter(tmp_path / "other", resume_key="changed", max_shard_bytes=100) as writer:
        assert not writer.holds("embed.weight")
        assert [p.name for p in (tmp_path / "other.partial").iterdir()] == [".pared.journal"]
    assert not (tmp_path / "other.partial").exists()


def test_a_shard_lost_since_the_journal_starts_anew(tmp_path):
    write(tmp_path / "out", publish=False)
    (tmp_path / "out.partial" / "model-00001-of-00002.safetensors").write_bytes(b"short")
    with FolderWriter(tmp_path / "out", resume_key="k") as writer:
        assert not writer.holds("embed.weight")


@pytest.mark.parametrize("crash_at", range(1, 6))
def test_a_crash_while_replacing_loses_nothing(tmp_path, crash_at, monkeypatch):
    """Whichever rename or deletion of `publish` dies, the old or the new folder is whole, and the next run finishes."""
    write(tmp_path / "out")
    old = tree(tmp_path / "out")
    write(tmp_path / "fresh", shard=10**9)
    new = tree(tmp_path / "fresh")
    steps = iter(range(1, 100))

    def dying(real):
        def step(*args, **kwargs):
            if next(steps) == crash_at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return step

    writer = write(tmp_path / "out", key="n", shard=10**9, publish=False, overwrite=True)
    monkeypatch.setattr(os, "rename", dying(os.rename))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    with pytest.raises(KeyboardInterrupt):
        writer.publish()
    monkeypatch.undo()
    assert any(p.exists() and tree(p) in (old, new) for p in (tmp_path / "out", tmp_path / "out.replaced"))
    if not (tmp_path / "out").exists():
        with pytest.raises(errors.FolderError, match=r"out\.replaced"):
            open_folder(tmp_path / "out")
    write(tmp_path / "out", key="n2", shard=10**9, overwrite=True)
    assert tree(tmp_path / "out") == new
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "out"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    writer = FolderWriter(tmp_path / "out", resume_key="k")
    with writer:
        writer.add_plain("t", torch.ones(1))
        writer.finish(CONFIG, {}, {})
        (tmp_path / "out").mkdir()
        with pytest.raises(errors.FolderExists):
            writer.publish()
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()


def test_two_processes_with_one_target(tmp_path):
    hold = (
        "import sys; from pared.compact_writer import FolderWriter\n"
        "with FolderWriter(sys.argv[1], resume_key='k'): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-P", "-c", hold, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(errors.FolderBusy, match="another process"):
            FolderWriter(tmp_path / "out", resume_key="k")
        other.stdin.close()
    assert other.returncode == 0
    write(tmp_path / "out")


def test_a_full_disk_keeps_what_was_finished(tmp_path):
    """The second shard is a link to /dev/full, whose every write fails as a full disk does."""
    writer = FolderWriter(tmp_path / "out", resume_key="k", max_shard_bytes=100)
    with writer:
        writer.add_plain("embed.weight", TENSORS["embed.weight"])
        writer.add_unit(LINEAR, {"a.q.weight": TENSORS["a.q.weight"]})
        (tmp_path / "out.partial" / "shard-00002.safetensors").symlink_to("/dev/full")
        with pytest.raises(errors.DiskFull, match="resumes"):
            writer.finish(CONFIG, {}, {})
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "shard-00002.safetensors").unlink(missing_ok=True)
    with FolderWriter(tmp_path / "out", resume_key="k", max_shard_bytes=100) as writer:
        assert writer.holds("embed.weight")
        assert not writer.holds("a.q")


def test_a_disk_that_is_full_for_the_journal(tmp_path):
    """The shard is written but not counted: the next run writes it again."""
    writer = FolderWriter(tmp_path / "out", resume_key="k", max_shard_bytes=100)
    with writer:
        writer.add_plain("embed.weight", TENSORS["embed.weight"])
        writer._journal.close()
        writer._journal = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115 (the writer closes it)
        with pytest.raises(errors.DiskFull):
            writer.finish(CONFIG, {}, {})
    with FolderWriter(tmp_path / "out", resume_key="k", max_shard_bytes=100) as writer:
        assert not writer.holds("embed.weight")


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.FolderError, match="cannot be written"):
        FolderWriter(tmp_path / "file" / "out", resume_key="k")


# --- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "out")
    return tmp_path / "out"


def test_not_a_folder_no_config_no_manifest(tmp_path):
    with pytest.raises(errors.FolderError, match="not a folder"):
        open_folder(tmp_path / "nothing")
    (tmp_path / "plain").mkdir()
    with pytest.raises(errors.FolderError, match=r"no config\.json"):
        open_folder(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(errors.FolderError, match=r"ordinary checkpoint.*pared convert"):
        open_folder(tmp_path / "plain")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"\ud800"'])
def test_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(errors.FolderDamaged, match=r"config\.json"):
        open_folder(folder)


def test_newer_version_is_refused_by_number(folder):
    edit_config(folder, lambda c: c["pared"].update(format_version=9, pared_version="7.1", units="?"))
    with pytest.raises(errors.UnknownVersion, match=r"format_version 9, written by pared 7\.1.*up to 1"):
        open_folder(folder)


@pytest.mark.parametrize("key", ["format_version", "units", "plain", "tensors", "files", "provenance"])
@pytest.mark.parametrize("value", [None, 3, [[]], "text", float("inf")])
def test_a_manifest_of_the_wrong_form(folder, key, value):
    edit_config(folder, lambda c: c["pared"].pop(key) if value is None else c["pared"].update({key: value}))
    with pytest.raises((errors.FolderDamaged, errors.UnknownVersion, errors.MissingTensors)):
        open_folder(folder)


def test_a_manifest_cannot_name_files_elsewhere(folder):
    edit_config(folder, lambda c: c["pared"]["files"].update({"../x.safetensors": {"bytes": 1, "sha256": ""}}))
    with pytest.raises(errors.FolderDamaged, match="outside"):
        open_folder(folder)


SHARD = "model-00001-of-00002.safetensors"


def test_truncated_grown_and_lost_shards(folder):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-1])
    with pytest.raises(errors.FolderDamaged, match=rf"{SHARD} is truncated: {len(content) - 1} bytes.*{len(content)}"):
        open_folder(folder)
    (folder / SHARD).write_bytes(content + b"x")
    with pytest.raises(errors.FolderDamaged, match="has grown"):
        open_folder(folder)
    (folder / SHARD).unlink()
    with pytest.raises(errors.FolderDamaged, match=f"lacks the shard {SHARD}"):
        open_folder(folder)


def test_flipped_bits_are_found_by_verify(folder):
    content = bytearray((folder / SHARD).read_bytes())
    content[-1] ^= 1
    (folder / SHARD).write_bytes(content)
    with open_folder(folder) as opened, pytest.raises(errors.FolderDamaged, match=f"{SHARD}.*sha256"):
        opened.verify()
    (folder / "tokenizer.json").unlink()
    write(folder.with_name("second"))
    (folder.with_name("second") / "tokenizer.json").unlink()
    with (
        open_folder(folder.with_name("second")) as opened,
        pytest.raises(errors.FolderDamaged, match=r"tokenizer\.json"),
    ):
        opened.verify()


def _with_header(folder: Path, header: bytes, length: int | None = None) -> None:
    """Replace the first shard by one of the same size with this header."""
    size = (folder / SHARD).stat().st_size
    content = (len(header) if length is None else length).to_bytes(8, "little") + header
    (folder / SHARD).write_bytes((content + b"\0" * size)[:size])


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"", 0),
        (b"{}", 2**63),
        (b"{}", 2**64 - 1),
        (b"[]", None),
        (b'{"t":{"dtype":"F32","shape":[10,4],"data_offsets":[0,99999999]}}', None),
        (b'{"t":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}', None),
        (b'{"t":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', None),
        (b'{"t":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}', None),
        (b'{"t":{"dtype":"EVIL","shape":[4],"data_offsets":[0,16]}}', None),
        (b"[" * 200, None),
    ],
)
def test_hostile_headers(folder, header, length):
    _with_header(folder, header, length)
    with pytest.raises(errors.FolderDamaged, match=f"{SHARD} is no readable safetensors"):
        open_folder(folder)


def test_missing_leftover_and_misshapen_tensors(folder):
    def unknown(config):
        config["pared"]["plain"].append("ghost.weight")

    def unused(config):
        config["pared"]["plain"].remove("norm.weight")

    def shape(config):
        config["pared"]["tensors"]["norm.weight"]["shape"] = [2, 2]

    def dtype(config):
        config["pared"]["tensors"]["norm.weight"]["dtype"] = "BF16"

    original = (folder / "config.json").read_text()
    cases = [
        (unknown, errors.MissingTensors, r"ghost\.weight"),
        (unused, errors.LeftoverTensors, r"norm\.weight"),
        (shape, errors.WrongShape, r"norm\.weight .* is F16 \[4\].* says F16 \[2, 2\]"),
        (dtype, errors.WrongShape, r"says BF16 \[4\]"),
    ]
    for change, error, message in cases:
        (folder / "config.json").write_text(original)
        edit_config(folder, change)
        with pytest.raises(error, match=message):
            open_folder(folder)


def test_a_stray_shard_and_a_wrong_index(folder):
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(errors.LeftoverTensors, match="model-00003"):
        open_folder(folder)
    (folder / "model-00003-of-00003.safetensors").unlink()
    index = json.loads((folder / compact.INDEX).read_text())
    index["weight_map"]["norm.weight"] = SHARD
    (folder / compact.INDEX).write_text(json.dumps(index))
    with pytest.raises(errors.FolderDamaged, match="does not place"):
        open_folder(folder)
    (folder / compact.INDEX).unlink()
    with pytest.raises(errors.FolderDamaged, match=r"index\.json cannot be read"):
        open_folder(folder)


def test_many_names_are_shortened(folder):
    edit_config(folder, lambda c: c["pared"]["plain"].extend(f"g{i}" for i in range(9)))
    with pytest.raises(errors.MissingTensors, match="g0, g1, g2, g3, g4 and 4 more"):
        open_folder(folder)


def test_shards_are_stock_safetensors(folder):
    with safe_open(folder / SHARD, framework="pt") as stock:
        assert stock.metadata() == {"format": "pt"}
        assert torch.equal(stock.get_tensor("embed.weight"), TENSORS["embed.weight"])
    assert int.from_bytes((folder / SHARD).read_bytes()[:8], "little") % 64 == 56
