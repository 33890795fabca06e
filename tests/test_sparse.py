"""bitmap and two_four beyond their contract: bytes written by hand, damaged tensors, what pack chooses, and the native
kernels at every level that this CPU has."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pared.converters.layout import encode_linear
from pared.errors import FolderDamaged, SourceError, WrongShape
from pared.kernels import bitmap, masked, two_four
from pared.kernels.native import library
from pared.kernels.native.tape import Tape
from pared.kernels.unit import Packed, Unit
from pared.runtime import graphs
from pared.tests.test_native import NATIVE, dtype, level, poisoned, random
from pared.tests.truth import assert_as_good

native = pytest.mark.skipif(NATIVE is None, reason=f"nothing to test here: {library.why_not()}")

PATTERNS = ("half", "4:8", "2:4", "rows")


def weight_of(pattern: str, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random weights with zeros: about half of them, N of every M, or every third row and no other."""
    dense, chance = random(n, k, dtype=torch.float32), torch.rand(n, -(-k // 8) * 8, generator=torch.manual_seed(1))
    if pattern == "rows":
        dense[::3] = 0
    elif pattern == "half":
        dense[chance[:, :k] < 0.5] = 0
    else:
        of = int(pattern[-1])
        dense[chance.view(n, -1, of).argsort(dim=2).flatten(1)[:, :k] >= of // 2] = 0
    return dense.to(dtype)


def unit_of(weight: torch.Tensor, **others: torch.Tensor) -> Unit:
    return Unit({"a.b": (weight.shape[0], weight.shape[1])}, {"weight": weight, **others})


def bytes_of(packed: Packed, role: str) -> str:
    return packed.tensors[role].contiguous().view(torch.uint8).numpy().tobytes().hex(" ", 2 if role == "values" else 1)


# --- on disk ----------------------------------------------------------------------------------------


def test_golden_bytes_of_a_bitmap() -> None:
    weight = torch.zeros(3, 10, dtype=torch.bfloat16)
    weight[0, 0], weight[0, 3], weight[0, 8], weight[2, 9], weight[2, 1] = 1.0, -2.0, math.inf, math.nan, -0.0
    packed = bitmap.encode(unit_of(weight))
    assert (bitmap.VERSION, packed.params, packed.tensors["bits"].shape) == (1, {}, (3, 2))
    assert bytes_of(packed, "bits") == "09 01 00 00 02 02"
    assert bytes_of(packed, "values") == "803f 00c0 807f 0080 c07f"


def test_golden_bytes_of_two_four() -> None:
    weight = torch.zeros(2, 10, dtype=torch.bfloat16)
    weight[0, 1], weight[0, 3], weight[0, 4], weight[0, 8] = 1.0, -2.0, 0.5, 3.0
    weight[1, 0], weight[1, 3], weight[1, 7], weight[1, 9] = -1.0, 2.0, -0.5, -0.0
    packed = two_four.encode(unit_of(weight))
    assert (two_four.VERSION, packed.params) == (1, {})
    assert [tuple(packed.tensors[role].shape) for role in ("values", "positions")] == [(2, 6), (2, 2)]
    assert bytes_of(packed, "positions") == "4d 04 cc 04"
    assert bytes_of(packed, "values") == "803f 00c0 003f 0000 4040 0000 80bf 0040 0000 00bf 0000 0080"


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 31, 34, 40])
def test_two_four_takes_any_number_of_inputs(k: int) -> None:
    weight = weight_of("2:4", 9, k)
    packed = two_four.encode(unit_of(weight))
    assert torch.equal(two_four.decode(packed).tensors["weight"], weight)
    x = random(3, k, dtype=torch.bfloat16)
    y = two_four.apply(x, two_four.prepare(packed, "cpu"), "a.b")
    assert_as_good(y, F.linear(x, weight), F.linear(x.double(), weight.double()))


def test_a_violated_group_is_named() -> None:
    weight = weight_of("2:4", 40, 70)
    weight[31, 36:40] = torch.tensor([1.0, 0, 2.0, 3.0])
    with pytest.raises(ValueError, match="row 31, columns 36 to 39"):
        two_four.encode(unit_of(weight))
    weight[31, 36:40], weight[7, 68:] = 0, 1
    assert two_four.fits(unit_of(weight)) is None
    weight[7, 64:68] = 1
    with pytest.raises(SourceError, match="row 7, columns 64 to 67"):
        encode_linear(unit_of(weight), "two_four", transposed=False)


@pytest.mark.parametrize("module", [bitmap, two_four], ids=lambda module: module.NAME)
def test_foreign_units_are_refused(module) -> None:
    weight = weight_of("2:4", 8, 64)
    for unit, why in (
        (Unit({"m": (8, 64)}, {"weight": weight, "scale": weight}), "scale"),
        (unit_of(weight.double()), "float64"),
        (unit_of(weight, bias=torch.zeros(8)), "float32"),
        (unit_of(weight, bias=torch.zeros(7, dtype=weight.dtype)), r"\(7,\)"),
        (Unit({"m": (8, 65)}, {"weight": weight}), "65"),
    ):
        with pytest.raises(ValueError, match=why):
            module.encode(unit)
    prepared = module.prepare(module.encode(unit_of(weight)), "cpu")
    for x in (weight[:, :63], weight.float(), weight.t().contiguous().t(), weight[0]):
        with pytest.raises(ValueError, match=r"\[M, 64\]"):
            module.apply(x, prepared, "a.b")


def damaged(packed: Packed, **tensors: torch.Tensor) -> Packed:
    return replace(packed, tensors=packed.tensors | tensors)


@pytest.mark.parametrize("use", ["decode", "prepare"])
def test_a_damaged_bitmap_is_refused(use: str) -> None:
    packed = bitmap.encode(unit_of(weight_of("half", 6, 70)))
    bits, values = packed.tensors["bits"], packed.tensors["values"]
    behind = bits.clone()
    behind[4, -1] |= 0x80
    for changed, error, why in (
        ({"bits": bits[:-1]}, WrongShape, r"bits \[6, 9\]"),
        ({"bits": bits[:, :-1]}, WrongShape, r"bits \[6, 9\]"),
        ({"bits": bits.to(torch.int8)}, WrongShape, "int8"),
        ({"values": values[:-1]}, WrongShape, rf"{len(values)} weights .* \({len(values) - 1},\)"),
        ({"values": torch.cat([values, values])}, WrongShape, "marked as kept"),
        ({"bits": torch.full_like(bits, 255)}, WrongShape, "432 weights"),
        ({"bits": behind, "values": values[: int(masked.counts(behind).sum())]}, WrongShape, "marked"),
        ({"bits": behind, "values": torch.cat([values, values[:1]])}, FolderDamaged, "behind column 70"),
    ):
        with pytest.raises(error, match=why) as raised:
            getattr(bitmap, use)(damaged(packed, **changed), *(["cpu"] if use == "prepare" else []))
        assert "a.b" in str(raised.value)


@pytest.mark.parametrize("use", ["decode", "prepare"])
def test_a_damaged_two_four_is_refused(use: str) -> None:
    packed = two_four.encode(unit_of(weight_of("2:4", 6, 70)))
    values, positions = packed.tensors["values"], packed.tensors["positions"]
    same, turned, empty, tail = (positions.clone() for _ in range(4))
    same[3, 2], turned[5, 0], empty[0, 7] = 0x5E, 0x41, 0x04
    tail[2, -1], weights = 0x80 | positions[2, -1] & 0x0F, values.clone()
    weights[2, -1] = 1
    for changed, error, why in (
        ({"values": values[:, :-1]}, WrongShape, r"values \[6, 36\]"),
        ({"values": values.flatten()}, WrongShape, r"values \[6, 36\]"),
        ({"positions": positions[:, :-1]}, WrongShape, r"positions \[6, 9\]"),
        ({"positions": positions.int()}, WrongShape, "int32"),
        ({"positions": same}, FolderDamaged, "row 3, columns 16 to 23"),
        ({"positions": turned}, FolderDamaged, "row 5, columns 0 to 7"),
        ({"positions": empty}, FolderDamaged, "row 0, columns 56 to 63"),
        ({"positions": tail, "values": weights}, FolderDamaged, "behind column 70"),
    ):
        with pytest.raises(error, match=why) as raised:
            getattr(two_four, use)(damaged(packed, **changed), *(["cpu"] if use == "prepare" else []))
        assert "a.b" in str(raised.value)


# --- which one is chosen, and what it weighs ----------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "format"), [("2:4", "two_four"), ("4:8", "bitmap"), ("half", "bitmap"), ("rows", "bitmap")]
)
@pytest.mark.parametrize("k", [64, 1030, 4096])
def test_pack_takes_what_reads_least(pattern: str, format: str, k: int) -> None:
    weight = weight_of(pattern, 64, k)
    packed = encode_linear(unit_of(weight), None, transposed=False)
    assert packed.format == format
    assert torch.equal((bitmap if format == "bitmap" else two_four).weight(packed, "a.b"), weight)


