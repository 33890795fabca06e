"""Routed FFNs beyond the contract of formats: decisions, padding, counting, and whole models in every family."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest
import torch
import transformers as hf

import pared.hf  # noqa: F401
from pared import families
from pared.compact import open_folder
from pared.convert import export
from pared.errors import FolderError, WrongShape
from pared.kernels import dispatch, routed_ffn
from pared.kernels.native import library
from pared.kernels.unit import Unit
from pared.reports import folder_report
from pared.runtime.graphs import GraphedDecoder
from pared.runtime.loader import load
from pared.tests import routed, tiny
from pared.tests.test_compressed import edit
from pared.tests.test_model import Runner
from pared.tests.truth import assert_as_good, poisoned

NATIVE = library.load()
IN_FP32 = [unit for unit in routed_ffn.cases() if unit.tensors["up"].dtype == torch.float32]
FAMILIES = ("llama", "llama-tied-biased", "phi3", "opt-projected", "gpt2")
BATCHES = (1, 2, 7, 64)
SIZE = 16  # neurons of a group that reveals itself: as few as tiles take
needs_native = pytest.mark.skipif(NATIVE is None or dispatch.interpreting(), reason="no native kernels")


def revealing(inputs: int, groups: int, dtype: torch.dtype, router: torch.Tensor, tau: float = 0.5) -> Unit:
    """An FFN that says which groups are awake: output g is SIZE where group g is, else 0."""
    neurons = SIZE * groups
    down = torch.zeros(inputs, neurons)
    down[torch.arange(neurons) // SIZE, torch.arange(neurons)] = 1
    tensors = {"up": torch.zeros(neurons, inputs), "down": down, "up_bias": torch.ones(neurons)}
    params = {"group_size": SIZE, "tau": tau, "activation": "relu"}
    tensors = {role: tensor.to(dtype) for role, tensor in tensors.items()}
    return Unit({"m": (inputs, inputs)}, tensors | {"router": router}, params)


def awake(prepared, x: torch.Tensor, groups: int, rows: int) -> torch.Tensor:
    """bool [M, groups]: who was awake when x was computed so many rows at a time."""
    y = torch.cat([routed_ffn.apply(part.contiguous(), prepared, "m") for part in x.split(rows)])
    assert set(y.flatten().tolist()) <= {0.0, float(SIZE)}
    return y[:, :groups] == SIZE


def test_a_group_lies_together_neuron_by_neuron():
    """Bytes by hand: 16 neurons of two inputs in two groups, gate rows, up rows, and down's columns as rows."""
    gate, up = torch.arange(32.0).view(16, 2), torch.arange(100.0, 132).view(16, 2)
    down = torch.stack([torch.arange(200.0, 216), torch.arange(300.0, 316)])
    tensors = {"gate": gate, "up": up, "down": down, "router": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    params = {"group_size": 8, "tau": 0.25, "activation": "silu"}
    packed = routed_ffn.encode(Unit({"m": (2, 2)}, tensors, params))
    pairs = [value for n in range(8) for value in (200.0 + n, 300.0 + n)]
    assert packed.tensors["groups"][0].flatten().tolist() == [*range(16), *range(100, 116), *pairs]
    pairs = [value for n in range(8, 16) for value in (200.0 + n, 300.0 + n)]
    assert packed.tensors["groups"][1].flatten().tolist() == [*range(16, 32), *range(116, 132), *pairs]
    assert packed.tensors["router"].flatten().tolist() == [1, 2, 3, 4]
    assert (packed.version, packed.params) == (1, params)


@pytest.mark.parametrize("level", NATIVE.levels() if NATIVE else [None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore::pared.kernels.dispatch.SlowerPath")
def test_a_row_decides_the_same_in_any_company(dtype, level, monkeypatch):
    """Logits that are zero but for rounding: any other order of sums would decide otherwise for half of them."""
    if level and not dispatch.interpreting():
        monkeypatch.setattr(library, "load", lambda: NATIVE.at(level))
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(64, 333, generator=generator).to(dtype)
    weights = torch.randn(40, 333, generator=generator)
    x, router = torch.cat([half, half], 1), torch.cat([weights, -weights.roll(1, 1).roll(-1, 1)], 1)
    router[:, :20] *= 1 + 1e-7
    prepared = routed_ffn.prepare(routed_ffn.encode(revealing(666, 40, dtype, router)), "cpu")
    first, *others = (awake(prepared, x, 40, rows) for rows in BATCHES)
    assert 0.1 < first.float().mean() < 0.9
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(awake(prepared, x.flip(0), 40, 64).flip(0), first)


@needs_native
@pytest.mark.parametrize("inputs", [48, 1000, 4096])
def test_tiles_decide_as_fp32_sums_do_at_the_very_threshold(inputs):
    """A threshold that is some row's logit, or the number below it: what is nearest to it must not move."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, inputs, generator=generator).bfloat16()
    router = torch.randn(40, inputs, generator=generator) * inputs**-0.5
    prepared = routed_ffn.prepare(routed_ffn.encode(revealing(inputs, 40, torch.bfloat16, router)), "cpu")
    logits = torch.empty(70, 40)
    NATIVE.route(x, router, logits)
    for at in logits.flatten()[::28]:
        for least in (at, at.nextafter(torch.tensor(-torch.inf))):
            held = dataclasses.replace(prepared, floats=(least.item(),))
            assert all(torch.equal(awake(held, x, 40, rows), logits > least) for rows in (17, 70))


@needs_native
@pytest.mark.parametrize("router_scale", [0.0, 1e-38, 1e-30, 1e-20, 1.0, 1e18, 1e30])
def test_tiles_decide_as_fp32_sums_do_at_the_ends_of_fp32(router_scale):
    """Where tiles flush, overflow or give NaN: logits of each row alone are those that decide."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.0, 1e-39, 1e-30, 1e-20, 1.0, 1e20, 1e38])
    x = (torch.randn(10, 7, 200, generator=generator) * scales[:, None]).flatten(0, 1).bfloat16()
    router = torch.randn(40, 200, generator=generator) * router_scale
    prepared = routed_ffn.prepare(routed_ffn.encode(revealing(200, 40, torch.bfloat16, router)), "cpu")
    assert x.isfinite().all() and router.isfinite().all()
    decided = routed_ffn.decisions(x, prepared)
    assert torch.equal(awake(prepared, x, 40, 1), decided) and torch.equal(awake(prepared, x, 40, 70), decided)


@needs_native
@pytest.mark.parametrize("level", NATIVE.levels() if NATIVE else [])
@pytest.mark.parametrize("unit", routed_ffn.cases()[3:], ids=lambda unit: str(unit.tensors["up"].dtype))
def test_every_level_is_as_good_as_torch(unit, level, monkeypatch):
    monkeypatch.setattr(library, "load", lambda: NATIVE.at(level))
    packed = routed_ffn.encode(unit)
    prepared = routed_ffn.prepare(packed, "cpu")
    inputs, dtype = unit.modules["m"][1], unit.tensors["up"].dtype
    for rows in (1, 4, 20):
        found = []
        for seed in range(4):  # one row alone may be lucky
            x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
            with poisoned():
                y = routed_ffn.apply(x, prepared, "m")
            found.append((y, routed_ffn.reference(x, packed, "m"), routed_ffn.reference(x.float(), packed, "m")))
        assert_as_good(*(torch.cat(tensors) for tensors in zip(*found, strict=True)), rounds_inside=True)


@pytest.mark.parametrize("tau", [0.2, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore::pared.kernels.dispatch.SlowerPath")
def test_a_group_is_awake_where_the_sigmoid_passes_tau(tau):
    generator = torch.Generator().manual_seed(1)
    x, router = (torch.randn(shape, generator=generator) * 0.3 for shape in ((64, 48), (40, 48)))
    prepared = routed_ffn.prepare(routed_ffn.encode(revealing(48, 40, torch.float32, router, tau)), "cpu")
    scores = (x.double() @ router.double().t()).sigmoid()
    assert (scores - tau).abs().min() > 1e-6
    assert torch.equal(awake(prepared, x, 40, 64), scores > tau)


@pytest.mark.parametrize("rows", [1, 5, 64, 130, 700])
@pytest.mark.filterwarnings("ignore::pared.kernels.dispatch.SlowerPath")
def test_padding_wakes_nothing_and_use_is_counted(rows):
    unit = next(unit for unit in IN_FP32 if unit.params == {"group_size": 32, "tau": 0.5, "activation": "silu"})
    prepared = routed_ffn.prepare(routed_ffn.encode(unit), "cpu")
    inputs, groups = unit.modules["m"][1], routed_ffn.groups_of(prepared)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(2))
    live = torch.arange(rows) % 3
    with poisoned():
        y = routed_ffn.apply(x, prepared, "m", awake=live)
    assert not y[live == 0].any()
    alone = routed_ffn.prepare(routed_ffn.encode(unit), "cpu")
    torch.testing.assert_close(y[live > 0], routed_ffn.apply(x, alone, "m")[live > 0])
    chosen = routed_ffn.decide(x, unit.tensors["router"], routed_ffn.threshold(0.5), live)
    seen, woken, read = prepared.tensors[-1].tolist()
    assert (seen, woken) == (int((live > 0).sum()), int(chosen.sum()))
    assert read == int(chosen.any(0).sum()) <= groups


@pytest.mark.filterwarnings("ignore::pared.kernels.dispatch.SlowerPath")
def test_shards_of_groups_add_up():
    packed = routed_ffn.encode(unit := next(unit for unit in IN_FP32 if unit.params["group_size"] == 16))
    x = torch.randn(4, unit.modules["m"][1], generator=torch.Generator().manual_seed(0))
    shards = [routed_ffn.slice(packed, "m", 2, *cut) for cut in ((0, 1), (1, 3))]
    total = sum(routed_ffn.reference(x, shard, "m") for shard in shards)
    torch.testing.assert_close(total, routed_ffn.reference(x, packed, "m"), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="dim 2 of 3"):
        routed_ffn.slice(packed, "m", 0, 0, 1)


@needs_native
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_threads_do_not_change_a_bit(rows):
    generator = torch.Generator().manual_seed(0)
    sizes = {"gate": (2048, 512), "up": (2048, 512), "down": (512, 2048), "router": (64, 512)}
    tensors = {role: torch.randn(shape, generator=generator) * 0.05 for role, shape in sizes.items()}
    tensors = {role: t if role == "router" else t.bfloat16() for role, t in tensors.items()}
    params = {"group_size": 32, "tau": 0.5, "activation": "silu"}
    prepared = routed_ffn.prepare(routed_ffn.encode(Unit({"m": (512, 512)}, tensors, params)), "cpu")
    x, found = torch.randn(rows, 512, generator=generator).bfloat16(), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(routed_ffn.apply(x, prepared, "m"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"params": {"group_size": 32}}, "48 neurons are no groups of 32"),
        ({"params": {"group_size": 7}}, "group_size is 7"),
        ({"params": {"tau": 1.0}}, "tau is 1.0, it must lie between 0 and 1"),
        ({"params": {"tau": 0.0}}, "tau is 0.0"),
        ({"params": {"activation": "swish"}}, "activation is 'swish'"),
        ({"router": torch.zeros(2, 33)}, r"router is \[2, 33\].*\[3, 33\]"),
        ({"router": torch.zeros(3, 33, dtype=torch.bfloat16)}, "router must be float32"),
        ({"down": torch.zeros(48, 33)}, r"down is \[48, 33\]"),
        ({"up": torch.zeros(48, 33, dtype=torch.float16)}, "one dtype"),
        ({"other": torch.zeros(1)}, "other"),
    ],
)
def test_what_does_not_fit_is_named(change, what):
    unit = next(unit for unit in IN_FP32 if unit.params["group_size"] == 16)
    params = unit.params | change.pop("params", {})
    with pytest.raises(ValueError, match=what):
        routed_ffn.encode(Unit(unit.modules, unit.tensors | change, params))


def test_the_launcher_names_what_it_is_given():
    prepared = routed_ffn.prepare(routed_ffn.encode(routed_ffn.cases()[2]), "cpu")
    with pytest.raises(ValueError, match=r"x \[M, 41\].*\(2, 40\)"):
        routed_ffn.apply(torch.zeros(2, 40), prepared, "m")
    with pytest.raises(ValueError, match=r"awake \[2\] of int64"):
        routed_ffn.apply(torch.zeros(2, 41), prepared, "m", awake=torch.ones(2, dtype=torch.int32))


# --- whole models ------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request, tmp_path_factory):
    """(folder of the routed model, the transformers model that masks)"""
    model = tiny.model(request.param)
    folder = routed.write(model, tmp_path_factory.mktemp("routed"))
    return folder, routed.masked(model, folder)


TOKENS = [1, 7, 3, 30, 39, 0, 12]


def test_a_model_of_every_family_says_what_masking_says(pair):
    folder, model = pair
    with torch.inference_mode():
        truth = model(torch.tensor([TOKENS])).logits[0]
    decoder = load(folder, device="cpu")
    runner = Runner(decoder)
    sequence = runner.sequence(TOKENS, floor=len(TOKENS))
    runner.run([(sequence, 4)])
    for _ in range(3):
        runner.run([(sequence, 1)])
    assert (torch.stack(sequence.logits) - truth).abs().max() <= 1e-4
    assert truth.std() > 0.05
    for use, layer in zip(decoder.ffn_use(), decoder.spec.layers, strict=True):
        assert (use.groups, use.rows) == (layer.ffn // routed.SIZE, len(TOKENS))
        assert 0 < use.sparsity < 1 and use.read <= 4 * use.groups


def test_transformers_loads_it_through_our_door(pair):
    folder, model = pair
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.tensor([TOKENS, TOKENS[::-1]])
    with torch.inference_mode():
        for found, truth in zip(loaded(tokens).logits, model(tokens).logits, strict=True):
            assert (found - truth).abs().max() <= 1e-4
    half = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    routers = [p for name, p in half.named_parameters() if name.endswith(".router")]
    assert len(routers) == 2 and all(router.dtype == torch.float32 for router in routers)
    assert half(tokens).logits.dtype == torch.bfloat16


def test_a_stock_loader_stops(pair):
    """Beside every linear that a routed FFN stands for lies the [0]-shaped weight."""
    with open_folder(pair[0]) as folder:
        spec = families.read(folder.config)
        for linears in spec.ffns().values():
            assert all(folder.tensor(f"{path}.weight").shape == (0,) for path in linears)
        assert not folder.stock


def test_inspect_tells_groups_and_what_the_router_costs(pair):
    with open_folder(pair[0]) as folder:
        report = folder_report(folder)
    (row,) = (kind for kind in report.kinds if kind.format == "routed_ffn")
    assert (row.count, row.shapes) == (2, {"16x16": 2})
    groups, share = re.fullmatch(r"(\d+) groups of 8, router (\S+) % of bytes", row.form).groups()
    added = row.compact_bytes - row.dense_bytes
    assert added == 2 * int(groups) * 16 * 4
    assert float(share) == pytest.approx(100 * added / row.compact_bytes, abs=0.06)


def test_half_a_model_keeps_fp32_routers(tmp_path):
    folder = routed.write(tiny.model(), tmp_path)
    decoder = load(folder, device="cpu", dtype=torch.bfloat16)
    *_, router, _ = decoder.weights.blocks[0].ffn.prepared.tensors
    with open_folder(folder) as opened:
        assert torch.equal(router, opened.tensor("model.layers.0.mlp.router"))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_steps_are_recorded_whole(tmp_path, dtype):
    """A step is one native call, however many groups its rows wake: tape and decoder agree bit for bit."""
    folder = routed.write(tiny.model(), tmp_path)
    decoder, graphed = load(folder, device="cpu", dtype=dtype), None
    logits = []
    with dispatch.strict():
        for model in (decoder, graphed := GraphedDecoder(load(folder, device="cpu", dtype=dtype))):
            runner = Runner(decoder)
            runner.decoder = model
            sequences = [runner.sequence([(5 * s + i) % 40 for i in range(12)], floor=12) for s in range(3)]
            runner.run([(s, 4) for s in sequences])
            for _ in range(6):
                runner.run([(s, 1) for s in sequences])
                for s in sequences:
                    s.logits[-1] = s.logits[-1].clone()
            logits.append(torch.stack([row for s in sequences for row in s.logits]))
    assert all(step.replays for step in graphed._steps.values())
    assert torch.equal(*logits)
    assert graphed.ffn_use()[0].rows >= decoder.ffn_use()[0].rows == 3 * 10


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda unit: unit["params"].update(tau=1.5), "tau is 1.5"),
        (lambda unit: unit["params"].update(group_size=16), "24 neurons are no groups of 16"),
        (lambda unit: unit["params"].update(activation="relu"), "activation 'relu'"),
        (lambda unit: unit["covers"].update({next(iter(unit["covers"])): [32, 16]}), "no FFN of this model"),
        (lambda unit: unit["covers"].clear(), "mlp"),
    ],
)
def test_a_folder_that_was_changed_is_refused(tmp_path, change, what):
    folder = routed.write(tiny.model(), tmp_path)

    def edited(config: dict) -> None:
        change(next(u for u in config["units"] if u["format"] == "routed_ffn"))

    edit(folder, edited)
    with pytest.raises((WrongShape, FolderError), match=what):
        load(folder, device="cpu")


