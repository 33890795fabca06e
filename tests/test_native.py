"""The native CPU library: every level that this CPU has against fp32 truth, and how the library is found or built."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pared.kernels.native import bindings, build, library
from pared.kernels.native.tape import Tape
from pared.tests.truth import assert_as_good

NATIVE = library.load()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=f"nothing to test here: {library.why_not()}")

LEVELS = NATIVE.levels() if NATIVE else ()
DTYPES = tuple(bindings.DTYPES)
level = pytest.mark.parametrize("level", LEVELS)
dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that nobody has written: all NaN."""
    return torch.full(shape, math.nan, dtype=dtype)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = [
    (1, 1, 1),
    (1, 33, 70),
    (1, 576, 1536),
    (2, 17, 31),
    (3, 64, 64),
    (5, 35, 129),
    (16, 48, 100),
    (17, 50, 257),
    (33, 16, 64),
    (70, 130, 515),
]


@level
@dtype
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_linear_is_as_exact_as_torch(level: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w, bias = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2)
    out = poisoned(m, n, dtype=dtype)
    NATIVE.at(level).linear(x, w, bias, out)
    assert_as_good(out, F.linear(x, w, bias), x.double() @ w.double().T + bias.double())
    NATIVE.at(level).linear(x, w, None, out)
    assert_as_good(out, F.linear(x, w), x.double() @ w.double().T)
    NATIVE.at(level).linear(x, w, bias.float(), out)
    assert_as_good(out, F.linear(x, w, bias), x.double() @ w.double().T + bias.double())