@pytest.mark.parametrize("pattern", ["2:4", "half"])
def test_zeros_that_a_mask_left_with_a_sign_are_zeros(pattern: str) -> None:
    weight = weight_of(pattern, 64, 64)
    signed = torch.where(weight == 0, torch.full_like(weight, -0.0), weight)
    packed = encode_linear(unit_of(signed), None, transposed=False)
    assert packed.format == ("two_four" if pattern == "2:4" else "bitmap")
    assert torch.equal(
        packed.tensors["values"], encode_linear(unit_of(weight), None, transposed=False).tensors["values"]
    )
    kept = encode_linear(unit_of(signed), "dense", transposed=False)
    assert torch.signbit(kept.tensors["weight"][signed == 0]).all()


def test_few_zeros_stay_dense() -> None:
    weight = torch.ones(40, 64, dtype=torch.bfloat16)
    weight[:, ::16] = 0
    assert encode_linear(unit_of(weight), None, transposed=False).format == "dense"
    with pytest.raises(SourceError, match=r"6\.2%"):
        encode_linear(unit_of(weight), "bitmap", transposed=False)


@pytest.mark.parametrize("module", [bitmap, two_four], ids=lambda module: module.NAME)
def test_half_of_the_weights_are_nine_sixteenths_of_the_bytes(module) -> None:
    weight = weight_of("2:4", 256, 4096)
    packed = module.encode(unit_of(weight))
    assert sum(tensor.nbytes for tensor in packed.tensors.values()) == weight.nbytes * 9 // 16
    assert 0.5625 < module.traffic(packed, 1).weight_bytes / weight.nbytes < 0.5625 * 1.01


