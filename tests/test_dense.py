"""dense beyond the contract: bytes written by hand, the transposed layout, its paths and its refusals."""

from __future__ import annotations

import pytest
import torch

from pared.errors import FallbackRefused
from pared.kernels import dense, dispatch
from pared.kernels.native import library
from pared.kernels.unit import Unit
from pared.tests.truth import assert_as_good, poisoned

SLOWER = "ignore::pared.kernels.dispatch.SlowerPath"


def unit_of(n: int, k: int, dtype: torch.dtype = torch.float32, bias: bool = False, name: str = "m") -> Unit:
    tensors = {"weight": torch.randn(n, k).to(dtype)}
    return Unit({name: (n, k)}, {**tensors, "bias": torch.randn(n).to(dtype)} if bias else tensors)


def test_golden_bytes():
    unit = Unit(
        {"m": (2, 3)},
        {
            "weight": torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.0]], dtype=torch.bfloat16),
            "bias": torch.tensor([256.0, -1.0], dtype=torch.bfloat16),
        },
    )
    plain = bytes.fromhex("803f 00c0 003f 0000 4040 0080")
    turned = bytes.fromhex("803f 0000 00c0 4040 003f 0080")
    for params, shape, weight in (({}, (2, 3), plain), ({"transposed": True}, (3, 2), turned)):
        packed = dense.encode(unit, **params)
        assert packed.params == params
        assert packed.tensors["weight"].shape == shape
        assert packed.tensors["weight"].view(torch.uint8).numpy().tobytes() == weight
        assert packed.tensors["bias"].view(torch.uint8).numpy().tobytes() == bytes.fromhex("8043 80bf")
        assert torch.equal(
            dense.decode(packed).tensors["weight"].view(torch.int16), unit.tensors["weight"].view(torch.int16)
        )


@pytest.mark.filterwarnings(SLOWER)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_transposed_layout_multiplies_alike(rows):
    units = [unit_of(5, 7, bias=True, name="a"), unit_of(6, 7, bias=True, name="b")]
    packs = [dense.encode(unit, transposed=True) for unit in units]
    stacked = dense.stack([(dense.prepare(packed, "cpu"), path) for packed, path in zip(packs, "ab", strict=True)])
    assert stacked is not None
    assert stacked.outputs == {"a": (5, 6)}
    x = torch.randn(rows, 7)
    with poisoned():
        y = dense.apply(x, stacked, "a")
    own = torch.cat([torch.nn.functional.linear(x, u.tensors["weight"], u.tensors["bias"]) for u in units], dim=1)
    truth = torch.cat(
        [x.double() @ u.tensors["weight"].double().t() + u.tensors["bias"].double() for u in units], dim=1
    )
    assert_as_good(y, own, truth)
    shard = dense.slice(packs[1], "b", 1, 2, 7)
    assert shard.tensors.keys() == {"weight"}
    assert torch.equal(dense.decode(shard).tensors["weight"], units[1].tensors["weight"][:, 2:])


def test_stack_refuses_what_differs():
    base, *others = (
        dense.prepare(dense.encode(unit), "cpu")
        for unit in (unit_of(4, 8), unit_of(4, 7), unit_of(4, 8, torch.bfloat16), unit_of(4, 8, bias=True))
    )
    assert all(dense.stack([(base, "m"), (other, "m")]) is None for other in others)


def test_prepare_copies_nothing_that_lies_right():
    packed = dense.encode(unit_of(4, 8, bias=True))
    weight, bias = dense.prepare(packed, "cpu").tensors
    assert weight is not None
    assert bias is not None
    assert weight.data_ptr() == packed.tensors["weight"].data_ptr()
    assert bias.data_ptr() == packed.tensors["bias"].data_ptr()


