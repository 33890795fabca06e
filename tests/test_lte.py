"""LTE on tiny models: groups of neurons, routing that changes nothing by itself, and both stages of training."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from pared import families
from pared.converters import recipe, training
from pared.converters.calibration import Calibration
from pared.converters.clustering import balanced_order, likeness
from pared.converters.methods import lte
from pared.converters.record import Record
from pared.converters.routed import Groups, awake, hard, routed, routed_units
from pared.converters.routed_training import EDGE, efficiency, separability, under
from pared.converters.router_start import start_routers
from pared.converters.routing import first_weight, route
from pared.errors import BadParameter, SourceError
from pared.kernels import routed_ffn
from pared.kernels.native import library
from pared.tests import tiny
from pared.tests.test_pruning import Words

FAMILIES = ("llama-tied-biased", "qwen3", "phi3", "opt-projected", "gpt2")
SIZE = 8
TOKENS = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(5))
CALIBRATION = Calibration(Words(), "text", "text.txt")
SMALL = {"size": SIZE, "tokens": 640, "length": 16, "batch": 2, "accumulate": 2, "lr": 1e-3}


def frozen(name: str = "llama") -> hf.PreTrainedModel:
    return tiny.model(name).requires_grad_(False)


def spec_of(model: hf.PreTrainedModel) -> families.Spec:
    return families.read(model.config.to_dict())


def logits(model: hf.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def search(model: hf.PreTrainedModel, record: Record, **given: object) -> Record:
    lte.search(model, CALIBRATION, record, lte.Params(**{**SMALL, **given}), progress=False)
    return record


def all_routed(name: str) -> hf.PreTrainedModel:
    """The model with every FFN routed, its neurons shuffled into groups."""
    model = frozen(name)
    spec = spec_of(model)
    for i in range(len(spec.layers)):
        route(model, spec, i, balanced_order(first_weight(model, spec, i), SIZE, seed=1), Groups(SIZE, 0.5))
    return model


def everyone(mlp, x, neurons):
    return torch.ones(*neurons.shape[:-1], neurons.shape[-1] // mlp.groups.size)


# --- groups ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_groups_are_a_permutation_of_the_neurons(groups, size, inputs, seed):
    weight = torch.randn(groups * size, inputs, generator=torch.Generator().manual_seed(seed))
    order = balanced_order(weight, size, seed)
    assert sorted(order.tolist()) == list(range(groups * size))
    assert torch.equal(order, balanced_order(weight, size, seed))
    inside = order.view(groups, size)
    assert torch.equal(inside, inside.sort(dim=1).values)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_neurons_that_are_alike_share_a_group(size):
    """Hidden clusters are found again, and noise is grouped better than by chance."""
    generator = torch.Generator().manual_seed(size)
    centers = torch.randn(12, 48, generator=generator).repeat_interleave(size, 0)
    shuffled = torch.randperm(len(centers), generator=generator)
    near = (centers + 0.3 * torch.randn(centers.shape, generator=generator))[shuffled]
    noise = torch.randn(12 * size, 48, generator=generator)
    order = balanced_order(near * torch.rand(len(near), 1, generator=generator), size, seed=0)
    labels = (shuffled // size)[order].view(-1, size)
    assert (labels == labels.mode(dim=1).values[:, None]).float().mean() > 0.9
    chance = [likeness(noise, torch.randperm(len(noise), generator=generator), size) for _ in range(20)]
    assert likeness(noise, balanced_order(noise, size, seed=0), size) > max(chance)


def test_neurons_without_weights_are_grouped_too():
    order = balanced_order(torch.zeros(16, 4), 8, seed=0)
    assert sorted(order.tolist()) == list(range(16))


def test_groups_that_do_not_divide_the_neurons_are_refused():
    with pytest.raises(BadParameter, match="groups of 8 do not divide 20 neurons"):
        balanced_order(torch.randn(20, 4), 8, seed=0)


# --- routing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_routed_model_with_all_groups_in_is_the_model(name):
    model = under(all_routed(name), everyone)
    assert len(routed(model)) == 2
    expected = logits(frozen(name))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_units_of_a_routed_model_compute_what_its_modules_do(name):
    """The hard rule against the format's own reference, which is written from the definition."""
    model = under(all_routed(name), hard)
    for module in routed(model).values():
        module.router.weight.data = torch.randn_like(module.router.weight)
    x = torch.randn(33, spec_of(model).hidden)
    for place, unit in routed_units(model, spec_of(model)).items():
        assert routed_ffn.fits(unit) is None
        (path,) = unit.modules
        assert path in spec_of(model).ffns()
        module = model.get_submodule(place)
        expected = routed_ffn.reference(x, routed_ffn.encode(unit), path)
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
        assert 0 < module.shares.mean() < 1