def test_words_that_are_equally_full_are_found() -> None:
    for pattern, per_word in (("2:4", 16), ("4:8", 16), ("half", 0)):
        assert laid_out(weight_of(pattern, 20, 70))[3] == per_word
    parts = [
        (bitmap.prepare(bitmap.encode(Unit({name: (20, 64)}, {"weight": weight_of(pattern, 20, 64)})), "cpu"), name)
        for name, pattern in (("q", "4:8"), ("k", "half"))
    ]
    for picked, per_word in (([0, 0], 16), ([0, 1], 0)):
        stacked = bitmap.stack([parts[i] for i in picked])
        assert stacked is not None and stacked.ints == (40, 64, per_word)


def test_what_does_not_match_is_not_stacked() -> None:
    def prepared(k: int, dtype: torch.dtype, **bias: torch.Tensor):
        return bitmap.prepare(bitmap.encode(unit_of(weight_of("half", 20, k, dtype), **bias)), "cpu"), "a.b"

    one = prepared(64, torch.bfloat16)
    for other in (
        prepared(96, torch.bfloat16),
        prepared(64, torch.float16),
        prepared(64, torch.bfloat16, bias=torch.zeros(20, dtype=torch.bfloat16)),
    ):
        assert bitmap.stack([one, other]) is None


