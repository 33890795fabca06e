"""The small steps against fp64, written here a second time from their formulas.

tests/test_triton_interpret.py runs this file a second time, through the Triton kernels.
"""

from __future__ import annotations

import math

import pytest
import torch

from pared.kernels import dispatch, fused
from pared.kernels.native import library
from pared.tests.truth import assert_as_good, poisoned

pytestmark = pytest.mark.filterwarnings("ignore::pared.kernels.dispatch.SlowerPath")

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_shape = pytest.mark.parametrize("shape", [(1, 1), (1, 576), (3, 40), (7, 129), (0, 16)], ids=str)
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(result: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor) -> None:
    """Both as good as the truth itself, rounded once."""
    best = truth.to(result.dtype)
    assert_as_good(reference, best, truth)
    assert_as_good(result, best, truth)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    centred = x.double() - x.double().mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


@every_dtype
@every_shape
def test_rms_norm(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[1], seed=1)
    with poisoned():
        y = fused.rms_norm(x, weight, EPS)
    check(y, fused.rms_norm_reference(x, weight, EPS), rms(x, weight))


@every_dtype
def test_rms_norm_of_rows_that_lie_apart(dtype):
    wide, weight = random(5, 96, dtype=dtype), random(24, seed=1)
    x = wide[:, 48:72]
    with poisoned():
        y = fused.rms_norm(x, weight, EPS)
    assert y.is_contiguous()
    check(y, fused.rms_norm_reference(x, weight, EPS), rms(x, weight))


@every_dtype
@every_shape
def test_add_rms_norm(shape, dtype):
    x, residual, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(shape[1], seed=2)
    before = residual.clone()
    with poisoned():
        y, total = fused.add_rms_norm(x, residual, weight, EPS)
    expected, expected_total = fused.add_rms_norm_reference(x, residual, weight, EPS)
    assert torch.equal(total, expected_total)
    assert torch.equal(total, x + residual)
    assert torch.equal(residual, before)
    check(y, expected, rms(total, weight))


@every_dtype
@pytest.mark.parametrize("with_bias", [True, False])
@every_shape
def test_add_layer_norm(shape, with_bias, dtype):
    x, residual, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(shape[1], seed=2)
    bias = random(shape[1], seed=3) if with_bias else None
    with poisoned():
        y, total = fused.add_layer_norm(x, residual, weight, bias, EPS)
    expected, expected_total = fused.add_layer_norm_reference(x, residual, weight, bias, EPS)
    assert torch.equal(total, expected_total)
    assert torch.equal(total, x + residual)
    check(y, expected, layer(total, weight, bias))


@every_dtype
def test_concat(dtype):
    parts = [random(3, n, dtype=dtype, seed=n) for n in (1, 40, 7)]
    with poisoned():
        y = fused.concat(parts)
    assert torch.equal(y, fused.concat_reference(parts))
    assert [part.tolist() for part in y.split([1, 40, 7], dim=1)] == [part.tolist() for part in parts]


@every_dtype
@pytest.mark.parametrize("with_bias", [True, False])
@every_shape
def test_layer_norm(shape, with_bias, dtype):
    x, weight = random(*shape, dtype=dtype) + 3, random(shape[1], seed=1)
    bias = random(shape[1], seed=2) if with_bias else None
    with poisoned():
        y = fused.layer_norm(x, weight, bias, EPS)
    check(y, fused.layer_norm_reference(x, weight, bias, EPS), layer(x, weight, bias))


ACTIVATIONS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}