def test_a_soft_group_counts_by_its_score_and_a_hard_one_whole():
    model = all_routed("llama")
    module = next(iter(routed(model).values()))
    module.router.weight.data = torch.randn_like(module.router.weight)
    x = torch.randn(5, 16)
    scores = torch.sigmoid(x @ module.router.weight.t())
    parts = torch.stack([_alone(module, x, g) for g in range(scores.shape[1])], dim=1)
    torch.testing.assert_close(module(x), (parts * scores[..., None]).sum(1), rtol=1e-4, atol=1e-5)
    under(model, hard)
    torch.testing.assert_close(module(x), (parts * (scores > 0.5)[..., None]).sum(1), rtol=1e-4, atol=1e-5)


def _alone(module, x: torch.Tensor, group: int) -> torch.Tensor:
    rows = slice(group * SIZE, (group + 1) * SIZE)
    neurons = torch.nn.functional.silu(x @ module.gate.weight[rows].t()) * (x @ module.up.weight[rows].t())
    return neurons @ module.down.weight[:, rows].t()


def test_tau_is_where_a_score_lets_its_group_in():
    model = frozen()
    module = route(model, spec_of(model), 0, torch.arange(24), Groups(SIZE, 0.8))
    module.rule, x = hard, torch.randn(400, 16)
    module(x)
    assert torch.equal(module.shares > 0, module.logits(x).double().sigmoid() > 0.8)


@pytest.mark.parametrize("tau", [0.5, 0.7])
def test_routers_begin_with_the_groups_that_give_most(tau):
    """More are in when more are asked for; what is out matters less than the same decisions for other groups."""
    windows = torch.randint(0, 40, (64, 16), generator=torch.Generator().manual_seed(1))
    shares = []
    for share in (0.2, 0.5, 0.8):
        model = frozen()
        for i in range(2):
            route(model, spec_of(model), i, torch.arange(24), Groups(SIZE, tau))
        start_routers(model, windows.split(16), share, progress=False)
        found = awake(under(model, hard), windows.split(16))
        assert {tuple(bits.shape) for bits in found.values()} == {(windows.numel(), 3)}
        shares.append(sum(bits.float().mean().item() for bits in found.values()) / 2)
        expected, chosen = logits(under(model, everyone)), logits(under(model, hard))
        others = logits(under(model, lambda mlp, x, n: hard(mlp, x, n).roll(1, dims=-1)))
        assert (chosen - expected).square().mean() < (others - expected).square().mean()
    assert shares[0] < shares[1] < shares[2]


# --- losses ------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_paper_away_from_tau():
    scores = [torch.tensor([[0.0, 0.8]]), torch.tensor([[1.0, 0.25], [0.1, 0.9]])]
    assert efficiency(scores).item() == pytest.approx((0.32 + (1 + 0.0625 + 0.01 + 0.81) / 4) / 2)
    first = (4 + 1 / 0.09) / 2
    second = (4 + 16 + 2 / 0.16) / 4
    assert separability(scores, 0.5).item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_the_separability_loss_is_finite_at_tau_and_pushes_away_from_it_outside():
    scores = torch.tensor([0.5, 0.5 + EDGE / 2, 0.5 - 2 * EDGE, 0.5 + 2 * EDGE], requires_grad=True)
    separability([scores], 0.5).backward()
    assert scores.grad is not None
    assert scores.grad[:2].tolist() == [0, 0]
    assert scores.grad[2] > 0 > scores.grad[3]
    assert scores.grad.abs().max() <= 2 / EDGE**3


