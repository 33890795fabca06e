"""Paged attention against fp64: every mix of decode, chunks, groups, windows and odd sizes.

tests/test_triton_interpret.py runs this file a second time, through the Triton kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pared.kernels import attention, decode, dispatch, fused
from pared.kernels.native import library
from pared.tests.truth import assert_as_good, poisoned

pytestmark = pytest.mark.filterwarnings("ignore::pared.kernels.dispatch.SlowerPath")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONG = max(attention.SDPA_FROM_ROWS.values())


@dataclass(frozen=True)
class Case:
    """lengths: (query rows, context) of every sequence."""

    lengths: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page: int = 8
    window: int = 0


CASES = {
    "one key": Case(((1, 1),)),
    "decode": Case(((1, 1), (1, 8), (1, 9), (1, 70), (1, 129)), heads=6, kv_heads=2),
    "decode in a window": Case(((1, 3), (1, 64), (1, 130)), window=9),
    "a window of one": Case(((3, 9), (1, 20)), window=1),
    "prompts": Case(((5, 5), (17, 17), (1, 1)), heads=3, kv_heads=3, head_dim=24),
    "long prompt": Case(((LONG + 7, LONG + 7),), heads=2, kv_heads=1),
    "long chunk in a window": Case(((LONG + 3, LONG + 80),), heads=2, kv_heads=1, window=50),
    "chunks, decode, chunks": Case(((LONG, LONG + 21), (1, 40), (2, 33), (LONG + 1, LONG + 1), (1, 5))),
    "one head of an odd size": Case(((2, 11), (1, 30)), heads=1, kv_heads=1, head_dim=20, page=16),
    "eight heads a key head": Case(((1, 21), (9, 30)), heads=8, kv_heads=1, head_dim=64, page=4),
    "an empty row of the batch": Case(((1, 4), (0, 0), (2, 6))),
}


def arguments(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple:
    """What paged_attention takes; unused slots of the pools hold NaN, which must never be read."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-context // case.page) for _, context in case.lengths]
    pools = torch.full((2, sum(blocks) + 1, case.page, case.kv_heads, case.head_dim), float("nan"))
    order = torch.randperm(sum(blocks), generator=generator) + 1
    tables = torch.zeros(len(blocks), max(blocks) + 1, dtype=torch.int32)
    for s, table in enumerate(order.split(blocks)):
        tables[s, : len(table)] = table
        for j in range(case.lengths[s][1]):
            pools[:, table[j // case.page], j % case.page] = torch.randn(
                2, case.kv_heads, case.head_dim, generator=generator
            )
    rows = torch.tensor([0] + [rows for rows, _ in case.lengths]).cumsum(0).to(torch.int32)
    contexts = torch.tensor([context for _, context in case.lengths], dtype=torch.int32)
    q = torch.randn(int(rows[-1]), case.heads, case.head_dim, generator=generator)
    longest = max(rows for rows, _ in case.lengths)
    k_pool, v_pool = pools.to(dtype)
    return q.to(dtype), k_pool, v_pool, rows, contexts, tables, longest, case.head_dim**-0.5, case.window


def definition(arguments: tuple, dtype: torch.dtype) -> torch.Tensor:
    """One query row and head at a time, key by key as the docstring says, in `dtype`."""
    q, k_pool, v_pool, starts, contexts, tables, _, scale, window = arguments
    out = torch.zeros(q.shape, dtype=dtype)
    group, page = q.shape[1] // k_pool.shape[2], k_pool.shape[1]
    for s, context in enumerate(contexts.tolist()):
        first, last = starts[s].item(), starts[s + 1].item()
        for row in range(first, last):
            i = context - (last - row)
            keys = range(max(0, i - window + 1) if window else 0, i + 1)
            where = [(tables[s, j // page].item(), j % page) for j in keys]
            k, v = (
                torch.stack([pool[at] for at in where]).repeat_interleave(group, 1).to(dtype)
                for pool in (k_pool, v_pool)
            )
            weights = ((q[row].to(dtype) * k).sum(-1) * scale).softmax(0)
            out[row] = (weights[..., None] * v).sum(0)
    return out


def torch_own(arguments: tuple) -> torch.Tensor:
    """torch's own attention, in the dtype of the tensors."""
    q, k_pool, v_pool, starts, contexts, tables, _, scale, window = arguments
    out = torch.empty_like(q)
    for s, context in enumerate(contexts.tolist()):
        if context:
            rows = slice(int(starts[s]), int(starts[s + 1]))
            k, v = (attention._gather(pool, tables[s], context) for pool in (k_pool, v_pool))
            out[rows] = attention._sdpa(q[rows], k, v, scale, window)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_as_good_as_torch(case, dtype):
    given = arguments(case, dtype)
    with poisoned():
        y = attention.paged_attention(*given)
    assert_as_good(y, torch_own(given), definition(given, torch.float64), rounds_inside=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_reference_is_the_definition(case, dtype):
    given = arguments(case, dtype)
    truth = definition(given, torch.float64)
    assert_as_good(attention.reference(*given), truth.to(dtype), truth)


STEPS = {
    **{name: CASES[name] for name in ("one key", "decode")},
    "a window": Case(((1, 3), (1, 64), (1, 130), (1, 9), (1, 10), (1, 77)), heads=8, window=9),
    "eight heads a key head": Case(((1, 21), (1, 300)), heads=8, kv_heads=1, head_dim=64, page=4),
    "heads of their own": Case(((1, 40), (1, 5)), heads=3, kv_heads=3, head_dim=20),
    "a long one": Case(((1, 1500), (1, 2)), heads=2, kv_heads=1, page=16),
    "a long one in a window": Case(((1, 1500), (1, 2)), heads=2, kv_heads=2, page=16, window=333),
}


def step_arguments(case: Case, dtype: torch.dtype, rotated: int, normed: bool) -> tuple:
    """What decode.decode takes; the slots of the new tokens hold NaN."""
    _, k_pool, v_pool, _, contexts, tables, _, scale, window = arguments(case, dtype)
    generator, last, rows = torch.Generator().manual_seed(7), contexts - 1, torch.arange(len(contexts))
    slots = tables[rows, last // case.page].long() * case.page + last % case.page
    for pool in (k_pool, v_pool):
        pool.view(-1, case.kv_heads, case.head_dim)[slots] = float("nan")
    width = (case.heads + 2 * case.kv_heads) * case.head_dim
    qkv = torch.randn(len(contexts), width, generator=generator).to(dtype)
    angle = torch.randn(len(contexts), rotated // 2, generator=generator)
    norms = (torch.rand(case.head_dim, generator=generator) + 0.5, torch.rand(case.head_dim, generator=generator) + 0.5)
    turned = (qkv, angle.cos(), angle.sin(), k_pool, v_pool, slots, contexts, tables)
    heads = (case.heads, case.kv_heads, case.head_dim)
    return (*turned, *heads, norms if normed else None, 1e-5, scale, window)


def check_step(given: tuple, y: torch.Tensor | None, pools: tuple[torch.Tensor, torch.Tensor]) -> None:
    """y and the written pools against the separate steps; given: as it was before the step."""
    qkv, cos, sin, k_pool, v_pool, slots, contexts, tables, heads, _, _, norms, eps, scale, window = given
    turned = fused.rotary_cache_reference(qkv, cos, sin, k_pool, v_pool, slots, heads, *(norms or (None, None)), eps)
    starts = torch.arange(len(qkv) + 1, dtype=torch.int32)
    attended = (turned, k_pool, v_pool, starts, contexts, tables, 1, scale, window)
    assert_as_good(y, torch_own(attended), definition(attended, torch.float64), rounds_inside=True)
    ulp = torch.finfo(qkv.dtype).eps
    torch.testing.assert_close(pools[0], k_pool, rtol=4 * ulp, atol=4 * ulp, equal_nan=True)
    assert torch.equal(pools[1].nan_to_num(), v_pool.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rotated", "normed"), [(16, False), (10, True), (0, False)])
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
def test_a_decode_step_rotates_writes_and_attends(case, rotated, normed, dtype):
    given = step_arguments(case, dtype, rotated, normed)
    copies = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in given)
    with poisoned():
        y = decode.decode(*copies)
    if not dispatch.interpreting():
        assert y is None
        y = decode.reference(*copies[:9], *(given[11] or (None, None)), *copies[12:])
    check_step(given, y, copies[3:5])


lengths = st.tuples(st.integers(1, 12), st.integers(0, 40)).map(lambda pair: (pair[0], sum(pair)))
shapes = st.builds(
    lambda lengths, kv_heads, group, head_dim, page, window: Case(
        tuple(lengths), kv_heads * group, kv_heads, 2 * head_dim, page, window
    ),
    st.lists(lengths, min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 20),
    st.sampled_from([1, 3, 8, 16]),
    st.integers(0, 20),
)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(case=shapes)
def test_any_shape(case):
    given = arguments(case, torch.float32)
    assert_as_good(attention.paged_attention(*given), torch_own(given), definition(given, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_does_not_feel_its_neighbours(dtype):
    """Bit for bit: alone or in a batch."""
    q, k_pool, v_pool, starts, contexts, tables, _, scale, window = arguments(CASES["chunks, decode, chunks"], dtype)
    batched = attention.paged_attention(q, k_pool, v_pool, starts, contexts, tables, LONG + 1, scale, window)
    for s in range(len(contexts)):
        rows = slice(int(starts[s]), int(starts[s + 1]))
        count = rows.stop - rows.start
        own = torch.tensor([0, count], dtype=torch.int32), contexts[s : s + 1], tables[s : s + 1]
        alone = attention.paged_attention(q[rows], k_pool, v_pool, *own, LONG + 1, scale, window)
        assert torch.equal(alone, batched[rows])


def test_wrong_tensors_are_refused_with_the_numbers():
    good = arguments(Case(((2, 5), (1, 3))), torch.float32)
    q, k_pool, _, starts, contexts, tables = good[:6]
    for place, bad, says in (
        (0, q[:, :, :7].contiguous(), r"\(3, 4, 7\)"),
        (0, q[:, :3].contiguous(), r"\(3, 3, 16\)"),
        (0, q.bfloat16(), "bfloat16"),
        (0, q.transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
        (2, k_pool[1:], "pools"),
        (1, k_pool.double(), "float64"),
        (3, starts[:2], r"\(2,\)"),
        (4, contexts.long(), "int64"),
        (5, tables[:1], r"\(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=says):
            attention.paged_attention(*good[:place], bad, *good[place + 1 :])


@pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter takes the Triton path")
def test_without_the_native_library_the_reference_runs_and_is_counted(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "why_not", lambda: "none for this test")
    monkeypatch.setattr(dispatch, "FALLBACKS", type(dispatch.FALLBACKS)())
    given = arguments(CASES["decode"], torch.float32)
    assert torch.equal(attention.paged_attention(*given), attention.reference(*given))
    assert dispatch.FALLBACKS == {("paged_attention", "none for this test"): 1}


def test_a_decode_step_refuses_wrong_tensors_with_the_numbers(monkeypatch):
    monkeypatch.setattr(decode.ops, "takes_triton", lambda x: True)
    good = step_arguments(STEPS["decode"], torch.float32, 16, False)
    for place, bad, says in (
        (0, good[0][:, 1:].contiguous(), r"\(5, 159\)"),
        (6, good[6].long(), "int64"),
        (7, good[7][:3], r"\(3, "),
        (5, good[5].int(), "int32"),
    ):
        with pytest.raises(ValueError, match=says):
            decode.decode(*good[:place], bad, *good[place + 1 :])


def test_the_op_keeps_the_rules_of_torch_library():
    given = (
        torch.nan_to_num(t) if isinstance(t, torch.Tensor) else t for t in arguments(CASES["decode"], torch.float32)
    )
    op = torch.ops.pared.paged_attention.default
    torch.library.opcheck(op, tuple(given), test_utils=("test_schema", "test_faketensor"))