@level
@dtype
def test_a_row_is_the_same_in_any_company_and_with_any_threads(level: str, dtype: torch.dtype) -> None:
    native, n, k = NATIVE.at(level), 300, 1100
    x, w = random(70, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    tiles = level == "amx" and dtype == torch.bfloat16  # a lone row does not take them, and adds in another order
    sizes, before, last_rows = (2 if tiles else 1, 2, 4, 7, 16, 17, 33, 64, 70), torch.get_num_threads(), []
    for m in sizes:
        out = poisoned(m, n, dtype=dtype)
        torch.set_num_threads(1 + m % 3)
        native.linear(x[-m:].contiguous(), w, None, out)
        torch.set_num_threads(before)
        last_rows.append(out[-1])
    for m, row in zip(sizes, last_rows, strict=True):
        assert torch.equal(row, last_rows[0]), m


@level
def test_linear_keeps_nan_and_infinity(level: str) -> None:
    for dtype in DTYPES:
        x, w = torch.ones(2, 40, dtype=dtype), torch.ones(20, 40, dtype=dtype)
        w[3, 39], w[7, 0] = math.inf, math.nan
        out = poisoned(2, 20, dtype=dtype)
        NATIVE.at(level).linear(x, w, None, out)
        assert (out[:, 3] == math.inf).all() and out[:, 7].isnan().all() and (out[:, :3] == 40).all()


@level
@dtype
@pytest.mark.parametrize("m, n, k", [(0, 5, 7), (3, 0, 7), (0, 0, 0), (1, 40, 0), (20, 40, 0)])
def test_linear_of_nothing(level: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w, bias = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2)
    out = poisoned(m, n, dtype=dtype)
    NATIVE.at(level).linear(x, w, bias, out)
    assert torch.equal(out, F.linear(x, w, bias))


@level
@dtype
@pytest.mark.parametrize("m", [1, 3, 40])
def test_a_wide_linear_is_not_rounded(level: str, dtype: torch.dtype, m: int) -> None:
    x, w, bias = random(m, 257, dtype=dtype), random(50, 257, dtype=dtype, seed=1), random(50, dtype=dtype, seed=2)
    wide, narrow = poisoned(m, 50, dtype=torch.float32), poisoned(m, 50, dtype=dtype)
    NATIVE.at(level).linear(x, w, bias, wide)
    NATIVE.at(level).linear(x, w, bias, narrow)
    assert torch.equal(wide.to(dtype), narrow)
    assert_as_good(wide, F.linear(x.float(), w.float(), bias.float()), F.linear(x.double(), w.double(), bias.double()))


class Part:
    """One part of a basis_linear: pivoted or not, with a bias or not; every column of x counts."""

    def __init__(self, outputs: int, rank: int, k: int, pivoted: bool, dtype: torch.dtype, seed: int) -> None:
        columns = k - rank if pivoted else k
        shuffled = torch.randperm(k, generator=torch.Generator().manual_seed(seed)).int()
        self.order = torch.cat([shuffled[:rank].sort()[0], shuffled[rank:].sort()[0]]) if pivoted else None
        self.basis = (
            random(rank, columns, dtype=dtype, seed=seed) * columns**-0.5 if columns else random(rank, 0, dtype=dtype)
        )
        self.coefficients = random(outputs, rank, dtype=dtype, seed=seed + 1) * rank**-0.5
        self.bias = random(outputs, dtype=dtype, seed=seed + 2) if seed % 2 else None

    def reference(self, x: torch.Tensor, dtype: torch.dtype, wide: torch.dtype) -> torch.Tensor:
        """y with both steps in `wide`, z and y rounded to `dtype`."""
        source, basis = x.to(wide), self.basis.to(wide)
        if self.order is None:
            z = source @ basis.T
        else:
            source, rank = source[:, self.order.long()], len(basis)
            z = source[:, :rank] + source[:, rank:] @ basis.T
        y = z.to(dtype).to(wide) @ self.coefficients.to(wide).T
        return (y if self.bias is None else y + self.bias.to(wide)).to(dtype)


def basis_linear(native: bindings.Library, x: torch.Tensor, parts: list[Part]) -> torch.Tensor:
    out = poisoned(len(x), sum(len(part.coefficients) for part in parts), dtype=x.dtype)
    each = (bindings.basis_words(part.order, part.basis, part.coefficients, part.bias) for part in parts)
    native.basis_linear(x, [word for words in each for word in words], out)
    return out


PARTS = {  # outputs, rank, pivoted
    "one": [(1, 1, True)],
    "ragged": [(33, 17, True), (5, 40, False), (16, 3, True)],
    "full rank": [(20, 90, True), (20, 90, False)],
    "many": [(48, 1 + 11 * i, i % 2 == 0) for i in range(6)],
}


@level
@dtype
@pytest.mark.parametrize("m", [1, 2, 17, 33, 70])
@pytest.mark.parametrize("which", PARTS)
def test_basis_linear_is_as_exact_as_torch(level: str, dtype: torch.dtype, m: int, which: str) -> None:
    k = 1 if which == "one" else 90
    parts = [Part(*shape[:2], k, shape[2], dtype, seed) for seed, shape in enumerate(PARTS[which])]
    x = random(m, k, dtype=dtype, seed=9)
    own = torch.cat([part.reference(x, dtype, torch.float32) for part in parts], dim=1)
    truth = torch.cat([part.reference(x, torch.float64, torch.float64) for part in parts], dim=1)
    assert_as_good(basis_linear(NATIVE.at(level), x, parts), own, truth)
    assert basis_linear(NATIVE.at(level), x[:0], parts).shape == (0, own.shape[1])


@level
@dtype
def test_basis_linear_is_two_linears(level: str, dtype: torch.dtype) -> None:
    """The same bits as two calls where nothing is pivoted, whatever the company, the threads and the other parts."""
    native, k = NATIVE.at(level), 700
    parts = [Part(900, 300, k, False, dtype, 1), Part(70, 31, k, True, dtype, 2), Part(500, 610, k, True, dtype, 4)]
    x, before = random(70, k, dtype=dtype), torch.get_num_threads()
    tiles = level == "amx" and dtype == torch.bfloat16  # a lone row does not take them, and adds in another order
    sizes, last_rows = (2 if tiles else 1, 2, 5, 16, 17, 64, 70), []
    for m in sizes:
        torch.set_num_threads(1 + m % 4)
        out = basis_linear(native, x[-m:].contiguous(), parts)
        torch.set_num_threads(before)
        last_rows.append(out[-1])
        assert torch.equal(out[:, -500:], basis_linear(native, x[-m:].contiguous(), parts[2:]))
    assert all(torch.equal(row, last_rows[0]) for row in last_rows)
    z, y = poisoned(70, 300, dtype=dtype), poisoned(70, 900, dtype=dtype)
    native.linear(x, parts[0].basis, None, z)
    native.linear(z, parts[0].coefficients, parts[0].bias, y)
    assert torch.equal(out[:, :900], y)


@level
def test_basis_linear_keeps_nan_and_infinity(level: str) -> None:
    for dtype in DTYPES:
        part = Part(40, 20, 50, True, dtype, 1)
        x, nan, inf = torch.ones(3, 50, dtype=dtype), int(part.order[2]), int(part.order[30])
        x[1, nan], x[2, inf] = math.nan, math.inf
        out = basis_linear(NATIVE.at(level), x, [part])
        assert out[0].isfinite().all() and out[1].isnan().all() and not out[2].isfinite().any()


@level
@dtype
def test_casts_round_to_nearest_even(level: str, dtype: torch.dtype) -> None:
    bits = torch.arange(0, 1 << 32, 65521, dtype=torch.int64)
    values = torch.cat(
        [bits.to(torch.int32).view(torch.float32), torch.tensor([65504.0, 65519.99, 65520.0, 1e-8, 3e-8])]
    )
    everything = values.to(dtype)  # every kind of number of the dtype, through relu: widened and narrowed unchanged
    out = poisoned(everything.numel(), dtype=dtype)
    NATIVE.at(level).act(everything, "relu", out)
    assert torch.equal(out.nan_to_num(7), everything.relu().nan_to_num(7))
    if level == "scalar":
        return
    half = random(4096, dtype=torch.float32).to(dtype)
    slow, fast = poisoned(4096, dtype=dtype), poisoned(4096, dtype=dtype)
    ones, eps = torch.ones(4096), 0.37
    NATIVE.at("scalar").rms_norm(half[None], ones, eps, slow[None])
    NATIVE.at(level).rms_norm(half[None], ones, eps, fast[None])
    assert (slow != fast).float().mean() < 0.01


@level
@dtype
@pytest.mark.parametrize("m, d", [(1, 1), (1, 576), (3, 33), (130, 515)])
def test_norms(level: str, dtype: torch.dtype, m: int, d: int) -> None:
    native, eps = NATIVE.at(level), 1e-5
    wide = random(m, d + 7, dtype=dtype)
    x, residual = wide[:, :d], random(m, d, dtype=dtype, seed=1)
    weight, bias = random(d, dtype=torch.float32, seed=2), random(d, dtype=torch.float32, seed=3)
    out, total = poisoned(m, d, dtype=dtype), poisoned(m, d, dtype=dtype)

    native.rms_norm(x, weight, eps, out)
    assert_as_good(
        out, F.rms_norm(x.float(), (d,), weight, eps).to(dtype), F.rms_norm(x.double(), (d,), weight.double(), eps)
    )
    native.layer_norm(x.contiguous(), weight, bias, eps, out)
    truth = F.layer_norm(x.double(), (d,), weight.double(), bias.double(), eps)
    assert_as_good(out, F.layer_norm(x.float(), (d,), weight, bias, eps).to(dtype), truth)
    native.add_rms_norm(x.contiguous(), residual, weight, eps, out, total)
    assert torch.equal(total, x + residual)
    truth = F.rms_norm(total.double(), (d,), weight.double(), eps)
    assert_as_good(out, F.rms_norm(total.float(), (d,), weight, eps).to(dtype), truth)
    for shift in (bias, None):
        total = poisoned(m, d, dtype=dtype)
        native.add_layer_norm(x.contiguous(), residual, weight, shift, eps, out, total)
        assert torch.equal(total, x + residual)
        truth = F.layer_norm(total.double(), (d,), weight.double(), None if shift is None else shift.double(), eps)
        assert_as_good(out, F.layer_norm(total.float(), (d,), weight, shift, eps).to(dtype), truth)


@dtype
def test_concat(dtype: torch.dtype) -> None:
    for m, widths in ((1, (5,)), (3, (1, 7, 64)), (40, (300,) * bindings.MOST_PARTS), (0, (2, 3))):
        parts = [random(m, n, dtype=dtype, seed=i) for i, n in enumerate(widths)]
        out = poisoned(m, sum(widths), dtype=dtype)
        NATIVE.concat(parts, out)
        assert torch.equal(out, torch.cat(parts, dim=1))


@level
@dtype
def test_a_tape_plays_what_was_recorded_on_what_its_tensors_hold_by_then(level: str, dtype: torch.dtype) -> None:
    native = NATIVE.at(level)
    parts = [Part(40, 20, 90, True, dtype, 1), Part(30, 9, 90, False, dtype, 2)]
    words = [w for part in parts for w in bindings.basis_words(part.order, part.basis, part.coefficients, part.bias)]
    w, gate, norm = (random(*shape, dtype=dtype, seed=3) for shape in ((90, 70), (64, 70), (90,)))

    def chain(native: bindings.Library, x: torch.Tensor) -> torch.Tensor:
        m = len(x)
        y, wide, normed, total = (torch.empty(m, n, dtype=dtype) for n in (90, 64, 90, 90))
        z, act, both = (torch.empty(m, n, dtype=dtype) for n in (70, 32, 102))
        native.linear(x, w, None, y)
        native.linear(x, gate, None, wide)
        native.gated_act(wide, "silu", act)
        native.add_rms_norm(y, y, norm.float(), 1e-5, normed, total)
        native.basis_linear(normed, words, z)
        native.concat([z, act], both)
        return both

    for m in (1, 2, 5, 33):
        first, second = random(m, 70, dtype=dtype, seed=4), random(m, 70, dtype=dtype, seed=5)
        x, tape = first.clone(), Tape(native)
        with tape.record():
            recording = library.load()
            assert recording.level == level
            out = chain(recording, x)
        assert library.load() is NATIVE
        assert torch.equal(out, chain(native, first))
        x.copy_(second)
        for threads in (1, 2, 3):
            out.fill_(math.nan)
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            tape.play()
            torch.set_num_threads(before)
            assert torch.equal(out, chain(native, second)), (m, threads)


def test_a_tape_of_nothing_can_be_played() -> None:
    tape = Tape(NATIVE)
    with tape.record():
        pass
    tape.play()


def test_what_failed_while_recording_leaves_no_recording_behind() -> None:
    tape = Tape(NATIVE)
    with pytest.raises(ZeroDivisionError), tape.record():
        raise ZeroDivisionError
    assert library.load() is NATIVE
    test_a_tape_of_nothing_can_be_played()


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@level
@dtype
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("m, f", [(1, 1), (2, 1536), (40, 1001)])
def test_activations(level: str, dtype: torch.dtype, kind: str, m: int, f: int) -> None:
    gate_up = 4 * random(m, 2 * f, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    wanted = ACTIVATIONS[kind]
    out = poisoned(m, f, dtype=dtype)
    NATIVE.at(level).gated_act(gate_up, kind, out)
    assert_as_good(out, (wanted(gate.float()) * up.float()).to(dtype), wanted(gate) * up)
    x = gate.to(dtype).contiguous()
    NATIVE.at(level).act(x, kind, out)
    assert_as_good(out, wanted(x.float()).to(dtype), wanted(x.double()))


@level
def test_activations_far_out(level: str) -> None:
    x = torch.tensor([-math.inf, -1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30, math.nan] * 3)
    for kind in ("silu", "gelu_new", "gelu"):
        out = poisoned(x.numel(), dtype=torch.float32)
        NATIVE.at(level).act(x, kind, out)
        assert out[8].isnan() and torch.equal(out[4:8], x[4:8]), kind
        assert (out[1:4].abs() < 1e-30).all(), kind


@level
@dtype
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head_dim, rotated", [(64, 64), (64, 16), (80, 80), (24, 6), (8, 0)])
def test_rotary_cache(level: str, dtype: torch.dtype, head_dim: int, rotated: int, normed: bool) -> None:
    tokens, heads, kv_heads, page = 5, 4, 2, 4
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angle = random(tokens, rotated // 2, dtype=torch.float32, seed=1)
    slots = torch.tensor([9, 4, 5, 23, 0])
    k_pool, v_pool = (poisoned(6, page, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    q = poisoned(tokens, heads, head_dim, dtype=dtype)
    norms = tuple(random(head_dim, dtype=torch.float32, seed=s) for s in (2, 3)) if normed else None
    NATIVE.at(level).rotary_cache(qkv, angle.cos(), angle.sin(), k_pool, v_pool, slots, heads, norms, 1e-5, q)

    def turned(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        x = x if norm is None else F.rms_norm(x, (head_dim,), norm.to(x.dtype), 1e-5)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., rotated:]], dim=-1)

    parts = qkv.view(tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    written = (q, k_pool.flatten(0, 1)[slots])
    for ours, part, norm in zip(written, parts, norms or (None, None), strict=False):
        assert_as_good(ours, turned(part.float(), norm).to(dtype), turned(part.double(), norm))
    assert torch.equal(v_pool.flatten(0, 1)[slots], parts[2])
    assert k_pool.isnan().sum() == v_pool.isnan().sum() == (24 - tokens) * kv_heads * head_dim


def attention_truth(
    q: torch.Tensor, k: list[torch.Tensor], v: list[torch.Tensor], lengths: list[int], scale: float, window: int
) -> torch.Tensor:
    """softmax(scale q k^T) v, sequence by sequence, with every mask written out; the last rows are the queries."""
    outputs, row = [], 0
    for keys, values, count in zip(k, v, lengths, strict=True):
        context, group = keys.shape[0], q.shape[1] // keys.shape[1]
        i = torch.arange(context - count, context)[:, None]
        j = torch.arange(context)[None]
        hidden = (j > i) | ((j <= i - window) if window else torch.zeros_like(j > i))
        scores = torch.einsum("qhd,khd->hqk", q[row : row + count] * scale, keys.repeat_interleave(group, 1))
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1)))
        row += count
    return torch.cat(outputs)


@level
@dtype
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, page", [(9, 3, 64, 16), (4, 4, 80, 7), (6, 1, 24, 32), (40, 1, 8, 4)]
)
@pytest.mark.parametrize("window", [0, 1, 50])
def test_paged_attention(
    level: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, page: int, window: int
) -> None:
    lengths, contexts = [1, 40, 1, 7, 1], [1, 40, 1100, 90, 65]  # a first token, a prompt, long decode, chunk, decode
    width = max(math.ceil(c / page) for c in contexts)
    order = torch.randperm(len(contexts) * width, generator=torch.Generator().manual_seed(5)).tolist()
    tables = torch.tensor(order, dtype=torch.int32).view(len(contexts), width)
    k_pool, v_pool = (poisoned(len(order), page, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    k, v = [], []
    for s, context in enumerate(contexts):
        at = torch.arange(context)
        blocks, offsets = tables[s, at // page].long(), at % page
        k.append(random(context, kv_heads, head_dim, dtype=dtype, seed=10 + s))
        v.append(random(context, kv_heads, head_dim, dtype=dtype, seed=20 + s))
        k_pool[blocks, offsets], v_pool[blocks, offsets] = k[-1], v[-1]
    q = random(sum(lengths), heads, head_dim, dtype=dtype)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    lens, scale = torch.tensor(contexts, dtype=torch.int32), head_dim**-0.5

    out = poisoned(*q.shape, dtype=dtype)
    NATIVE.at(level).paged_attention(q, k_pool, v_pool, starts, lens, tables, scale, window, out)
    truth = attention_truth(q.double(), [t.double() for t in k], [t.double() for t in v], lengths, scale, window)
    torchs = attention_truth(q.float(), [t.float() for t in k], [t.float() for t in v], lengths, scale, window).to(
        dtype
    )
    assert_as_good(out, torchs, truth)

    one = poisoned(1, heads, head_dim, dtype=dtype)  # the long decode without its company: the same bits
    alone = torch.tensor([0, 1], dtype=torch.int32)
    NATIVE.at(level).paged_attention(q[41:42], k_pool, v_pool, alone, lens[2:3], tables[2:3], scale, window, one)
    assert torch.equal(one[0], out[41])


# --- finding and building ------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, with nothing beside the sources."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PARED_CACHE", str(folder))
    monkeypatch.setattr(library, "BESIDE_THE_SOURCES", tmp_path / "nothing")
    return folder


@pytest.fixture
def quick_compiler(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$CXX is a script that gives out this process's library for everything; the file returned notes each call."""
    script, calls = tmp_path / "quick", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho called >> "{calls}"\nfor last; do :; done\ncp "{NATIVE.path}" "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return calls


def works(native: bindings.Library | None) -> bool:
    out = poisoned(1, 1, dtype=torch.float32)
    assert native is not None
    native.linear(torch.full((1, 8), 2.0), torch.ones(1, 8), None, out)
    return out.item() == 16


def test_processes_that_build_at_once_leave_one_library_and_nothing_else(quick_compiler: Path, cache: Path) -> None:
    code = f"from pared.kernels.native import build; print(build.compile_library({str(cache)!r}))"
    command = [sys.executable, "-P", "-c", code]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    library_file = cache / build.file_name()
    assert [builder.communicate()[0].strip() for builder in builders] == [str(library_file)] * 3
    assert list(cache.iterdir()) == [library_file]
    assert build.intact(library_file)
    assert works(bindings.Library(library_file))
    objects = len(list(build.SOURCES.glob("*.cpp")))
    assert quick_compiler.read_text().count("called") == 3 * (objects + 1)


def test_built_once_then_found(quick_compiler: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(library.find_or_build()[0])
    assert [path.name for path in cache.iterdir()] == [build.file_name()]
    quick_compiler.unlink()
    assert works(library.find_or_build()[0])
    monkeypatch.setattr(library, "BESIDE_THE_SOURCES", cache)
    monkeypatch.setenv("PARED_CACHE", "/nowhere")
    assert works(library.find_or_build()[0])
    assert not quick_compiler.exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "sealed nonsense"])
def test_a_damaged_library_is_built_again(quick_compiler: Path, cache: Path, damage: str) -> None:
    whole = NATIVE.path.read_bytes()
    nonsense = b"no library at all"
    middle = len(whole) // 2
    content = {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "sealed nonsense": nonsense + hashlib.sha256(nonsense).digest(),
    }[damage]
    cache.mkdir()
    (cache / build.file_name()).write_bytes(content)
    assert works(library.find_or_build()[0])
    assert quick_compiler.exists()
    assert build.intact(cache / build.file_name())


def test_a_cache_that_cannot_be_written(quick_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file where the cache's parent should be")
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "file" / "cache"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    native, reason = library.find_or_build()
    assert works(native)
    assert reason == ""
    assert list(temporary.iterdir()) == []  # loaded, and its file is gone


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    native, reason = library.find_or_build()
    assert native is None
    assert "g++" in reason
    assert "set CXX" in reason
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("command, said", [("no-such-compiler -x", "no-such-compiler"), ("false", "ended with 1")])
def test_a_compiler_that_fails(cache: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str) -> None:
    monkeypatch.setenv("CXX", command)
    native, reason = library.find_or_build()
    assert native is None
    assert said in reason
    assert list(cache.iterdir()) == []


def test_the_name_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (*build.SOURCES.glob("*.cpp"), *build.SOURCES.glob("*.h")):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    here = build.file_name()
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.file_name() == here
    with (tmp_path / "linear.h").open("a") as file:
        file.write("// one more line\n")
    assert build.file_name() != here


def test_a_level_that_this_cpu_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    held = NATIVE.at("scalar")
    monkeypatch.setattr(held, "_best", 0)
    with pytest.raises(ValueError, match="runs up to scalar, not avx2"):
        held.at("avx2")
