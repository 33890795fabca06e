"""SLEB: the order and losses of brute force, in half its work; killed searches; removal lists; short models."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pared import families
from pared.compact import open_folder
from pared.convert import convert
from pared.converters import recipe
from pared.converters.calibration import Calibration, LayerWalk, finish, row_windows
from pared.converters.depth import shorten_config
from pared.converters.methods import sleb
from pared.converters.record import Record
from pared.errors import BadParameter, SourceError, UnsupportedModel
from pared.evaluate import decoder_logits
from pared.runtime.loader import load
from pared.tests import tiny, trained

LAYERS = {"llama": "model.layers", "qwen2": "model.layers", "opt": "model.decoder.layers", "gpt2": "transformer.h"}
TOKENS = torch.tensor([1, 7, 3, 30, 39, 0, 12])


def params(text: str) -> sleb.Params:
    return recipe.parse([f"sleb:{text}"])[0].params


def searched(model, folder, text: str, calibration=trained.CALIBRATION) -> Record:
    record = Record(folder)
    sleb.search(model, calibration, record, params(text), progress=False)
    return record


@contextlib.contextmanager
def with_layers(model, family: str, kept: list[int]):
    """While open, the model runs these blocks alone."""
    parent, _, name = LAYERS[family].rpartition(".")
    whole = getattr(model.get_submodule(parent), name)
    setattr(model.get_submodule(parent), name, nn.ModuleList(whole[i] for i in kept))
    model.config.num_hidden_layers = len(kept)
    yield
    setattr(model.get_submodule(parent), name, whole)
    model.config.num_hidden_layers = len(whole)


def loss_of(model, family: str, kept: list[int], windows: torch.Tensor) -> float:
    """Mean over windows of the mean next-token cross-entropy of the whole model, with only these blocks."""
    with torch.no_grad(), with_layers(model, family, kept):
        losses = [F.cross_entropy(model(w[None], use_cache=False).logits[0, :-1], w[1:]).item() for w in windows]
    return sum(losses) / len(losses)


def brute_force(model, family: str, windows: torch.Tensor, count: int, early: int = 1, latter: int = 1):
    """The paper's loop, written plainly: (order, losses of the candidates of each round)."""
    alive, order, rounds = list(range(model.config.num_hidden_layers)), [], []
    for _ in range(count):
        tried = alive[early : len(alive) - latter]
        losses = {i: loss_of(model, family, [j for j in alive if j != i], windows) for i in tried}
        best = tried[0]
        for i in tried:
            if losses[i] < losses[best]:
                best = i
        alive.remove(best)
        order.append(best)
        rounds.append(losses)
    return order, rounds


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
@pytest.mark.parametrize("barriers", [(1, 1), (0, 2)])
def test_order_and_losses_are_those_of_brute_force(tmp_path, family, barriers):
    model = trained.model(family)
    early, latter = barriers
    record = searched(model, tmp_path, f"blocks=3,samples=5,length=24,early={early},latter={latter}")
    windows = trained.CALIBRATION.windows(5, 24, 0)
    if family == "qwen2":  # a shortened stock Qwen2 needs its own config; bypassing by identity needs none
        order, rounds = brute_force_by_identity(model, windows, 3, early, latter)
    else:
        order, rounds = brute_force(model, family, windows, 3, early, latter)
    assert sleb.summary(record)["order"] == order
    for i, losses in enumerate(rounds):
        found = record.facts(f"removal-{i:03d}")["losses"]
        assert [int(key) for key in found] == list(losses)
        assert list(found.values()) == pytest.approx(list(losses.values()), rel=1e-5)
    assert sleb.summary(record)["loss"] == pytest.approx([min(losses.values()) for losses in rounds], rel=1e-5)
    assert len({round(loss, 6) for loss in rounds[0].values()}) == len(rounds[0])  # the blocks do differ


