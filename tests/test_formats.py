"""What any format must prove, on its own cases: exact storage, right products, honest bytes.

tests/test_triton_interpret.py runs this file a second time, through the Triton kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from pared.kernels import bitmap, dense, formats, int8, routed_ffn, two_four
from pared.kernels.around import reference
from pared.kernels.dispatch import interpreting
from pared.kernels.unit import Around, Packed, Unit
from pared.runtime.accounting import WeightSpy
from pared.tests.truth import assert_as_good, poisoned

pytestmark = pytest.mark.filterwarnings("ignore::pared.kernels.dispatch.SlowerPath")

ROWS = (1, 2, 3, 7, 16, 33, 64, 130)


def dtype_of(unit: Unit) -> torch.dtype:
    """Of activations: that of the weights, or bf16 where weights are integers."""
    dtype = next(iter(unit.tensors.values())).dtype
    return dtype if dtype.is_floating_point else torch.bfloat16


def outputs_of(unit: Unit) -> int:
    return next(iter(unit.modules.values()))[0]


EVERY = [
    pytest.param(module, unit, id=f"{module.NAME}-{i}")
    for module in formats.FORMATS
    for i, unit in enumerate(module.cases())
]
every_case = pytest.mark.parametrize(("module", "unit"), EVERY)
every_linear_case = pytest.mark.parametrize(
    ("module", "unit"), [case for case in EVERY if case.values[0] in formats.LINEAR]
)
# Whose rounding is no luck: fp32, and of the half types what has outputs enough.
every_telling_case = pytest.mark.parametrize(
    ("module", "unit"),
    [
        case
        for case in EVERY
        if case.values[0] in formats.LINEAR
        and (unit := case.values[1])
        and (dtype_of(unit) == torch.float32 or outputs_of(unit) > 99)
    ],
)


def inputs(unit: Unit, rows: int, seed: int = 0) -> torch.Tensor:
    k = next(iter(unit.modules.values()))[1]
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(dtype_of(unit))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def check_apply(module, prepared, parts: list[tuple[Packed, str]], x: torch.Tensor) -> None:
    """`apply` under the first path against the references of all parts side by side."""
    first = parts[0][1]
    assert prepared.outputs[first] == tuple(packed.modules[path][0] for packed, path in parts)
    with poisoned():
        y = module.apply(x, prepared, first)
    own = torch.cat([module.reference(x, packed, path) for packed, path in parts], dim=1)
    truth = torch.cat([module.reference(x.float(), packed, path) for packed, path in parts], dim=1)
    assert_as_good(y, own, truth, rounds_inside=module not in formats.LINEAR)


def test_names_are_unique_and_found():
    names = [module.NAME for module in formats.FORMATS]
    assert len(set(names)) == len(names)
    assert [formats.by_name(name) for name in names] == list(formats.FORMATS)
    with pytest.raises(KeyError, match="dense"):
        formats.by_name("dens")


@every_case
def test_storage_is_exact(module, unit):
    assert module.fits(unit) is None
    packed = module.encode(unit)
    assert (packed.format, packed.version) == (module.NAME, module.VERSION)
    assert json.loads(json.dumps(packed.params)) == packed.params
    assert all(tensor.is_contiguous() for tensor in packed.tensors.values())
    decoded = module.decode(packed)
    assert (decoded.modules, decoded.params) == (unit.modules, unit.params)
    assert decoded.tensors.keys() == unit.tensors.keys()
    for name, tensor in unit.tensors.items():
        assert decoded.tensors[name].dtype == tensor.dtype
        assert torch.equal(bits(decoded.tensors[name]), bits(tensor))


@every_case
def test_nan_infinity_and_signed_zero_survive(module, unit):
    tensors = {name: tensor.clone() for name, tensor in unit.tensors.items()}
    odd = torch.tensor([float("nan"), float("inf"), -0.0])
    for tensor in tensors.values():
        if tensor.is_floating_point():
            flat = tensor.view(-1)[:3]
            flat.copy_(odd[: flat.numel()])
    special = Unit(unit.modules, tensors, unit.params)
    if module.fits(special) is None:
        decoded = module.decode(module.encode(special))
        assert all(torch.equal(bits(decoded.tensors[name]), bits(tensors[name])) for name in tensors)


@pytest.mark.parametrize("rows", ROWS)
@every_case
def test_apply_is_as_good_as_torch(module, unit, rows):
    packed = module.encode(unit)
    prepared = module.prepare(packed, "cpu")
    assert list(prepared.outputs) == list(unit.modules)
    for path in unit.modules:
        check_apply(module, prepared, [(packed, path)], inputs(unit, rows))


def around_of(kind: str, rows: int, k: int, n: int, dtype: torch.dtype) -> Around:
    generator = torch.Generator().manual_seed(3)
    norm = torch.rand(k, generator=generator) + 0.5 if "norm" in kind else None
    residual = torch.randn(rows, n, generator=generator).to(dtype) if "residual" in kind else None
    return Around(norm, 1e-5, "silu" if "gated" in kind else None, residual)


def in_the_order_of_kernels(x: torch.Tensor, linear: Callable, around: Around) -> torch.Tensor:
    """torch's own, with the norm's weight ahead of the linear and its 1 / rms behind: the same values are rounded."""
    if around.norm is None:
        return reference(x, linear, around)
    scale = (x.float().square().mean(1, keepdim=True) + around.eps).rsqrt()
    weighted = (x.float() * around.norm).to(x.dtype)
    return reference(weighted, lambda x: (linear(x).float() * scale).to(x.dtype), around._replace(norm=None))


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("kind", ["norm", "norm, gated", "residual", "norm, gated, residual"])
@every_telling_case
def test_what_stands_around_is_as_good_as_step_by_step(module, unit, rows, kind):
    """In the launches of the linear itself where Triton runs; a CPU takes it step by step."""
    packed, path, dtype = module.encode(unit), list(unit.modules)[-1], dtype_of(unit)
    prepared, (n, k) = module.prepare(packed, "cpu"), unit.modules[path]
    if "gated" in kind:
        prepared = module.stack([(prepared, path)] * 2)

    def linear(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([module.reference(x, packed, path)] * len(prepared.outputs[path]), dim=1)

    found = []
    for seed in range(4):
        x, around = inputs(unit, rows, seed), around_of(kind, rows, k, n, dtype)
        with poisoned():
            y = module.apply_around(x, prepared, path, around)
        if not interpreting() or rows > dense.WHOLE_ROWS[dtype]:
            assert y is None
            return
        if y is None:  # made for the head, or too little range for x times the norm's weight
            assert module is int8 or (dtype == torch.float16 and around.norm is not None)
            return
        wide = around._replace(residual=None if around.residual is None else around.residual.float())
        found.append((y, in_the_order_of_kernels(x, linear, around), reference(x.float(), linear, wide)))
    assert_as_good(*(torch.cat(tensors) for tensors in zip(*found, strict=True)), rounds_inside=True)


@every_case
def test_no_rows_give_no_rows(module, unit):
    packed = module.encode(unit)
    first = next(iter(unit.modules))
    y = module.apply(inputs(unit, 0), module.prepare(packed, "cpu"), first)
    assert y.shape == (0, unit.modules[first][0])


@every_linear_case
def test_stacked_units_give_their_outputs_side_by_side(module, unit):
    packed = module.encode(unit)
    prepared = module.prepare(packed, "cpu")
    last = list(unit.modules)[-1]
    stacked = module.stack([(prepared, last)] * 3)
    assert list(stacked.outputs) == [last]
    for rows in (1, 5, 40):
        check_apply(module, stacked, [(packed, last)] * 3, inputs(unit, rows))


@every_linear_case
def test_slices_of_outputs_concatenate_and_slices_of_inputs_add_up(module, unit):
    packed = module.encode(unit)
    path, (n, k) = next(iter(unit.modules.items()))
    x = inputs(unit, 4).float()
    whole = module.reference(x, packed, path)
    if n > 1:
        cuts = [(0, n // 2), (n // 2, n)]
        parts = [module.slice(packed, path, 0, *cut) for cut in cuts]
        assert [part.modules[path] for part in parts] == [(stop - start, k) for start, stop in cuts]
        joined = torch.cat([module.reference(x, part, path) for part in parts], dim=1)
        torch.testing.assert_close(joined, whole, rtol=0, atol=1e-5)
    if k > 1 and "pivots" not in unit.tensors:
        cuts = [(0, k // 2), (k // 2, k)]
        parts = [module.slice(packed, path, 1, *cut) for cut in cuts]
        summed = sum(module.reference(x[:, slice(*cut)], part, path) for part, cut in zip(parts, cuts, strict=True))
        torch.testing.assert_close(summed, whole, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=str(n)):
        module.slice(packed, path, 0, 0, n + 1)


@every_case
def test_traffic_is_the_bytes_that_the_op_receives(module, unit):
    if interpreting() and module in (bitmap, two_four, routed_ffn):
        pytest.skip("a GPU lays these out in another way, see test_sparse_layout.py")
    packed = module.encode(unit)
    prepared = module.prepare(packed, "cpu")
    for rows in (1, 64):
        spy = WeightSpy([t for t in prepared.tensors if t is not None])
        with spy:
            for path in unit.modules:
                module.apply(inputs(unit, rows), prepared, path)
        cost = module.traffic(packed, rows)
        assert cost.weight_bytes == spy.read.total() > 0
        assert cost.flops == rows * module.traffic(packed, 1).flops > 0


@every_case
def test_the_op_runs_on_meta_tensors(module, unit):
    prepared = module.prepare(module.encode(unit), "meta")
    first = next(iter(unit.modules))
    for rows in (1, 5, 200):
        y = module.apply(inputs(unit, rows).to("meta"), prepared, first)
        assert (y.shape, y.dtype) == ((rows, sum(prepared.outputs[first])), dtype_of(unit))