GOLDEN = Path(__file__).parent / "golden" / "routed_ffn_v1"
GOLDEN_TOKENS = [1, 5, 9, 14]
DIGEST = "b2afd782d171591fd44b157f37e1ac81a3bc9cd7eb2bc926ecafc42ccd46fed8"


def test_the_golden_folder_loads_for_ever():
    """Written once, by format version 1 in bf16; never write it again."""
    digest = hashlib.sha256()
    with open_folder(GOLDEN) as folder:
        folder.verify()
        assert {unit.format: unit.version for unit in folder.manifest.units} == {"dense": 1, "routed_ffn": 1}
        for name in sorted(folder.manifest.tensors):
            digest.update(name.encode())
            digest.update(folder.tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == DIGEST
    decoder = load(GOLDEN, device="cpu", dtype=torch.float32)
    runner = Runner(decoder)
    sequence = runner.sequence(GOLDEN_TOKENS, floor=len(GOLDEN_TOKENS))
    runner.run([(sequence, len(GOLDEN_TOKENS))])
    door = hf.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)
    for logits in (sequence.logits[-1], door(torch.tensor([GOLDEN_TOKENS])).logits[0, -1]):
        top = logits.topk(3)
        assert top.indices.tolist() == [13, 2, 12]
        assert top.values.tolist() == pytest.approx([0.71534, 0.63385, 0.45257], abs=1e-3)
    assert [use.sparsity for use in decoder.ffn_use()] == [0.25, 0.5]


def test_no_dense_checkpoint_says_what_a_router_says(tmp_path):
    folder = routed.write(tiny.model(), tmp_path)
    with pytest.raises(FolderError, match="routes its FFNs"):
        export(folder, tmp_path / "out", progress=False)