class Bypassed(nn.Module):
    """A block that gives back what it gets."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def brute_force_by_identity(model, windows, count, early, latter):
    layers, alive, order, rounds = model.model.layers, list(range(len(model.model.layers))), [], []

    def loss(without: int) -> float:
        kept, layers[without] = layers[without], Bypassed()
        with torch.no_grad():
            losses = [F.cross_entropy(model(w[None], use_cache=False).logits[0, :-1], w[1:]).item() for w in windows]
        layers[without] = kept
        return sum(losses) / len(losses)

    for _ in range(count):
        losses = {i: loss(i) for i in alive[early : len(alive) - latter]}
        best = min(losses, key=losses.__getitem__)
        order.append(best)
        rounds.append(losses)
        alive.remove(best)
        layers[best] = Bypassed()
    return order, rounds


def test_the_real_model(tmp_path, smollm2_hf, smollm2_tokenizer, real_prompts):
    calibration = Calibration(smollm2_tokenizer, "\n".join(real_prompts), "prompts")
    model = smollm2_hf.requires_grad_(False)
    record = searched(model, tmp_path, "blocks=2,samples=1,length=16", calibration)
    order, rounds = brute_force(model, "llama", calibration.windows(1, 16, 0), 2)
    assert record.facts("plan")["order"] == order
    assert list(record.facts("removal-001")["losses"].values()) == pytest.approx(list(rounds[1].values()), rel=1e-4)


def test_the_list_for_fewer_blocks_is_the_beginning_of_a_longer_one(tmp_path):
    model = trained.model()
    long = searched(model, tmp_path / "long", "blocks=4,samples=2,length=16").facts("plan")
    short = searched(model, tmp_path / "short", "blocks=2,samples=2,length=16").facts("plan")
    assert (short["order"], short["loss"]) == (long["order"][:2], long["loss"][:2])
    again = searched(model, tmp_path / "long", "percent=30,samples=2,length=16").facts("plan")  # 1.8 blocks
    assert again == short


@pytest.fixture(scope="module")
def deep():
    return trained.model("llama", 30, steps=0)


def test_block_evaluations_on_thirty_blocks(tmp_path, deep):
    calls: list[None] = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(None)) for layer in deep.model.layers]
    searched(deep, tmp_path, "blocks=6,samples=2,length=8")
    for handle in handles:
        handle.remove()
    brute_force_calls = 2 * sum((n - 2) * (n - 1) for n in range(30, 24, -1))
    assert len(calls) <= 0.55 * brute_force_calls
    assert len(calls) >= 0.5 * brute_force_calls  # every candidate was tried


def test_a_killed_search_goes_on(tmp_path, monkeypatch):
    whole = searched(trained.model(), tmp_path / "whole", "blocks=3,samples=3,length=16")
    save = Record.save

    def killed(self, part, *rest):
        if part == "removal-002":
            raise KeyboardInterrupt
        save(self, part, *rest)

    monkeypatch.setattr(Record, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        searched(trained.model(), tmp_path / "killed", "blocks=3,samples=3,length=16")
    monkeypatch.undo()
    tried: list[list[int]] = []
    losses = sleb._losses

    def noted(walk, alive, *rest):
        tried.append(list(alive))
        return losses(walk, alive, *rest)

    monkeypatch.setattr(sleb, "_losses", noted)
    resumed = searched(trained.model(), tmp_path / "killed", "blocks=3,samples=3,length=16")
    assert resumed.facts("plan") == whole.facts("plan")
    assert len(tried) == 1 and len(tried[0]) == 4
    searched(trained.model(), tmp_path / "killed", "blocks=3,samples=3,length=16")
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocks=0", "blocks=0 is outside 1"),
        ("blocks=5", "cannot remove 5 of 6 blocks while it keeps the first 1 and the last 1"),
        ("blocks=6,early=0,latter=0", "cannot remove 6 of 6"),
        ("percent=99", "cannot remove 6 of 6"),
        ("percent=0", "percent=0 is outside"),
        ("samples=8", "one of blocks=6, percent=20 and remove"),
        ("blocks=1,remove=1", "one of blocks=6, percent=20 and remove"),
        ("remove=1,2,1", "names block 1 more than once"),
        ("remove=6", "names block 6, the model has blocks 0 to 5"),
        ("remove=0,1,2,3,4,5", "names all 6 blocks"),
        ("remove=[]", "holds no list of block numbers"),
        ("remove=1,,2", "holds no list of block numbers"),
        ("remove=no-such-file.txt", "neither a list such as 5,4,9 nor a file"),
    ],
)
def test_bad_input(tmp_path, text, message):
    with pytest.raises(BadParameter, match=message.replace("[", r"\[")):
        searched(trained.model(steps=0), tmp_path, text)


def test_removal_lists(tmp_path):
    (tmp_path / "list.json").write_text("[5, 4, 9]\n")
    (tmp_path / "log.txt").write_text(
        "Model: facebook/opt-13b\n# Total Blocks: 40\nBlock Removal Order: [5, 4, 9, 2, 14, 25, 34, 10]\n"
    )
    (tmp_path / "plain.txt").write_text("5, 4, 9")
    (tmp_path / "junk.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "words.json").write_text('["5", 4]')
    assert sleb.removal_list(str(tmp_path / "list.json"), 40) == [5, 4, 9]
    assert sleb.removal_list(str(tmp_path / "log.txt"), 40) == [5, 4, 9, 2, 14, 25, 34, 10]
    assert sleb.removal_list(str(tmp_path / "plain.txt"), 40) == [5, 4, 9]
    assert sleb.removal_list("[5,4, 9]", 40) == sleb.removal_list("5,4,9", 40) == [5, 4, 9]
    for name in ("junk.txt", "words.json"):
        with pytest.raises(BadParameter, match=name):
            sleb.removal_list(str(tmp_path / name), 40)


def test_rows_are_drawn_as_the_papers_code_does():
    text = "w1 w2\n\n w3 w4 w5 \n   \nw6\nw7 w8 w9 w10\n"
    rows = ["w1 w2\n", "", " w3 w4 w5 \n", "", "w6\n", "w7 w8 w9 w10\n"]
    drawn = [rows[i] for i in np.random.default_rng(3).permutation(6)[:4]]
    ids = trained.tokenizer()("\n\n".join(drawn)).input_ids
    found = row_windows(trained.tokenizer(), text, 4, 3, seed=3)
    assert found.flatten().tolist() == ids[: len(ids) // 3 * 3]
    with pytest.raises(SourceError, match="has 6 rows, 7 were asked for"):
        row_windows(trained.tokenizer(), text, 7, 3, seed=3)
    with pytest.raises(SourceError, match="fill no window of 100 tokens"):
        row_windows(trained.tokenizer(), text, 6, 100, seed=3)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_walk_ends_in_the_models_own_logits(name):
    model = tiny.model(name).requires_grad_(False)
    spec = families.read(tiny.CONFIGS[name].to_dict())
    walk = LayerWalk(model, spec, TOKENS[None])
    walk.run_all(range(2))
    logits = model.get_submodule(spec.names.head)(finish(model, spec, walk.hidden[0]))
    assert torch.allclose(logits, model(TOKENS[None]).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_a_short_folder_is_a_stock_one(tmp_path, family):
    """The logits of the dense model without those blocks: in pared, and in the transformers that loads the folder."""
    import transformers

    src = trained.checkpoint(tmp_path / "src", family)
    convert(src, tmp_path / "out", methods=["sleb:remove=3,1"], progress=False)
    model = trained.model(family)
    if family == "qwen2":
        model.model.layers[1] = model.model.layers[3] = Bypassed()
        expected = model(TOKENS[None], use_cache=False).logits[0]
    else:
        with with_layers(model, family, [0, 2, 4, 5]):
            expected = model(TOKENS[None], use_cache=False).logits[0]
    stock, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(stock(TOKENS[None]).logits[0], expected, atol=1e-5)
    assert torch.equal(
        stock.generate(TOKENS[None], max_new_tokens=4, do_sample=False)[0, :7], TOKENS
    )  # decoding with a cache knows the new layer numbers
    assert torch.allclose(decoder_logits(load(tmp_path / "out"))(TOKENS), expected, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert families.read(config).layers == tuple(families.read(model_config(src)).layers[i] for i in (0, 2, 4, 5))
    with open_folder(tmp_path / "out") as folder:
        (method,) = folder.manifest.provenance["methods"]
    assert method["result"] == {"order": [3, 1], "loss": []}
    assert method["calibration"] is None


def model_config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_per_layer_rules_are_cut_with_the_blocks():
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = {"num_hidden_layers": 4, "layer_types": kinds, "hidden_size": 8}
    assert shorten_config(config, [0, 3]) == {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "hidden_size": 8,
    }
    rule = {"num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2}
    assert shorten_config(rule, [1, 2])["layer_types"] == ["full_attention", "sliding_attention"]
    assert shorten_config({"n_layer": 4}, [1, 2]) == {"n_layer": 2}
    with pytest.raises(UnsupportedModel, match="scale_attn_by_inverse_layer_idx"):
        shorten_config({"n_layer": 4, "scale_attn_by_inverse_layer_idx": True}, [0])


def test_through_convert_with_a_search(tmp_path):
    src = trained.checkpoint(tmp_path / "src")
    (tmp_path / "text.txt").write_text(trained.TEXT)
    report = convert(
        src,
        tmp_path / "out",
        methods=["sleb:blocks=2,samples=3,length=24"],
        calibration=tmp_path / "text.txt",
        text=tmp_path / "text.txt",
        progress=False,
    )
    original, row = report.rows
    assert row.bytes_per_token < original.bytes_per_token
    assert row.perplexity != original.perplexity and math.isfinite(row.perplexity)
    with open_folder(tmp_path / "out") as folder:
        found = folder.manifest.provenance["methods"][0]["result"]
        assert "quantization_config" not in folder.config
    record = searched(trained.model(), tmp_path / "record", "blocks=2,samples=3,length=24")
    assert found["order"] == record.facts("plan")["order"]


def test_what_reads_a_text_and_what_does_not(tmp_path):
    src = trained.checkpoint(tmp_path / "src")
    (tmp_path / "text.txt").write_text(trained.TEXT)
    with pytest.raises(BadParameter, match="sleb reads a text; give --calibration"):
        convert(src, tmp_path / "out", methods=["sleb:blocks=1"], progress=False)
    with pytest.raises(BadParameter, match="no method of this recipe reads a calibration text"):
        convert(src, tmp_path / "out", methods=["sleb:remove=1"], calibration=tmp_path / "text.txt", progress=False)


def test_basis_sharing_on_what_is_left(tmp_path):
    """Groups are cut from the layers that are left, and one that would reach across a gap is refused."""
    src = trained.checkpoint(tmp_path / "src")
    (tmp_path / "text.txt").write_text(trained.TEXT)
    basis = "basis_sharing:ratio=30,samples=16,length=16,group="

    def run(out: str, remove: str, group: int):
        methods = [f"sleb:remove={remove}", f"{basis}{group}"]
        convert(src, tmp_path / out, methods=methods, calibration=tmp_path / "text.txt", progress=False)
        return open_folder(tmp_path / out)

    with run("pairs", "2,3", 2) as folder:
        groups = [entry.modules for entry in folder.manifest.units if len(entry.modules) > 1]
        assert groups
        assert {tuple(int(path.split(".")[2]) for path in modules) for modules in groups} == {(0, 1), (2, 3)}
        assert families.read(folder.config).layers[3:] and len(families.read(folder.config).layers) == 4
    with run("single", "2", 1) as folder:
        assert all(len(entry.modules) == 1 for entry in folder.manifest.units)
    assert torch.isfinite(decoder_logits(load(tmp_path / "pairs"))(TOKENS)).all()
    with pytest.raises(BadParameter, match=r"layers 0 to 1 reaches across a removed block \(they were \[0, 2\]\)"):
        run("across", "1", 2)


def test_a_short_folder_needs_no_pared(tmp_path):
    convert(trained.checkpoint(tmp_path / "src"), tmp_path / "out", methods=["sleb:remove=2"], progress=False)
    code = (
        "import sys, transformers\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "assert len(m.model.layers) == 5 and 'pared' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
