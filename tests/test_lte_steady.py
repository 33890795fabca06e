"""Decisions that noise does not turn: LTE's loss for it, against drawn noise, and what training with it is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pared.converters.methods import lte
from pared.converters.record import Record
from pared.converters.routed import Groups, RoutedMlp, hard, routed, soft
from pared.converters.routed_training import NOISE, steady, under
from pared.converters.routing import route
from pared.tests.test_lte import CALIBRATION, SIZE, everyone, frozen, logits, search, spec_of

TRAINING = {"lam": 0.0, "lr": 1e-3, "router_lr": 0.05, "tokens": 960}


@pytest.fixture
def ffn() -> RoutedMlp:
    """Three groups of a tiny model's FFN whose scores lie near the threshold, which is not 0."""
    model = frozen()
    module = route(model, spec_of(model), 0, torch.randperm(24), Groups(SIZE, 0.6))
    module.router.weight.data = 0.2 * torch.randn_like(module.router.weight)
    return module


def turned(module: RoutedMlp, x: torch.Tensor) -> torch.Tensor:
    module.rule = steady(hard)
    module(x)
    return module.turned


@pytest.mark.parametrize("rule", [soft, hard])
def test_a_steady_rule_is_the_rule(ffn, rule):
    x = torch.randn(2, 5, 16)
    ffn.rule = rule
    expected = ffn(x)
    ffn.rule = steady(rule)
    assert torch.equal(ffn(x), expected)
    assert 0 < ffn.turned.item() < 1


@torch.no_grad()
def test_what_noise_turns_is_what_drawn_noise_turns(ffn):
    x = torch.randn(16, 16)
    neurons = ffn.neurons(x)
    columns = ffn.down.weight.t()
    energies = (neurons.unsqueeze(-1) * columns).square().sum(-1).unflatten(-1, (-1, SIZE)).sum(-1)
    noise = NOISE * x.square().mean(-1, keepdim=True).sqrt() * torch.randn(20_000, *x.shape)
    differ = ((ffn.logits(x + noise) > ffn.threshold) != (ffn.logits(x) > ffn.threshold)).float().mean(0)
    expected = ((differ * energies).sum(-1) / energies.sum(-1)).mean()
    torch.testing.assert_close(turned(ffn, x), expected, rtol=0.02, atol=0)


def test_larger_router_weights_do_not_help(ffn):
    """As they do the paper's separability loss: noise grows with them."""
    ffn.threshold, x = 0.0, torch.randn(9, 16)
    before = turned(ffn, x)
    ffn.router.weight.data *= 64
    torch.testing.assert_close(turned(ffn, x), before)


def test_both_the_router_and_what_its_groups_add_can_lower_it(ffn):
    ffn.requires_grad_(True)
    x = torch.randn(33, 16)
    before = turned(ffn, x)
    before.backward()
    for weight in (ffn.router.weight, ffn.gate.weight, ffn.up.weight, ffn.down.weight):
        kept, step = weight.data.clone(), weight.grad / weight.grad.norm()
        weight.data -= 1e-2 * step
        assert turned(ffn, x) < before
        weight.data = kept


def test_nothing_to_turn_is_nothing_turned(ffn):
    """Inputs of zeros, routers of zeros: finite, as are the gradients."""
    ffn.requires_grad_(True)
    nothing, x = torch.zeros(3, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    found = turned(ffn, nothing)
    assert found.item() == 0
    found.backward()
    ffn.router.weight.data.zero_()
    found = turned(ffn, x)
    assert 0 <= found.item() <= 0.5
    found.backward()
    assert all(t.grad is None or torch.isfinite(t.grad).all() for t in (nothing, x, *ffn.parameters()))


def test_training_with_it_leaves_less_to_noise(tmp_path: Path):
    found = {}
    for mu, eta in ((60.0, 1.0), (0.0, 0.0)):  # which put out about as many groups
        model, record = frozen(), search(frozen(), Record(tmp_path / str(mu)), mu=mu, eta=eta, **TRAINING)
        assert 0.2 < lte.summary(record)["sparsity"] < 0.5
        lte.apply(model, record)
        logits(under(model, steady(hard)))
        found[mu] = sum(module.turned.item() for module in routed(model).values())
    assert 2 * found[60.0] < found[0.0]


@pytest.mark.parametrize("train", ["full", "lora"])
def test_every_stage_has_it_in_its_loss(tmp_path: Path, train):
    """The first step of a stage, where both models are still the same."""
    with_it, without = (search(frozen(), Record(tmp_path / str(mu)), mu=mu, lr=1e-8, train=train) for mu in (9.0, 0.0))
    for stage in ("stage-1", "stage-2"):
        added = with_it.facts(stage)["loss"][0] - without.facts(stage)["loss"][0]
        assert 0 < added < 9


def test_a_fixed_choice_decides_nothing(tmp_path: Path):
    """A rule that is given, as the static choice that bench/routed.py compares with: only the task counts."""
    losses = []
    for mu in (9.0, 0.0):
        model = frozen()
        route(model, spec_of(model), 0, torch.arange(24), Groups(SIZE, 0.5))
        params = lte.Params(size=SIZE, tokens=320, length=16, batch=2, mu=mu)
        facts = lte.train_stage(model, CALIBRATION, Record(tmp_path / str(mu)), params, 2, False, everyone)
        losses.append(facts["loss"])
    assert losses[0] == losses[1]
