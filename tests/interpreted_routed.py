"""The launches of routed_ffn one by one and together, in the interpreter; test_triton_interpret.py runs it.

Decisions are held to sums in fp64, values to those of the groups that were chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from pared.kernels import triton_routed_ffn, triton_router, tuning
from pared.kernels.fused import ACTIVATIONS, rms_norm_reference
from pared.kernels.triton_routed_ffn import Weights
from pared.tests.truth import assert_as_good, poisoned

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Launches as GPUs get them; test_formats.py has those of the interpreter."""
    monkeypatch.setattr(tuning, "target", lambda: "default")


class Shape(NamedTuple):
    groups: int
    size: int
    k: int
    gated: bool = True
    biased: bool = False
    act: str = "silu"
    dtype: torch.dtype = torch.float32


SHAPES = [
    Shape(1, 8, 1),
    Shape(3, 16, 33, biased=True, act="gelu_new"),
    Shape(21, 8, 72, gated=False, biased=True, act="relu"),
    Shape(9, 32, 150),
    Shape(5, 32, 264, gated=False, act="gelu"),
]


def made(shape: Shape, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return (torch.randn(sizes, generator=generator) * sizes[-1] ** -0.5).to(shape.dtype)

    neurons = shape.groups * shape.size
    rows = random(3 if shape.gated else 2, shape.groups, shape.size, shape.k)
    gate, up, down = random(neurons), random(neurons), random(shape.k)
    biases = (gate if shape.gated else None, up, down) if shape.biased else (None, None, None)
    router = torch.randn(shape.groups, shape.k, generator=generator)
    return Weights(rows, biases, router, shape.act, 0.1)


def logits(x: Tensor, weights: Weights) -> Tensor:
    return x.double() @ weights.router.double().t()


def ffn(x: Tensor, weights: Weights, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition in one dtype: every neuron, those of groups that were not chosen zero."""
    *ins, down = (rows.flatten(0, 1).to(dtype) for rows in weights.groups)
    gate_bias, up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in weights.biases)
    act = ACTIVATIONS[weights.act]
    hidden = torch.nn.functional.linear(x.to(dtype), ins[-1], up_bias)
    if weights.gated:
        hidden = act(torch.nn.functional.linear(x.to(dtype), ins[0], gate_bias)) * hidden
    else:
        hidden = act(hidden)
    hidden = hidden.where(chosen.bool().repeat_interleave(weights.size, dim=1), 0)
    return torch.nn.functional.linear(hidden, down.t(), down_bias)


def counts() -> Tensor:
    return torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_ffn(shape, rows):
    """One row, tiles of what is awake, cuBLAS; with what stands around it and rows that pad."""
    weights, x = made(shape), torch.randn(rows, shape.k, generator=torch.Generator().manual_seed(rows))
    residual, norm = torch.randn_like(x), torch.rand(shape.k) + 0.5
    awake, told = torch.arange(rows) % 3 + rows % 2, counts()
    with poisoned():
        y = triton_routed_ffn.routed_ffn(x, weights, told, awake, norm, 1e-5, residual)
        again = triton_routed_ffn.routed_ffn(x, weights, counts(), awake, norm, 1e-5, residual)
    normed = rms_norm_reference(x, norm, 1e-5)
    chosen = (logits(normed, weights) > weights.threshold) & (awake != 0)[:, None]
    own, truth = (ffn(normed, weights, chosen, dtype) + residual.to(dtype) for dtype in (torch.float32, torch.float64))
    assert_as_good(y, own, truth)
    assert torch.equal(y, again)
    assert told.tolist() == [(awake != 0).sum(), chosen.sum(), chosen.any(0).sum()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_half_types(dtype, rows):
    shape = SHAPES[3]._replace(dtype=dtype)
    weights, x = made(shape), torch.randn(rows, shape.k).to(dtype)
    with poisoned():
        y = triton_routed_ffn.routed_ffn(x, weights, counts())
    chosen = logits(x, weights) > weights.threshold
    assert_as_good(y, ffn(x, weights, chosen, dtype), ffn(x, weights, chosen, torch.float32), rounds_inside=True)


@pytest.mark.parametrize("threshold", [-1e9, 1e9], ids=["all awake", "none awake"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_all_and_none(threshold, rows):
    shape = SHAPES[1]
    weights, x = made(shape)._replace(threshold=threshold), torch.randn(rows, shape.k)
    told = counts()
    with poisoned():
        y = triton_routed_ffn.routed_ffn(x, weights, told)
    chosen = torch.full((rows, shape.groups), threshold < 0)
    assert_as_good(y, ffn(x, weights, chosen, torch.float32), ffn(x, weights, chosen, torch.float64))
    assert told.tolist() == [rows, chosen.sum(), chosen.any(0).sum()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decisions_do_not_depend_on_the_other_rows(dtype):
    """Thresholds at each row's own logits: a sum that differed in its last bit would decide otherwise for some."""
    shape = Shape(12, 8, 264, dtype=dtype)
    weights, rows = made(shape), torch.randn(64, shape.k).to(dtype)
    exact = logits(rows, weights).flatten()
    for threshold in exact[:: len(exact) // 3].tolist():
        chosen, _ = triton_router.route(rows, weights.router, threshold)
        for m in (1, 2, 7):
            own = torch.cat(
                [triton_router.route(part, weights.router, threshold)[0] for part in rows[: 2 * m].split(m)]
            )
            assert torch.equal(own, chosen[: 2 * m])


@pytest.mark.parametrize("margin", [0.0, 0.02, 1e9])
def test_what_tiles_leave_unsure_is_settled_one_by_one(margin, monkeypatch):
    """Whatever share of the decisions that is; rows that pad stay out."""
    monkeypatch.setattr(triton_router, "MARGIN", margin)
    weights, rows, awake = made(Shape(35, 8, 72)), torch.randn(70, 72), torch.arange(70) % 4
    norm = torch.rand(72) + 0.5
    with poisoned():
        chosen, x = triton_router.route(rows, weights.router, weights.threshold, awake, norm, 1e-5)
    own = [
        triton_router.route(part, weights.router, weights.threshold, live)[0]
        for part, live in zip(x.split(32), awake.split(32), strict=True)
    ]
    assert torch.equal(chosen, torch.cat(own))
    assert 0 < chosen.sum() < chosen.numel() and not chosen[awake == 0].any()


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_list_has_the_awake_neurons_in_order(size, rows):
    """Hidden values stand at their neurons' places, zero where only another row wakes them."""
    shape = Shape(11, size, 40)
    weights, x = made(shape), torch.randn(rows, shape.k)
    chosen, _ = triton_router.route(x, weights.router, weights.threshold)
    with poisoned():
        hidden = triton_routed_ffn.wake(x, weights, chosen, counts(), None, 5)
    union = chosen.bool().any(0).repeat_interleave(size).nonzero().flatten()
    assert hidden.state.tolist() == [len(union), 0, 0, 0, 0, 0]
    assert torch.equal(hidden.listed[: len(union)].long(), union)
    masked = chosen.bool().repeat_interleave(size, dim=1)[:, union]
    assert torch.equal(hidden.h[:, : len(union)] != 0, masked)