@pytest.mark.parametrize(
    ("modules", "tensors", "says"),
    [
        ({"m": (2, 3)}, {"weight": torch.zeros(3, 2)}, r"\(3, 2\)"),
        ({"m": (2, 3)}, {"weight": torch.zeros(2, 3, dtype=torch.float64)}, "float64"),
        ({"m": (2, 3)}, {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, r"\(3,\)"),
        ({"m": (2, 3)}, {"weight": torch.zeros(2, 3), "bias": torch.zeros(2).half()}, "float16"),
        ({"m": (2, 3)}, {"weight": torch.zeros(2, 3), "router": torch.zeros(2)}, "router"),
        ({"m": (2, 3)}, {"bias": torch.zeros(2)}, "bias"),
        ({"a": (1, 3), "b": (1, 2)}, {"weight": torch.zeros(2, 3)}, r"\(1, 2\)"),
    ],
)
def test_what_does_not_fit_is_told(modules, tensors, says):
    unit = Unit(modules, tensors)
    with pytest.raises(ValueError, match=says):
        dense.encode(unit)


@pytest.mark.filterwarnings(SLOWER)
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(2, 5), r"\(2, 5\)"),
        (torch.zeros(2, 4, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(4, 2).t(), r"strides \(1, 2\)"),
        (torch.zeros(4), r"\(4,\)"),
    ],
)
def test_wrong_rows_are_refused_with_the_numbers(x, says):
    prepared = dense.prepare(dense.encode(unit_of(3, 4)), "cpu")
    with pytest.raises(ValueError, match=says):
        dense.apply(x, prepared, "m")


@pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter takes the Triton path")
def test_without_the_native_library_torch_runs_and_is_counted(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "why_not", lambda: "none for this test")
    monkeypatch.setattr(dispatch, "FALLBACKS", type(dispatch.FALLBACKS)())
    prepared = dense.prepare(dense.encode(unit_of(3, 4)), "cpu")
    with pytest.warns(dispatch.SlowerPath, match="none for this test"):
        dense.apply(torch.zeros(1, 4), prepared, "m")
    assert dispatch.FALLBACKS == {("linear", "none for this test"): 1}
    with dispatch.strict(), pytest.raises(FallbackRefused, match="none for this test"):
        dense.apply(torch.zeros(1, 4), prepared, "m")


@pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter takes the Triton path")
def test_the_threshold_decides_between_native_and_torch(monkeypatch):
    calls = []

    class Native:
        def linear_rows(self, dtype, inputs):
            return 4

        def linear(self, x, w, bias, out):
            calls.append(x.shape[0])
            out.copy_(torch.nn.functional.linear(x, w, bias))

    monkeypatch.setattr(library, "load", Native)
    prepared = dense.prepare(dense.encode(unit_of(3, 4)), "cpu")
    with dispatch.strict():
        for rows in (1, 4, 5, 64):
            dense.apply(torch.zeros(rows, 4), prepared, "m")
    assert calls == [1, 4]
    dense.apply(torch.zeros(9, 4), prepared, "m", wide=True)
    assert calls == [1, 4, 9]


@pytest.mark.filterwarnings(SLOWER)
@pytest.mark.parametrize("rows", [0, 1, 5, 70, 300])
@pytest.mark.parametrize("dtype", dense.DTYPES, ids=str)
def test_a_wide_result_is_not_rounded(rows, dtype):
    """Compared with the product of the same rounded numbers in fp32; a CPU without vectors rounds all the same."""
    unit = Unit({"m": (50, 33)}, {"weight": torch.randn(50, 33).to(dtype), "bias": torch.randn(50).to(dtype)})
    prepared, x = dense.prepare(dense.encode(unit), "cpu"), torch.randn(rows, 33).to(dtype)
    with poisoned():
        wide, narrow = (dense.apply(x, prepared, "m", wide) for wide in (True, False))
    truth = torch.nn.functional.linear(x.float(), *(t.float() for t in prepared.tensors))
    assert (wide.dtype, narrow.dtype, wide.shape) == (torch.float32, dtype, truth.shape)
    native = library.load()
    if dispatch.interpreting() or (native is not None and native.linear_rows(dtype, 33)):
        torch.testing.assert_close(wide, truth, rtol=0, atol=1e-5 * 33)
    torch.testing.assert_close(wide.to(dtype), narrow)


@pytest.mark.filterwarnings(SLOWER)
def test_the_op_keeps_the_rules_of_torch_library():
    for bias in (None, torch.randn(3)):
        arguments = (torch.randn(2, 4), torch.randn(3, 4), bias)
        torch.library.opcheck(
            torch.ops.pared.linear.default, (*arguments, True), test_utils=("test_schema", "test_faketensor")
        )
        torch.library.opcheck(torch.ops.pared.linear.default, arguments, test_utils=("test_schema", "test_faketensor"))
