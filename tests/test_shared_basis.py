"""shared_basis beyond the contract: bytes written by hand, pivoting as exact algebra, sharing, and its refusals."""

from __future__ import annotations

import pytest
import torch

from pared.kernels import dispatch, shared_basis
from pared.kernels.shared_basis import ALIGN
from pared.kernels.unit import Prepared, Unit
from pared.tests.truth import assert_as_good, poisoned

SLOWER = "ignore::pared.kernels.dispatch.SlowerPath"
LAYERS = (14, 15)


def unit_of(outputs: tuple[int, ...], k: int, rank: int, dtype: torch.dtype = torch.float32) -> Unit:
    """A factored group "m0", "m1", ...; "m0" has a bias."""
    tensors = {"basis": (torch.randn(rank, k) * k**-0.5).to(dtype)}
    for i, n in enumerate(outputs):
        tensors[f"coefficients.m{i}"] = (torch.randn(n, rank) * rank**-0.5).to(dtype)
    tensors["bias.m0"] = torch.randn(outputs[0]).to(dtype)
    return Unit({f"m{i}": (n, k) for i, n in enumerate(outputs)}, tensors)


def cast(unit: Unit, dtype: torch.dtype) -> Unit:
    tensors = unit.tensors.items()
    return Unit(unit.modules, {role: t.to(dtype) if t.is_floating_point() else t for role, t in tensors})


def whole(unit: Unit, path: str = "m0") -> torch.Tensor:
    """The matrix that the unit stands for, fp64 from fp32."""
    return shared_basis.weight(shared_basis.encode(unit), path).double()


def relative(error: torch.Tensor, of: torch.Tensor) -> float:
    return float(error.double().norm() / of.double().norm())


def test_golden_bytes_and_product():
    """K = 4, R = 2, pivots (2, 0): the example of the module's docstring."""
    tensors = {
        "basis": torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.bfloat16),
        "pivots": torch.tensor([2, 0], dtype=torch.int32),
        "coefficients.m": torch.tensor([[1.0, 2.0], [-3.0, 0.0], [0.5, 4.0]], dtype=torch.bfloat16),
        "bias.m": torch.tensor([1.0, -1.0, 0.0], dtype=torch.bfloat16),
    }
    packed = shared_basis.encode(Unit({"m": (3, 4)}, tensors))
    stored = {role: bytes(tensor.view(torch.uint8).numpy().tobytes()) for role, tensor in packed.tensors.items()}
    assert stored == {
        "basis": bytes.fromhex("003f 80bf 0040 803e"),
        "pivots": bytes.fromhex("02000000 00000000"),
        "coefficients.m": bytes.fromhex("803f 0040 40c0 0000 003f 8040"),
        "bias.m": bytes.fromhex("803f 80bf 0000"),
    }
    assert (packed.format, packed.version, packed.params) == ("shared_basis", 1, {})
    # z0 = x2 + 0.5 x1 - x3, z1 = x0 + 2 x1 + 0.25 x3
    by_hand = torch.tensor([[2.0, 4.5, 1.0, -0.5], [0.0, -1.5, -3.0, 3.0], [4.0, 8.25, 0.5, 0.5]])
    assert torch.equal(shared_basis.weight(packed, "m").float(), by_hand)
    x = torch.tensor([[1.0, 2.0, -1.0, 4.0]], dtype=torch.bfloat16)
    z = torch.tensor([-1.0 + 1.0 - 4.0, 1.0 + 4.0 + 1.0])
    y = torch.tensor([[z[0] + 2 * z[1] + 1, -3 * z[0] - 1, 0.5 * z[0] + 4 * z[1]]])
    assert torch.equal(shared_basis.reference(x, packed, "m").float(), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("outputs", "k", "rank"), [((5,), 1, 1), ((9, 9), 24, 24), ((40, 30), 64, 23)])
def test_pivoting_changes_the_factors_and_not_the_product(outputs, k, rank, dtype):
    unit = unit_of(outputs, k, rank, dtype)
    scale = torch.rand(k) + 0.1
    pivoted = shared_basis.pivot(unit, scale)
    assert pivoted.tensors["basis"].shape == (rank, k - rank)
    assert pivoted.tensors["basis"].dtype == dtype
    pivots = pivoted.tensors["pivots"].tolist()
    assert pivots == sorted(set(pivots))
    rest = [column for column in range(k) if column not in pivots]
    basis = torch.zeros(rank, k, dtype=torch.float64)
    basis[:, pivots] = torch.eye(rank, dtype=torch.float64)
    basis[:, rest] = pivoted.tensors["basis"].double()
    for path in unit.modules:
        role = f"coefficients.{path}"
        before = unit.tensors[role].double() @ unit.tensors["basis"].double()
        after = pivoted.tensors[role].double() @ basis
        assert relative(after - before, before) <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert torch.equal(pivoted.tensors["bias.m0"], unit.tensors["bias.m0"])
    if dtype == torch.float32:
        packed = shared_basis.encode(pivoted)
        assert shared_basis.traffic(packed, 1).flops < shared_basis.traffic(shared_basis.encode(unit), 1).flops