# --- training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["full", "lora", "router"])
@pytest.mark.parametrize("name", ["llama-tied-biased", "opt-projected", "gpt2"])
def test_both_stages_train_what_they_should_and_apply_puts_it_in_place(tmp_path, name, train):
    model, before = frozen(name), tiny.state(frozen(name))
    record = search(model, Record(tmp_path), train=train, router_lr=1e-2)
    assert all(torch.equal(p, before[n]) for n, p in tiny.state(model).items()), "search leaves the model as it was"
    result = lte.summary(record)
    assert len(result["stages"]) == (1 if train == "router" else 2)
    assert all(stage["steps"] == 10 and stage["stopped"] is None for stage in result["stages"])
    lte.apply(model, record)
    assert {module.rule for module in routed(model).values()} == {hard}
    assert not any(p.requires_grad for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, tiny.model(name).get_input_embeddings().weight) == (train != "full")
    expected = all_in_order(name, record)
    unchanged = [torch.equal(a.up.weight, b.up.weight) for a, b in zip(routed(model).values(), expected, strict=True)]
    assert unchanged == [train == "router"] * 2
    starts = record.tensors("start")
    for path, module in routed(model).items():
        assert not torch.equal(module.router.weight, starts[f"router.{path}"])
    again = frozen(name)
    lte.apply(again, Record(tmp_path))
    assert torch.equal(logits(again), logits(model))


def all_in_order(name: str, record: Record) -> list:
    """The untrained model's FFNs, their neurons in the record's order."""
    model = frozen(name)
    orders = [order for key, order in sorted(record.tensors("start").items()) if key.startswith("order.")]
    return [route(model, spec_of(model), i, order, Groups(SIZE, 0.5)) for i, order in enumerate(orders)]


def test_routers_are_frozen_in_stage_two(tmp_path):
    record = search(frozen(), Record(tmp_path))
    first, second = record.tensors("stage-1"), record.tensors("stage-2")
    routers = [name for name in first if name.endswith("router.weight")]
    assert len(routers) == 2
    assert all(torch.equal(first[name], second[name]) for name in routers)
    assert any(not torch.equal(first[name], second[name]) for name in first.keys() - set(routers))


def test_eta_closes_groups(tmp_path):
    """The knob of sparsity, with routers that learn fast."""
    shares = []
    for eta in (0.0, 50.0):
        record = search(frozen(), Record(tmp_path / str(eta)), eta=eta, lam=0.0, router_lr=0.1, tokens=960)
        shares.append(lte.summary(record)["sparsity"])
    assert shares[0] + 0.2 < shares[1]


def test_parts_of_a_step_add_up_to_the_step(tmp_path):
    whole = search(frozen(), Record(tmp_path / "whole"), batch=4, accumulate=1)
    parts = search(frozen(), Record(tmp_path / "parts"), batch=2, accumulate=2)
    for stage in ("stage-1", "stage-2"):
        assert parts.facts(stage)["loss"] == pytest.approx(whole.facts(stage)["loss"], rel=2e-3)


its_own_warnings = pytest.mark.filterwarnings("ignore")  # torch's compiler touches what torch warns about


