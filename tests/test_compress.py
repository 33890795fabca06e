"""Methods through `convert`: what lands in the folder, recovery, and conversions that are killed half-way."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pared.compact import open_folder
from pared.convert import convert
from pared.converters import recipe, training
from pared.converters.calibration import Calibration
from pared.converters.compress import compress
from pared.converters.layout import encode_group, layout_sizes
from pared.converters.methods import basis_sharing, recover
from pared.converters.modelling import instantiate, units
from pared.converters.record import Record
from pared.converters.sources.detect import open_source
from pared.errors import BadParameter, BadWeights, SourceError
from pared.evaluate import decoder_logits
from pared.kernels import formats, shared_basis
from pared.kernels.unit import Unit
from pared.runtime.loader import load
from pared.tests import tiny

TOKENS = torch.tensor([1, 7, 3, 30, 39, 0, 12])
BASIS = "basis_sharing:ratio=40,samples=20,length=16"
RECOVER = "recover:tokens=640,length=16,lr=1e-2"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i * i % 37}" for i in range(3000)))
    return path


def run(src: Path, dst: Path, reads: Path, *methods: str, **options: object):
    return convert(src, dst, methods=methods or (BASIS,), calibration=reads, progress=False, **options)


def calibration(src: Path, text: Path) -> Calibration:
    from pared.converters.calibration import tokenizer_of

    return Calibration(tokenizer_of(open_source(src)), text.read_text(), text.name)


def in_memory(src: Path, text: Path, folder: Path, *methods: str):
    """The model that the methods make, in transformers."""
    model, read = instantiate(open_source(src), torch.float32), calibration(src, text)
    for i, step in enumerate(recipe.parse(methods)):
        record = Record(folder / str(i))
        step.method.search(model, read, record, step.params, progress=False)
        step.method.apply(model, record)
    return model


# --- what lands in the folder -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "gpt2", "opt-projected", "phi3", "qwen3"])
@pytest.mark.parametrize("format", [None, "dense", "shared_basis"])
def test_the_folder_computes_what_the_compressed_model_does(tmp_path, text, name, format):
    src = tiny.checkpoint(tmp_path / "src", name)
    run(src, tmp_path / "out", text, format=format)
    expected = in_memory(src, text, tmp_path / "work", BASIS)(TOKENS[None]).logits[0]
    assert torch.allclose(decoder_logits(load(tmp_path / "out", "cpu"))(TOKENS), expected, rtol=1e-3, atol=1e-4)
    with open_folder(tmp_path / "out") as folder:
        stored = Counter(unit.format for unit in folder.manifest.units)
    linears = sum(1 for path in expected_modules(src) if path)
    assert {"dense": stored["shared_basis"] == 0, "shared_basis": stored["dense"] <= linears - 2}.get(format, True)
    assert {p.name for p in tmp_path.iterdir()} == {"src", "out", "text.txt", "work"}
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


def expected_modules(src: Path) -> list[str]:
    from pared import families

    return list(families.read(open_source(src).config).linears())


def test_the_report_has_the_original_and_the_compressed_model(tmp_path, text):
    src = tiny.checkpoint(tmp_path / "src", "llama", torch.bfloat16)
    report = run(src, tmp_path / "out", text, text=text)
    original, row = report.rows
    assert (original.name, row.name) == ("original", "out")
    assert None not in (original.perplexity, row.perplexity, original.tokens_per_second, row.tokens_per_second)
    assert original.perplexity != row.perplexity
    assert row.bytes_per_token < original.bytes_per_token
    dense = convert(src, tmp_path / "dense", text=text, progress=False).rows[0]
    assert (dense.perplexity, dense.bytes_per_token) == (original.perplexity, original.bytes_per_token)
    with open_folder(tmp_path / "out") as folder:
        provenance = folder.manifest.provenance
        assert folder.tensor("model.norm.weight").dtype == torch.bfloat16
        roles = [(role, name) for unit in folder.manifest.units for role, name in unit.tensors.items()]
        assert {folder.tensor(name).dtype for role, name in roles if role != "pivots"} == {torch.bfloat16}
    assert provenance["measured"]["perplexity"] == row.perplexity
    assert provenance["original"]["perplexity"] == original.perplexity
    (method,) = provenance["methods"]
    assert method["name"] == "basis_sharing"
    assert method["params"]["ratio"] == 40
    assert method["calibration"] == {"name": "text.txt", "sha256": calibration(src, text).sha256}
    assert set(method["result"]["error"]) == set(method["result"]["shared"])
    assert all(0 < error < 1 for error in method["result"]["error"].values())


def group(n: int, k: int, rank: int, count: int) -> Unit:
    modules = {f"m{i}": (n, k) for i in range(count)}
    tensors = {"basis": torch.randn(rank, k)} | {f"coefficients.{m}": torch.randn(n, rank) for m in modules}
    return Unit(modules, tensors)


@pytest.mark.parametrize(
    ("unit", "best"),
    [
        (group(64, 64, 60, 1), "dense"),
        (group(64, 64, 40, 2), "pivoted"),
        (group(64, 64, 1, 1), "factored"),
        (group(200, 64, 64, 1), "dense"),
    ],
)
def test_a_unit_is_stored_as_what_reads_the_fewest_bytes(unit, best):
    torch.manual_seed(0)
    sizes = layout_sizes(unit, 2)
    assert min(sizes, key=sizes.__getitem__) == best
    packs = encode_group(unit, torch.bfloat16, None, transposed=False)
    read = sum(formats.by_name(p.format).traffic(p, 1).weight_bytes for p in packs)
    assert read == sizes[best]
    forced = encode_group(unit, torch.bfloat16, "dense", transposed=False)
    assert sum(formats.by_name(p.format).traffic(p, 1).weight_bytes for p in forced) == sizes["dense"]
    (basis,) = encode_group(unit, torch.bfloat16, "shared_basis", transposed=False)
    assert shared_basis.traffic(basis, 1).weight_bytes == min(sizes["factored"], sizes["pivoted"])


def test_a_rank_above_the_inputs_is_refused():
    with pytest.raises(SourceError, match="m0: rank 9 is above the 8 inputs"):
        encode_group(group(16, 8, 9, 1), torch.float32, None, transposed=False)


# --- recovery ---------------------------------------------------------------------------------------


def compressed(tmp_path: Path, text: Path, name: str = "llama"):
    src = tiny.checkpoint(tmp_path / "src", name)
    return in_memory(src, text, tmp_path / "work", BASIS), calibration(src, text)


def trained(model, read: Calibration, folder: Path, **given: object) -> Record:
    record = Record(folder)
    params = recover.Params(**{"tokens": 2048, "length": 16, "batch": 4, "lr": 1e-2, **given})
    recover.search(model, read, record, params, progress=False)
    return record


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-projected"])
def test_recovery_trains_merges_exactly_and_keeps_the_bases(tmp_path, text, monkeypatch, name):
    model, read = compressed(tmp_path, text, name)
    before = {path: module.clone() for path, module in model.state_dict().items()}
    plain = model(TOKENS[None]).logits
    seen = []
    merge = recover._merged

    def spy(*told):
        seen or seen.append(model(TOKENS[None]).logits.detach())
        return merge(*told)

    monkeypatch.setattr(recover, "_merged", spy)
    record = trained(model, read, tmp_path / "trained")
    assert torch.equal(model(TOKENS[None]).logits, plain), "search leaves the model as it was"
    recover.apply(model, record)
    assert torch.allclose(model(TOKENS[None]).logits, seen[0], rtol=1e-4, atol=1e-5)
    changed = {path for path, module in model.state_dict().items() if not torch.equal(module, before[path])}
    assert changed == {f"{path}.coefficients" for paths in units(model) for path in paths}
    first, last = recover.summary(record)["loss"]
    assert last < first


def test_the_record_is_the_whole_of_what_apply_needs(tmp_path, text):
    model, read = compressed(tmp_path, text)
    record = trained(model, read, tmp_path / "trained")
    recover.apply(model, record)
    again = in_memory(tmp_path / "src", text, tmp_path / "work", BASIS)
    recover.apply(again, Record(record.folder))
    assert torch.equal(again(TOKENS[None]).logits, model(TOKENS[None]).logits)


def test_a_loss_that_is_not_finite_ends_the_training_with_the_last_good_state(tmp_path, text, monkeypatch):
    model, read = compressed(tmp_path, text)
    loss, calls = recover.next_token_loss, []

    def failing(*given):
        calls.append(1)
        return loss(*given) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(recover, "next_token_loss", failing)
    torn = trained(model, read, tmp_path / "torn")
    result = recover.summary(torn)
    assert result["steps"] == 3
    assert "the loss of step 3 was nan" in result["stopped"]
    assert all(torch.isfinite(t).all() for t in torn.tensors("merged").values())


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_training_resumes_to_the_same_result(tmp_path, text, monkeypatch, after):
    model, read = compressed(tmp_path, text)
    monkeypatch.setattr(training, "SAVE_EVERY", 5)
    whole = trained(model, read, tmp_path / "whole")
    save, count = Record.save, []

    def dying(self: Record, *rest: object) -> None:
        count.append(1)
        if len(count) > after:
            raise Killed
        save(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Record, "save", dying)
        with pytest.raises(Killed):
            trained(model, read, tmp_path / "torn")
    torn = trained(model, read, tmp_path / "torn")
    assert torn.facts("merged") == whole.facts("merged")
    found, expected = torn.tensors("merged"), whole.tensors("merged")
    assert all(torch.equal(found[path], expected[path]) for path in expected)


def test_recovery_wants_a_compressed_model(tmp_path, text):
    src = tiny.checkpoint(tmp_path / "src")
    with pytest.raises(BadParameter, match="give --method basis_sharing first"):
        run(src, tmp_path / "out", text, RECOVER)


# --- killed, and refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["refit_runs", "apply"])
def test_a_killed_conversion_resumes_from_the_finished_groups(tmp_path, text, monkeypatch, where):
    src = tiny.checkpoint(tmp_path / "src")
    run(src, tmp_path / "whole", text, BASIS, RECOVER)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(basis_sharing, where, die)
        with pytest.raises(Killed):
            run(src, tmp_path / "torn", text, BASIS, RECOVER)
    assert not (tmp_path / "torn").exists()
    with monkeypatch.context() as patched:
        patched.setattr(basis_sharing, "factorize_runs", die)
        run(src, tmp_path / "torn", text, BASIS, RECOVER)
    assert (tmp_path / "torn/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"src", "whole", "torn", "text.txt"}


def test_another_recipe_does_not_take_up_the_work_of_an_earlier_one(tmp_path, text, monkeypatch):
    src = tiny.checkpoint(tmp_path / "src")

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(basis_sharing, "apply", die)
        with pytest.raises(Killed):
            run(src, tmp_path / "torn", text, BASIS)
    other = BASIS.replace("40", "20")
    run(src, tmp_path / "torn", text, other)
    run(src, tmp_path / "whole", text, other)
    assert (tmp_path / "torn/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_failed_measurement_is_not_measured_twice_for_the_original(tmp_path, text, monkeypatch):
    src = tiny.checkpoint(tmp_path / "src")
    module = sys.modules["pared.convert"]  # the package's function of that name hides it
    measure, calls = module.measure, []

    def once(path, *rest, **options):
        calls.append(Path(path).name)
        if len(calls) == 2:
            raise Killed
        return measure(path, *rest, **options)

    monkeypatch.setattr(module, "measure", once)
    with pytest.raises(Killed):
        run(src, tmp_path / "out", text)
    run(src, tmp_path / "out", text)
    assert calls == ["dense.partial", "out.partial", "out.partial"]


def test_infinite_weights_never_reach_the_algebra_unnamed(tmp_path, text):
    src = tiny.checkpoint(tmp_path / "src")
    stored = load_file(src / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(stored, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadWeights, match=r"model\.layers\.1\.mlp\.up_proj\.weight\[0, 0\] is inf"):
        run(src, tmp_path / "out", text)


def test_a_compressed_source_takes_no_method(tmp_path, text):
    src = tiny.checkpoint(tmp_path / "src")
    model = in_memory(src, text, tmp_path / "work", BASIS)
    from pared.converters.modelling import as_source

    source = as_source(model, open_source(src))
    with pytest.raises(BadParameter, match="is compressed already"):
        compress(source, recipe.parse([BASIS]), text.read_text(), "t", lambda name: tmp_path / name, progress=False)


def test_a_source_without_a_tokenizer_cannot_be_calibrated(tmp_path, text):
    src = tiny.checkpoint(tmp_path / "src")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (src / name).unlink()
    with pytest.raises(SourceError, match="no tokenizer to read the calibration text with"):
        run(src, tmp_path / "out", text)


def test_the_journal_of_provenance_is_json(tmp_path, text):
    src = tiny.checkpoint(tmp_path / "src")
    run(src, tmp_path / "out", text, BASIS, RECOVER)
    config = json.loads((tmp_path / "out/config.json").read_text())
    methods = config["quantization_config"]["provenance"]["methods"]
    assert [method["name"] for method in methods] == ["basis_sharing", "recover"]
    assert methods[1]["result"]["steps"] == 20


def test_the_command_line_takes_methods(tmp_path, text, monkeypatch, capsys):
    from pared.cli import main

    src = tiny.checkpoint(tmp_path / "src")
    asked = ["convert", str(src), str(tmp_path / "out"), "--calibration", str(text), "--text", str(text)]
    monkeypatch.setattr(sys, "argv", ["pared", *asked, "--method", BASIS, "--method", RECOVER])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[-2:]] == ["original", "out"]