def test_inputs_with_much_in_them_become_pivots():
    scale = torch.full((32,), 0.01)
    scale[[3, 17, 30]] = 100.0
    pivots = shared_basis.pivot(unit_of((8,), 32, 6), scale).tensors["pivots"].tolist()
    assert {3, 17, 30} <= set(pivots)


def test_inputs_that_calibration_never_saw_do_no_harm():
    """A scale of zero, as a dead channel of an OPT model has it."""
    unit, scale = unit_of((8,), 32, 6), torch.rand(32) + 0.1
    scale[::2] = 0.0
    pivoted = shared_basis.pivot(unit, scale)
    assert pivoted.tensors["basis"].isfinite().all()
    x = torch.randn(7, 32) * scale
    own, other = (shared_basis.reference(x, shared_basis.encode(u), "m0") for u in (unit, pivoted))
    assert relative(other - own, own) <= 1e-5
    assert shared_basis.pivot(unit, torch.zeros(32)).tensors["basis"].isfinite().all()


def test_a_basis_of_lower_rank_than_its_rows_is_told():
    """Rows that depend on each other: no R columns of B are independent, so z cannot be had from R of x's."""
    unit = unit_of((8,), 32, 6)
    unit.tensors["basis"][5] = unit.tensors["basis"][0] + unit.tensors["basis"][1]
    pivoted = shared_basis.pivot(unit, torch.ones(32))
    assert pivoted.tensors["basis"].isfinite().all()
    assert relative(whole(pivoted) - whole(unit), whole(unit)) <= 1e-5


@pytest.fixture(scope="module")
def seen(smollm2_hf):
    """Inputs [tokens, K] of q_proj and gate_proj in two layers of SmolLM2 that follow each other, from real text."""
    from transformers import AutoTokenizer

    from pared.bench.data import boolq_passages, corpus

    tokenizer = AutoTokenizer.from_pretrained(smollm2_hf.config._name_or_path)
    tokens = tokenizer(corpus(boolq_passages("train")[:40]), return_tensors="pt").input_ids[0][:1024].view(4, 256)
    inputs: dict[str, torch.Tensor] = {}
    names = [f"model.layers.{i}.{kind}" for i in LAYERS for kind in ("self_attn.q_proj", "mlp.gate_proj")]
    handles = [
        smollm2_hf.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: inputs.update({name: args[0].flatten(0, 1)})
        )
        for name in names
    ]
    with torch.no_grad():
        smollm2_hf(tokens)
    for handle in handles:
        handle.remove()
    return inputs