@pytest.fixture
def compiling(monkeypatch, tmp_path):
    """Every training is long enough to be compiled, and nothing has been so far."""
    monkeypatch.setattr(training, "WORTH_COMPILING", 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@its_own_warnings
@pytest.mark.skipif(library.load() is None, reason="compiling takes a C++ compiler, as the native kernels do")
def test_compiled_layers_train_as_they_are(tmp_path, monkeypatch, compiling):
    compiled = search(frozen(), Record(tmp_path / "compiled"))
    assert compiling["unique_graphs"] >= 3  # a layer under each rule, the loss
    monkeypatch.undo()
    plain = search(frozen(), Record(tmp_path / "plain"))
    for stage in ("stage-1", "stage-2"):
        assert compiled.facts(stage)["loss"] == pytest.approx(plain.facts(stage)["loss"], rel=2e-3)


def test_without_a_compiler_it_trains_all_the_same(tmp_path, monkeypatch, compiling):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    trained = search(frozen(), Record(tmp_path / "trained"))
    assert not compiling["unique_graphs"]
    assert all(len(trained.facts(stage)["loss"]) == 10 for stage in ("stage-1", "stage-2"))


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_killed_training_resumes_to_the_same_result(tmp_path, monkeypatch, after):
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    whole, count, save = search(frozen(), Record(tmp_path / "whole")), [], Record.save

    def dying(self: Record, *rest: object) -> None:
        count.append(1)
        if len(count) > after:
            raise Killed
        save(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Record, "save", dying)
        with pytest.raises(Killed):
            search(frozen(), Record(tmp_path / "torn"))
    torn = search(frozen(), Record(tmp_path / "torn"))
    assert torn.facts("trained") == whole.facts("trained")
    found, expected = torn.tensors("stage-2"), whole.tensors("stage-2")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list((tmp_path / "torn").glob("stage-*/step.*"))


def test_a_loss_that_is_no_number_ends_the_stage_with_the_last_good_weights(tmp_path, monkeypatch):
    loss, calls = lte.next_token_loss, []

    def failing(*given):
        calls.append(1)
        return loss(*given) * (float("nan") if len(calls) == 7 else 1.0)

    monkeypatch.setattr(lte, "next_token_loss", failing)
    with pytest.warns(UserWarning, match="lte, stage 1: the loss of step 3 was nan.*try a smaller lr; going on with"):
        record = search(frozen(), Record(tmp_path))
    first, second = lte.summary(record)["stages"]
    assert (first["steps"], second["steps"]) == (3, 10)
    assert "the loss of step 3 was nan" in first["stopped"]
    assert all(torch.isfinite(t).all() for part in ("stage-1", "stage-2") for t in record.tensors(part).values())


# --- what cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("size=12", "size=12 is not one of 8, 16, 32"),
        ("tau=1", "tau=1.0 is not between 0 and 1"),
        ("tau=0", "tau=0.0 is not between 0 and 1"),
        ("eta=-1", "eta=-1 is outside 0 to 10000"),
        ("mu=-1", "mu=-1 is outside 0 to 10000"),
        ("train=all", "train=all is not one of full, lora, router"),
        ("lambda=1", "lte has no parameter 'lambda'"),
    ],
)
def test_bad_parameters_are_named(given, message):
    with pytest.raises(BadParameter, match=message):
        recipe.parse([f"lte:{given}"])


def test_groups_and_layers_that_do_not_fit_are_refused_before_anything_is_done(tmp_path):
    with pytest.raises(BadParameter, match="groups of 16 do not divide the 24 neurons of layer 0"):
        search(frozen(), Record(tmp_path), size=16)
    with pytest.raises(BadParameter, match=r"layers=\(1, 2\) names layers that are not there; the model has 0 to 1"):
        search(frozen(), Record(tmp_path), layers=(1, 2))
    with pytest.raises(SourceError, match="the calibration text holds 62 windows of 16 tokens, 4096 were asked for"):
        search(frozen(), Record(tmp_path), tokens=65536)
    compressed = frozen()
    compressed.get_submodule("model.layers.1.mlp").up_proj = torch.nn.Identity()
    with pytest.raises(BadParameter, match=r"layers\.1\.mlp\.up_proj is compressed already; give --method lte before"):
        search(compressed, Record(tmp_path))


def test_only_the_layers_asked_for_are_routed(tmp_path):
    model = copy.deepcopy(frozen())
    lte.apply(model, search(model, Record(tmp_path), layers=(1,), train="router"))
    assert list(routed(model)) == ["model.layers.1.mlp"]