def spread(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Small, ordinary and large values, where exp overflows and where everything saturates."""
    x = random(*shape, dtype=torch.float32) * torch.tensor([1e-3, 1.0, 4.0, 90.0]).repeat(shape[-1])[: shape[-1]]
    return x.to(dtype)


def test_every_activation_is_tested():
    assert ACTIVATIONS.keys() == fused.ACTIVATIONS.keys()


@every_dtype
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 2), (1, 1536), (3, 10), (5, 258), (0, 8)], ids=str)
def test_activations(shape, kind, dtype):
    x = spread(*shape, dtype=dtype)
    wide, half = x.double(), shape[1] // 2
    with poisoned():
        plain, gated = fused.act(x, kind), fused.gated_act(x, kind)
    check(plain, fused.act_reference(x, kind), ACTIVATIONS[kind](wide))
    check(gated, fused.gated_act_reference(x, kind), ACTIVATIONS[kind](wide[:, :half]) * wide[:, half:])


ROTATIONS = {
    "llama": (3, 4, 2, 16, 16),
    "partly rotated": (2, 3, 1, 24, 8),
    "not at all": (4, 2, 2, 8, 0),
    "one token, one head": (1, 1, 1, 2, 2),
    "an odd half": (5, 6, 3, 20, 10),
    "smollm2": (1, 9, 3, 64, 64),
    "no token": (0, 2, 1, 8, 8),
}


@every_dtype
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "dim", "rotated"), ROTATIONS.values(), ids=ROTATIONS.keys())
def test_rotary_cache(tokens, heads, kv_heads, dim, rotated, normed, dtype):
    qkv = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = random(tokens, rotated // 2, seed=1)
    cos, sin = angles.cos(), angles.sin()
    pools = [torch.full((4, 3, kv_heads, dim), 7.0, dtype=dtype) for _ in range(4)]
    slots = torch.randperm(12, generator=torch.Generator().manual_seed(2))[:tokens]
    norms = (random(dim, seed=3), random(dim, seed=4)) if normed else None
    with poisoned():
        q = fused.rotary_cache(qkv, cos, sin, pools[0], pools[1], slots, heads, kv_heads, dim, norms, EPS)
    given = (*(norms or (None, None)), EPS)
    expected = fused.rotary_cache_reference(qkv, cos, sin, pools[2], pools[3], slots, heads, *given)
    q_in, k_in, v_in = qkv.view(tokens, heads + 2 * kv_heads, dim).double().split([heads, kv_heads, kv_heads], dim=1)

    def turned(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        x = x if norm is None else rms(x, norm)
        y = x.clone()
        for i in range(rotated // 2):
            c, s, j = cos[:, None, i].double(), sin[:, None, i].double(), i + rotated // 2
            y[..., i], y[..., j] = x[..., i] * c - x[..., j] * s, x[..., j] * c + x[..., i] * s
        return y

    q_norm, k_norm = norms or (None, None)
    check(q, expected, turned(q_in, q_norm))
    truth_k = torch.full((12, kv_heads, dim), 7.0, dtype=torch.float64).index_put((slots,), turned(k_in, k_norm))
    truth_v = torch.full((12, kv_heads, dim), 7.0, dtype=torch.float64).index_put((slots,), v_in)
    check(pools[0].view(12, kv_heads, dim), pools[2].view(12, kv_heads, dim), truth_k)
    check(pools[1].view(12, kv_heads, dim), pools[3].view(12, kv_heads, dim), truth_v)


def test_wrong_tensors_are_refused_with_the_numbers():
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    pool, table = torch.zeros(2, 4, 1, 4), torch.zeros(2, 2)
    slots = torch.zeros(2, dtype=torch.int64)
    refusals = [
        (lambda: fused.rms_norm(x, weight[:7], EPS), r"\(7,\)"),
        (lambda: fused.rms_norm(x, weight.half(), EPS), "float16"),
        (lambda: fused.rms_norm(x.double(), weight, EPS), "float64"),
        (lambda: fused.act(x.double(), "silu"), "float64"),
        (lambda: fused.rms_norm(x.t(), weight[:2], EPS), r"\(1, 8\)"),
        (lambda: fused.add_rms_norm(x, x[:1], weight, EPS), r"\(1, 8\)"),
        (lambda: fused.layer_norm(x, weight, weight.half(), EPS), "float16"),
        (lambda: fused.gated_act(x, "tanh"), "tanh"),
        (lambda: fused.gated_act(x[:, :7].contiguous(), "silu"), r"\(2, 7\)"),
        (lambda: fused.act(x[:, :7], "silu"), r"\(8, 1\)"),
        (lambda: fused.rotary_cache(x, table, table, pool, pool, slots, 1, 1, 4), r"\(2, 12\)"),
        (lambda: fused.rotary_cache(torch.zeros(2, 12), table, table, pool, pool, slots.int(), 1, 1, 4), "int32"),
        (lambda: fused.rotary_cache(torch.zeros(2, 12), table, table, pool.half(), pool, slots, 1, 1, 4), "float16"),
        (lambda: fused.add_layer_norm(x, x[:1], weight, None, EPS), r"\(1, 8\)"),
        (lambda: fused.add_layer_norm(x, x, weight, weight[:3], EPS), r"\(3,\)"),
        (lambda: fused.concat([x, x.half()]), "float16"),
        (lambda: fused.concat([x[:, :3]]), r"\(8, 1\)"),
        (lambda: fused.concat([x] * 9), "1 to 8"),
        (
            lambda: fused.rotary_cache(
                torch.zeros(2, 12), table, table, pool, pool, slots, 1, 1, 4, (weight[:4], weight[:3]), EPS
            ),
            r"\(3,\)",
        ),
        (
            lambda: fused.rotary_cache(torch.zeros(2, 12), *[torch.zeros(2, 3)] * 2, pool, pool, slots, 1, 1, 4),
            "6 of 4",
        ),
    ]
    for call, says in refusals:
        with pytest.raises(ValueError, match=says):
            call()


@pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter takes the Triton path")
def test_without_the_native_library_the_reference_runs_and_is_counted(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "why_not", lambda: "none for this test")
    monkeypatch.setattr(dispatch, "FALLBACKS", type(dispatch.FALLBACKS)())
    x, weight = random(2, 8), random(8, seed=1)
    assert torch.equal(fused.rms_norm(x, weight, EPS), fused.rms_norm_reference(x, weight, EPS))
    assert torch.equal(fused.act(x, "gelu"), fused.act_reference(x, "gelu"))
    assert dispatch.FALLBACKS == {("rms_norm", "none for this test"): 1, ("act", "none for this test"): 1}


def test_the_ops_keep_the_rules_of_torch_library():
    x, weight, pool, table = random(2, 12), random(12), random(3, 2, 1, 4), random(2, 2)
    cases = [
        (torch.ops.pared.rms_norm.default, (x, weight, EPS)),
        (torch.ops.pared.add_rms_norm.default, (x, x.clone(), weight, EPS)),
        (torch.ops.pared.layer_norm.default, (x, weight, None, EPS)),
        (torch.ops.pared.add_layer_norm.default, (x, x.clone(), weight, weight.clone(), EPS)),
        (torch.ops.pared.concat.default, ([x, x.clone()],)),
        (torch.ops.pared.gated_act.default, (x, "silu")),
        (torch.ops.pared.act.default, (x, "relu")),
        (
            torch.ops.pared.rotary_cache.default,
            (x, table, table.clone(), pool, pool.clone(), torch.tensor([5, 1]), 1, None, None, EPS),
        ),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