def test_slices_are_the_slices_of_the_weight() -> None:
    weight = weight_of("2:4", 10, 70)
    bias = random(10, dtype=torch.bfloat16)
    for module in (bitmap, two_four):
        packed = module.encode(unit_of(weight, bias=bias))
        for dim, cuts in ((0, [(0, 1), (3, 10)]), (1, [(0, 4), (8, 24), (12, 40), (36, 70), (4, 8)])):
            for start, stop in cuts:
                part = module.slice(packed, "a.b", dim, start, stop)
                rows, columns = ((start, stop), (0, 70)) if dim == 0 else ((0, 10), (start, stop))
                assert torch.equal(module.weight(part, "a.b"), weight[slice(*rows), slice(*columns)])
                assert ("bias" in part.tensors) == (dim == 0 or start == 0)
        with pytest.raises(ValueError, match="70"):
            module.slice(packed, "a.b", 1, 0, 71)
    assert torch.equal(bitmap.weight(bitmap.slice(packed_bitmap(weight), "a.b", 1, 3, 29), "a.b"), weight[:, 3:29])
    for start, stop in ((2, 8), (4, 9)):
        with pytest.raises(ValueError, match="multiples of 4"):
            two_four.slice(packed, "a.b", 1, start, stop)


def packed_bitmap(weight: torch.Tensor) -> Packed:
    return bitmap.encode(unit_of(weight))


# --- native kernels ---------------------------------------------------------------------------------