@pytest.mark.skipif(dispatch.interpreting(), reason="references only: nothing that the interpreter could change")
@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("kind", ["self_attn.q_proj", "mlp.gate_proj"])
def test_pivoted_is_as_near_as_rounding_on_real_weights_and_activations(smollm2_hf, seen, kind, ratio):
    from pared.converters.low_rank import factorize, rank

    paths = [f"model.layers.{i}.{kind}" for i in LAYERS]
    weights = [smollm2_hf.get_submodule(path).weight.detach().double() for path in paths]
    fit = [seen[path][:512].double() for path in paths]  # the other tokens are what the error is told of
    gram = sum(x.t() @ x for x in fit)
    n, k = weights[0].shape
    factors = factorize(weights, gram, rank(ratio, n, k, 2))
    tensors = {"basis": factors.basis.t().contiguous()}
    tensors |= {f"coefficients.{path}": c.contiguous() for path, c in zip(paths, factors.coefficients, strict=True)}
    scale = gram.diagonal().div(sum(len(x) for x in fit)).sqrt()
    unit = Unit(dict.fromkeys(paths, (n, k)), tensors)
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        factored, pivoted = (shared_basis.encode(cast(u, dtype)) for u in (unit, shared_basis.pivot(unit, scale)))
        for path in paths:
            x = seen[path][512:].to(dtype)
            own, other = (shared_basis.reference(x, packed, path) for packed in (factored, pivoted))
            assert 0 < relative(other.double() - own.double(), own) <= most


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"basis": None}, "the unit has None"),
        ({"basis": torch.zeros(3, 8, dtype=torch.float64)}, r"\(3, 8\) of torch.float64"),
        ({"basis": torch.zeros(3)}, r"\(3,\)"),
        ({"basis": torch.zeros(9, 8)}, "rank 9 is above the 8 inputs"),
        ({"basis": torch.zeros(3, 12)}, "m0 does not read 12 inputs"),
        ({"pivots": torch.tensor([0, 1, 2], dtype=torch.int32)}, "m0 does not read 11 inputs"),
        (
            {"basis": torch.zeros(3, 5), "pivots": torch.tensor([0, 1, 1], dtype=torch.int32)},
            "3 different columns of 8",
        ),
        (
            {"basis": torch.zeros(3, 5), "pivots": torch.tensor([0, 1, 8], dtype=torch.int32)},
            "3 different columns of 8",
        ),
        ({"basis": torch.zeros(3, 5), "pivots": torch.tensor([0, 1, 2])}, "int32"),
        ({"basis": torch.zeros(3, 5), "pivots": torch.tensor([0, 1], dtype=torch.int32)}, "3 different columns of 8"),
        ({"coefficients.m1": None}, "coefficients.m1 is missing"),
        ({"coefficients.m1": torch.zeros(5, 4)}, r"coefficients.m1 is \(5, 4\).*expected \(5, 3\)"),
        ({"coefficients.m1": torch.zeros(5, 3).half()}, "float16, expected .* torch.float32"),
        ({"coefficients.m9": torch.zeros(5, 3)}, "coefficients.m9 .* expected None"),
        ({"bias.m0": torch.zeros(5)}, r"bias.m0 is \(5,\).*expected \(4,\)"),
        ({"weight": torch.zeros(4, 8)}, "weight .* expected None"),
    ],
)
def test_what_does_not_fit_is_told(change, says):
    unit = unit_of((4, 5), 8, 3)
    tensors = {role: tensor for role, tensor in (unit.tensors | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=says):
        shared_basis.encode(Unit(unit.modules, tensors))


def test_a_basis_that_several_layers_share_stays_one_tensor():
    """Also where two groups are stacked, as q|k|v of two layers are: four modules, two bases."""
    groups = [shared_basis.pivot(unit_of((6, 6), 16, 5), torch.ones(16)) for _ in "qk"]
    packs = [shared_basis.encode(unit) for unit in groups]
    prepared = [shared_basis.prepare(packed, "cpu") for packed in packs]
    layers = [shared_basis.stack([(p, path) for p in prepared]) for path in ("m0", "m1")]
    assert all(layer is not None for layer in layers)
    first, second = ({t.data_ptr() for t in layer.tensors if t is not None} for layer in layers)
    stored = [packed.tensors["basis"].data_ptr() for packed in packs]
    assert set(stored) <= first & second
    assert len(first & second) == 4  # two bases and their orders
    assert {packed.tensors["coefficients.m1"].data_ptr() for packed in packs} <= second - first


@pytest.mark.filterwarnings(SLOWER)
@pytest.mark.parametrize("rows", [1, 3, 40, 200])
@pytest.mark.parametrize("dtype", shared_basis.DTYPES, ids=str)
def test_factored_and_pivoted_modules_stack(rows, dtype):
    """Of other ranks and widths, with and without a bias."""
    units = [
        unit_of((33,), 90, 21, dtype),
        shared_basis.pivot(unit_of((7, 9), 90, 40, dtype), torch.rand(90) + 0.1),
        shared_basis.pivot(unit_of((16,), 90, 90, dtype), torch.ones(90)),
    ]
    packs = [(shared_basis.encode(unit), path) for unit, path in zip(units, ("m0", "m1", "m0"), strict=True)]
    stacked = shared_basis.stack([(shared_basis.prepare(packed, "cpu"), path) for packed, path in packs])
    assert stacked is not None
    assert stacked.outputs == {"m0": (33, 9, 16)}
    x = torch.randn(rows, 90).to(dtype)
    with poisoned():
        y = shared_basis.apply(x, stacked, "m0")
    own, truth = (
        torch.cat([shared_basis.reference(rows_of, packed, path) for packed, path in packs], dim=1)
        for rows_of in (x, x.float())
    )
    assert_as_good(y, own, truth)


@pytest.mark.filterwarnings(SLOWER)
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(2, 5), r"\[M, 8\].*\(2, 5\)|\(3, [58]\).* 5 inputs"),
        (torch.zeros(2, 8, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(8, 2).t(), r"strides \(1, 2\)"),
        (torch.zeros(8), r"\(8,\)"),
    ],
)
def test_wrong_rows_are_refused_with_the_numbers(x, says):
    for unit in (unit_of((4,), 8, 3), shared_basis.pivot(unit_of((4,), 8, 3), torch.ones(8))):
        prepared = shared_basis.prepare(shared_basis.encode(unit), "cpu")
        with pytest.raises(ValueError, match=says):
            shared_basis.apply(x, prepared, "m0")


@pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter takes the Triton path, which takes such rows")
@pytest.mark.filterwarnings(SLOWER)
def test_a_cpu_takes_no_zero_columns():
    prepared = shared_basis.prepare(shared_basis.encode(unit_of((4,), 8, 3)), "cpu")
    longer = torch.nn.functional.pad(prepared.tensors[2], (0, ALIGN - 3))
    tensors = (*prepared.tensors[:2], longer, prepared.tensors[3])
    with pytest.raises(ValueError, match="do not meet"):
        shared_basis.apply(torch.zeros(1, 8), Prepared("shared_basis", {"m0": (4,)}, tensors), "m0")