def laid_out(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    bits, values = masked.to_bits(masked.kept(weight)), weight[masked.kept(weight)]
    prepared = masked.lay_out("", {"m": (weight.shape[0], weight.shape[1])}, bits, values, None, "cpu")
    return *prepared.tensors[:3], prepared.ints[2]


@native
@level
@dtype
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_sparse_linear_gives_the_bits_of_a_dense_one(level: str, dtype: torch.dtype, pattern: str) -> None:
    """Alone and in company, so that neither rows nor threads change a result where they do not in a dense one."""
    at, before = NATIVE.at(level), torch.get_num_threads()
    for n, k in ((1, 1), (1, 40), (5, 33), (16, 64), (33, 70), (130, 515)):
        w = weight_of(pattern, n, k, dtype)
        laid = laid_out(w)
        for m in (1, 2, 7, 17, 66, 530):
            x, bias = random(m, k, dtype=dtype, seed=2), random(n, dtype=dtype, seed=3)
            for shift, to in ((bias, dtype), (None, dtype), (bias.float(), torch.float32)):
                found, wanted = poisoned(m, n, dtype=to), poisoned(m, n, dtype=to)
                torch.set_num_threads(1 + m % 3)
                at.sparse_linear(x, *laid[:3], shift, laid[3], found)
                torch.set_num_threads(before)
                at.linear(x, w, shift, wanted)
                assert torch.equal(found, wanted), (n, k, m)


@native
@level
@dtype
def test_spread_rows_are_the_weight(level: str, dtype: torch.dtype) -> None:
    for pattern in PATTERNS:
        for n, k in ((1, 1), (3, 33), (50, 64), (20, 515)):
            weight = weight_of(pattern, n, k, dtype)
            weight.flatten()[:: k + 1] = -0.0
            masks, values, starts, _ = laid_out(weight)
            for first, stop in ((0, n), (n // 2, n), (0, (n + 1) // 2)):
                out = poisoned(stop - first, k, dtype=dtype)
                NATIVE.at(level).spread(masks, values, starts, first, out)
                assert torch.equal(masked.kept(out), masked.kept(weight[first:stop]))
                assert torch.equal(out, weight[first:stop])


@native
@level
@dtype
def test_a_sparse_linear_keeps_nan_and_infinity(level: str, dtype: torch.dtype) -> None:
    w = weight_of("half", 40, 70, dtype)
    w[3, 69], w[7, 0], w[20] = math.inf, math.nan, 0
    x, laid = torch.ones(3, 70, dtype=dtype), laid_out(w)
    for m in (1, 3):
        out = poisoned(m, 40, dtype=dtype)
        NATIVE.at(level).sparse_linear(x[:m], *laid[:3], None, laid[3], out)
        assert (out[:, 3] == math.inf).all() and out[:, 7].isnan().all() and not out[:, 20].any()
        assert out[:, [*range(3), *range(4, 7), *range(8, 40)]].isfinite().all()


@native
@level
def test_a_tape_plays_sparse_calls(level: str) -> None:
    at = NATIVE.at(level)
    w, laid = weight_of("half", 300, 90), laid_out(weight_of("half", 300, 90))
    for m in (1, 5, 33):
        first, second = random(m, 90, dtype=w.dtype, seed=4), random(m, 90, dtype=w.dtype, seed=5)
        x, out, wanted, tape = first.clone(), *(poisoned(m, 300, dtype=w.dtype) for _ in range(2)), Tape(at)
        with tape.record():
            library.load().sparse_linear(x, *laid[:3], None, laid[3], out)
        x.copy_(second)
        tape.play()
        at.linear(second, w, None, wanted)
        assert torch.equal(out, wanted)


@native
@level
@dtype
def test_whatever_a_step_may_record_is_native(level: str, dtype: torch.dtype) -> None:
    at = NATIVE.at(level)
    assert at.sparse_rows(dtype) >= min(graphs.LARGEST, at.linear_rows(dtype, 1))


@native
@dtype
@pytest.mark.parametrize("m", [600])
def test_many_rows_meet_a_weight_that_is_made_dense_part_by_part(dtype: torch.dtype, m: int, monkeypatch) -> None:
    monkeypatch.setattr(masked, "SPREAD_BYTES", 40 * 130 * dtype.itemsize)
    weight, bias = weight_of("half", 130, 130, dtype), random(130, dtype=dtype, seed=1)
    prepared, x = bitmap.prepare(bitmap.encode(unit_of(weight, bias=bias)), "cpu"), random(m, 130, dtype=dtype, seed=2)
    truth = F.linear(x.double(), weight.double(), bias.double())
    assert_as_good(bitmap.apply(x, prepared, "a.b"), F.linear(x, weight, bias), truth)
    wide = bitmap.apply(x, prepared, "a.b", wide=True)
    assert_as_good(wide, F.linear(x.float(), weight.float(), bias.float()), truth)


@native
@pytest.mark.parametrize("n, k", [(33, 64), (100, 100), (65, 2048)])
def test_many_rows_get_the_bits_of_few(n: int, k: int) -> None:
    weight, x = weight_of("half", n, k), random(130, k, dtype=torch.bfloat16, seed=2)
    prepared = bitmap.prepare(bitmap.encode(unit_of(weight)), "cpu")
    few = torch.cat([bitmap.apply(part, prepared, "a.b") for part in x.split(16)])
    rows = library.load().sparse_rows(x.dtype)
    for m in (m for m in (33, 65, 130) if m <= rows):
        assert torch.equal(bitmap.apply(x[:m], prepared, "a.b"), few[:m])


@native
def test_a_matrix_of_zeros_has_no_values(monkeypatch) -> None:
    packed = bitmap.encode(unit_of(torch.zeros(20, 64, dtype=torch.bfloat16)))
    assert packed.tensors["values"].numel() == 0
    for m in (1, 3, 100):
        x = random(m, 64, dtype=torch.bfloat16)
        assert not bitmap.apply(x, bitmap.prepare(packed, "cpu"), "a.b").any()


@pytest.mark.filterwarnings("ignore::pared.kernels.dispatch.SlowerPath")
@pytest.mark.parametrize("module", [bitmap, two_four], ids=lambda module: module.NAME)
def test_without_native_kernels_torch_multiplies(module, monkeypatch) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    weight, x = weight_of("2:4", 33, 70, torch.float32), random(3, 70, dtype=torch.float32)
    prepared = module.prepare(module.encode(unit_of(weight)), "cpu")
    for wide in (False, True):
        torch.testing.assert_close(module.apply(x, prepared, "a.b", wide), F.linear(x, weight))
