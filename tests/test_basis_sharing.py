"""Basis Sharing against its paper: errors, ranks, storage, families; and a search that survives being killed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from pared import families
from pared.converters import recipe
from pared.converters.calibration import Calibration
from pared.converters.groups import kinds, runs
from pared.converters.low_rank import factorize, pivoted_rank, rank, refit, weighted_loss
from pared.converters.methods import basis_sharing
from pared.converters.modelling import BasisLinear, units
from pared.converters.record import Record
from pared.errors import BadParameter, SourceError
from pared.spec import Spec
from pared.tests import tiny

COUNT, LENGTH, SEED = 12, 16, 3


class Words:
    """A tokenizer whose text is the seed of random tokens."""

    def __call__(self, text: str, **_: object) -> Words:
        generator = torch.Generator().manual_seed(len(text))
        self.input_ids = torch.randint(0, 40, (1, 1000), generator=generator)
        return self


CALIBRATION = Calibration(Words(), "text", "text.txt")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gram_of_rank(k: int, r: int) -> torch.Tensor:
    """With eigenvalues over six decades, as activations have them."""
    x = random(4 * k, r) @ torch.diag(torch.logspace(0, -3, r, dtype=torch.float64)) @ random(r, k)
    return x.t() @ x


def params(**given: object) -> basis_sharing.Params:
    return basis_sharing.Params(**{"samples": COUNT, "length": LENGTH, "seed": SEED, **given})


def compressed(name: str, folder, **given: object) -> tuple[hf.PreTrainedModel, Record]:
    model, record = tiny.model(name).requires_grad_(False), Record(folder)
    basis_sharing.search(model, CALIBRATION, record, params(**given), progress=False)
    basis_sharing.apply(model, record)
    return model, record


def spec_of(name: str) -> Spec:
    return families.read(tiny.CONFIGS[name].to_dict())


# --- the algebra ------------------------------------------------------------------------------------

SHAPES = [(24, 40, 1), (24, 40, 2), (64, 32, 1), (40, 24, 3), (30, 30, 2)]  # outputs, inputs, layers


@pytest.mark.parametrize(("n", "k", "size"), SHAPES)
@pytest.mark.parametrize("deficient", [False, True])
def test_the_weighted_error_is_the_discarded_singular_values(n, k, size, deficient):
    torch.manual_seed(0)
    gram = gram_of_rank(k, k // 2 if deficient else k)
    weights = [random(n, k) for _ in range(size)]
    r = k // 3
    found = factorize(weights, gram, r)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    singular = torch.linalg.svdvals(torch.cat(weights) @ root)
    tail = float((singular[r:] ** 2).sum())
    really = sum(weighted_loss(w, c @ found.basis.t(), gram) for w, c in zip(weights, found.coefficients, strict=True))
    assert really == pytest.approx(tail, rel=1e-6)
    assert found.lost == pytest.approx(tail, rel=1e-6)
    assert found.total == pytest.approx(float((singular**2).sum()), rel=1e-9)


@pytest.mark.parametrize(("n", "k", "size"), SHAPES)
def test_it_is_the_papers_cholesky_form_in_the_weighted_norm(n, k, size):
    torch.manual_seed(1)
    gram, weights, r = gram_of_rank(k, k), [random(n, k) for _ in range(size)], k // 3
    s = torch.linalg.cholesky(gram).t()
    u, sigma, vt = torch.linalg.svd(s @ torch.cat(weights).t(), full_matrices=False)
    basis = torch.linalg.solve(s, u[:, :r] * sigma[:r])
    found = factorize(weights, gram, r)
    ours, theirs = torch.cat(found.coefficients) @ found.basis.t(), vt[:r].t() @ basis.t()
    assert weighted_loss(ours, theirs, gram) <= 1e-12 * weighted_loss(ours, torch.zeros_like(ours), gram)


def test_more_rank_than_the_inputs_have_loses_nothing():
    torch.manual_seed(2)
    gram, weight = gram_of_rank(20, 5), random(30, 20)
    found = factorize([weight], gram, 12)
    assert found.lost <= 1e-12 * found.total
    assert weighted_loss(weight, found.coefficients[0] @ found.basis.t(), gram) <= 1e-9 * found.total
    assert all(torch.isfinite(t).all() for t in (found.basis, *found.coefficients))


def test_refit_is_the_least_squares_solution_on_the_inputs_themselves():
    torch.manual_seed(3)
    x, weights, basis = random(200, 20), [random(12, 20), random(12, 20)], random(20, 6)
    found = refit(weights, basis, x.t() @ x)
    for weight, coefficients in zip(weights, found, strict=True):
        expected = torch.linalg.lstsq(x @ basis, x @ weight.t()).solution.t()
        assert torch.allclose(coefficients, expected, rtol=1e-8, atol=1e-10)


# --- ranks and storage ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "attention", "ffn_in", "out", "down"),
    [
        (20, 2184, 2762, 1638, 2388),
        (30, 1911, 2417, 1433, 2089),
        (40, 1638, 2072, 1228, 1791),
        (50, 1365, 1726, 1024, 1492),
        (60, 1092, 1381, 819, 1194),
    ],
)
def test_the_ranks_of_llama_2_7b_are_the_published_ones(ratio, attention, ffn_in, out, down):
    share = ratio / 100
    assert rank(share, 4096, 4096, 2) == attention
    assert rank(share, 11008, 4096, 2) == ffn_in
    assert rank(share, 4096, 4096, 1) == out
    assert rank(share, 4096, 11008, 1) == down
    shared = 3 * attention * (4096 + 2 * 4096) + 2 * ffn_in * (4096 + 2 * 11008)
    stored = shared + 2 * out * (4096 + 4096) + 2 * down * (11008 + 4096)
    assert stored / (2 * (4 * 4096**2 + 3 * 4096 * 11008)) == pytest.approx(1 - share, abs=1e-3)


@pytest.mark.parametrize(("n", "k", "size"), [(4096, 4096, 1), (11008, 4096, 2), (576, 1536, 1), (192, 576, 2)])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_pivoted_ranks_fill_the_ratio_with_what_pivoting_stores(n, k, size, ratio):
    def stored(r: int) -> int:
        return r * (k - r) + r * n * size

    r = pivoted_rank(ratio, n, k, size)
    assert stored(r) <= (1 - ratio) * n * k * size < stored(r + 1)
    assert rank(ratio, n, k, size) < r <= min(k, n * size)


def test_ranks_stay_within_the_matrix():
    assert rank(0.99, 3, 5, 1) == 1
    assert rank(0.01, 8, 4096, 1) <= 8
    assert rank(0.01, 4096, 8, 4) <= 8


# --- whole models, recomputed independently ---------------------------------------------------------


def inputs_of(model: nn.Module, paths: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, path=path: seen[path].append(args[0].flatten(0, -2).double())
        )
        for path in paths
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def weight(model: nn.Module, path: str, transposed: bool) -> torch.Tensor:
    found = model.get_submodule(path).weight.detach().double()
    return found.t() if transposed else found


FAMILIES = {
    "llama": {"q_proj": 2, "k_proj": 1, "v_proj": 1, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 1},
    "opt-projected": {"q_proj": 2, "k_proj": 2, "v_proj": 2, "out_proj": 1, "fc1": 2, "fc2": 1},
    "gpt2": {"c_attn": 2, "attn.c_proj": 2, "c_fc": 2, "mlp.c_proj": 1},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ratio", [20, 50])
def test_models_are_compressed_as_an_independent_recomputation_has_it(tmp_path, name, ratio):
    dense, spec = tiny.model(name), spec_of(name)
    model, _ = compressed(name, tmp_path, ratio=ratio, refit="no")
    x = inputs_of(dense, [p for paths in units(model) for p in paths], CALIBRATION.windows(COUNT, LENGTH, SEED))
    found = units(model)
    sizes = {p: len(paths) for paths in found for p in paths}
    assert {p: next(s for n, s in FAMILIES[name].items() if p.endswith(n)) for p in sizes} == sizes
    for paths, unit in found.items():
        stacked = torch.cat([weight(dense, p, spec.transposed) for p in paths])
        gram = sum(x[p].t() @ x[p] for p in paths)
        s = torch.linalg.cholesky(gram + 1e-12 * gram.trace() * torch.eye(len(gram), dtype=torch.float64))
        n, k = stacked.shape
        r = int((1 - ratio / 100) * k * n / (k + n))
        left, sigma, right = torch.linalg.svd(stacked @ s, full_matrices=False)
        expected = (left[:, :r] * sigma[:r]) @ right[:r] @ torch.linalg.inv(s)
        assert unit.tensors["basis"].shape == (r, k)
        ours = torch.cat([unit.tensors[f"coefficients.{p}"] for p in paths]).double() @ unit.tensors["basis"].double()
        assert weighted_loss(ours, expected, gram) <= 1e-8 * weighted_loss(stacked, 0 * stacked, gram)
        rows = sum(len(x[p]) for p in paths)
        assert torch.allclose(unit.tensors["scale"].double() ** 2 * rows, gram.diagonal(), rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("group", [1, 2])
def test_the_refit_is_the_best_under_the_inputs_of_both_models(tmp_path, name, group):
    """Run by run: what a run sees of the compressed model has passed the refitted runs before it."""
    spec = spec_of(name)
    plain, _ = compressed(name, tmp_path / "plain", ratio=50, group=group, refit="no")
    model, _ = compressed(name, tmp_path / "refit", ratio=50, group=group)
    tokens, dense = CALIBRATION.windows(COUNT, LENGTH, SEED), tiny.model(name)
    ours, before, changed = units(model), units(plain), 0
    wanted = inputs_of(dense, [p for paths in ours for p in paths], tokens)
    for paths, unit in ours.items():
        first = min(layer_of(path, spec) for path in paths) // group * group
        seen = inputs_of(partly_refitted(plain, model, first, spec), paths, tokens)
        x = torch.cat([inputs[path] for inputs in (wanted, seen) for path in paths])
        basis = unit.tensors["basis"].double()
        assert torch.equal(unit.tensors["basis"], before[paths].tensors["basis"])
        for path in paths:
            target = x @ weight(dense, path, spec.transposed).t()
            coefficients = (u[paths].tensors[f"coefficients.{path}"].double() for u in (ours, before))
            found, old = (x @ basis.t() @ c.t() for c in coefficients)
            best = x @ basis.t() @ torch.linalg.lstsq(x @ basis.t(), target).solution
            assert (found - best).norm() <= 1e-4 * target.norm()
            assert (found - target).norm() <= (old - target).norm() * (1 + 1e-6)
            changed += not torch.equal(found, old)
    assert changed


def layer_of(path: str, spec: Spec) -> int:
    return next(i for i in range(len(spec.layers)) if path.startswith(spec.path(i, "")))


def partly_refitted(plain: nn.Module, refitted: nn.Module, layers: int, spec: Spec) -> nn.Module:
    """The compressed model, with the new coefficients in its first `layers` layers."""
    made = copy.deepcopy(plain)
    for path in (path for paths in units(made) for path in paths):
        if layer_of(path, spec) < layers:
            made.get_submodule(path).coefficients.data = refitted.get_submodule(path).coefficients.data
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-projected"])
def test_the_whole_model_computes_what_its_products_do(tmp_path, name):
    model, _ = compressed(name, tmp_path, ratio=30)
    tokens = torch.tensor([[1, 7, 3, 30, 39, 0, 12]])
    dense = tiny.model(name)
    for unit in units(model).values():
        for path in unit.modules:
            product = unit.tensors[f"coefficients.{path}"] @ unit.tensors["basis"]
            dense.get_submodule(path).weight.data = product.t() if spec_of(name).transposed else product
    assert torch.allclose(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(tokens).logits, tiny.model(name)(tokens).logits, atol=1e-2)


def test_a_basis_is_shared_by_identity_and_the_biases_are_kept(tmp_path):
    model, _ = compressed("gpt2", tmp_path)
    first, second = (model.get_submodule(f"transformer.h.{i}.mlp.c_fc") for i in range(2))
    assert isinstance(first, BasisLinear)
    assert first.basis is second.basis
    assert torch.equal(second.bias, tiny.model("gpt2").transformer.h[1].mlp.c_fc.bias)
    assert not first.bias.requires_grad


# --- auto ------------------------------------------------------------------------------------------


def own_loss(model: nn.Module, dense: nn.Module, x: dict[str, torch.Tensor], path: str) -> float:
    module = model.get_submodule(path)
    error = weight(dense, path, False) - (module.coefficients @ module.basis).double()
    return float((x[path] @ error.t()).square().sum())


def test_auto_picks_the_smaller_error_kind_by_kind(tmp_path):
    spec, dense = spec_of("llama"), tiny.model("llama")
    auto, record = compressed("llama", tmp_path / "auto", share="auto")
    alone, _ = compressed("llama", tmp_path / "alone", group=1)
    x = inputs_of(dense, [p for paths in units(alone) for p in paths], CALIBRATION.windows(COUNT, LENGTH, SEED))
    shared = basis_sharing.summary(record)["shared"]
    assert set(shared.values()) == {0, 1}, "the fixture should make both happen"
    for kind in kinds(spec):
        paths = [spec.path(i, kind.name) for i in range(2)]
        grams = [x[p].t() @ x[p] for p in paths]
        weights = [dense.get_submodule(p).weight.detach().double() for p in paths]
        n, k = weights[0].shape
        together = factorize(weights, grams[0] + grams[1], rank(0.2, n, k, 2))
        joint = sum(
            weighted_loss(w, c @ together.basis.t(), g)
            for w, c, g in zip(weights, together.coefficients, grams, strict=True)
        )
        separate = sum(own_loss(alone, dense, x, p) for p in paths)
        assert bool(shared[kind.name]) == (joint < separate), kind.name
        assert sum(own_loss(auto, dense, x, p) for p in paths) == pytest.approx(min(joint, separate), rel=1e-4)


# --- parts of a model, and bad input ----------------------------------------------------------------


def test_layers_and_modules_limit_what_is_touched(tmp_path):
    model, _ = compressed("llama", tmp_path / "a", group=1, layers=(1,), modules=("q_proj", "down_proj"))
    assert set(units(model)) == {("model.layers.1.self_attn.q_proj",), ("model.layers.1.mlp.down_proj",)}
    model, _ = compressed("gpt2", tmp_path / "b", modules=("mlp.c_proj",))
    assert set(units(model)) == {(f"transformer.h.{i}.mlp.c_proj",) for i in range(2)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": (0,)}, r"layers cuts the group of layers 0 to 1 \(group=2\)"),
        ({"layers": (2,)}, "layers names layer 2, the model has layers 0 to 1"),
        ({"modules": ("w2",)}, "modules names 'w2', the linears of a layer are self_attn.q_proj, "),
    ],
)
def test_layers_and_modules_that_are_not_there(tmp_path, given, message):
    with pytest.raises(BadParameter, match=message):
        compressed("llama", tmp_path, **given)


def test_a_group_across_a_removed_block_is_refused(tmp_path):
    model = tiny.model("llama").requires_grad_(False)
    model.layer_origins = [0, 2]
    with pytest.raises(BadParameter, match=r"layers 0 to 1 reaches across a removed block \(they were \[0, 2\]\)"):
        basis_sharing.search(model, CALIBRATION, Record(tmp_path), params(), progress=False)
    basis_sharing.search(model, CALIBRATION, Record(tmp_path), params(group=1), progress=False)


def test_a_shorter_last_group_keeps_the_configured_size():
    spec = families.read(hf.LlamaConfig(**(tiny._SIZES | {"num_hidden_layers": 5})).to_dict())
    cut = runs(spec, 2)
    assert [run.layers for run in cut] == [(0, 1), (2, 3), (4,)]
    assert cut[-1].group(spec, kinds(spec)[0]).size == 2


def test_too_little_text_says_how_much_there_is(tmp_path):
    with pytest.raises(SourceError, match=r"holds 62 windows of 16 tokens, 63 were asked for"):
        compressed("llama", tmp_path, samples=63)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic:ratio=3", "no method is called 'magic'; known are sleb, l3prune, "),
        ("basis_sharing:rate=3", "basis_sharing has no parameter 'rate'; it takes ratio, group, share"),
        ("basis_sharing:ratio", "basis_sharing has no parameter 'ratio'; it takes .* each as key=value"),
        ("basis_sharing:ratio=much", "basis_sharing: ratio=much is not a number"),
        ("basis_sharing:ratio=0.2", "basis_sharing: ratio=0.2 is outside 1 to 99"),
        ("basis_sharing:ratio=nan", "basis_sharing: ratio=nan is outside 1 to 99"),
        ("basis_sharing:group=1.5", "basis_sharing: group=1.5 is not a whole number"),
        ("basis_sharing:share=all", "basis_sharing: share=all is not one of paper, auto"),
        ("basis_sharing:layers=3-1", "basis_sharing: layers=3-1 is not a list of numbers such as 0-3,7"),
        ("basis_sharing:modules=q,,k", "basis_sharing: modules=q,,k is not a list of names"),
        ("basis_sharing:ratio=20,ratio=30", "basis_sharing: ratio is given twice"),
    ],
)
def test_a_wrong_recipe_names_method_key_and_value(text, message):
    with pytest.raises(BadParameter, match=message):
        recipe.parse([text])


def test_recipes_take_commas_and_colons_between_and_inside_values():
    steps = recipe.parse(
        ["basis_sharing:ratio=30:group=4,layers=0-3,7:modules=q_proj,mlp.up_proj,refit=no", "recover:lr=1e-3"]
    )
    expected = basis_sharing.Params(30.0, 4, layers=(0, 1, 2, 3, 7), modules=("q_proj", "mlp.up_proj"), refit="no")
    assert steps[0].params == expected
    assert (steps[1].method.NAME, steps[1].params.lr) == ("recover", 1e-3)
    assert recipe.parse(["basis_sharing"])[0].params == basis_sharing.Params()


# --- killed and taken up again ----------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", range(4))
def test_a_search_that_was_killed_resumes_to_the_same_bytes(tmp_path, monkeypatch, after):
    def search(record: Record) -> None:
        model = tiny.model("llama").requires_grad_(False)
        basis_sharing.search(model, CALIBRATION, record, params(ratio=50, group=1), progress=False)

    whole, torn = Record(tmp_path / "whole"), Record(tmp_path / "torn")
    search(whole)
    save, saved = Record.save, []

    def dying(self: Record, part: str, *rest: object) -> None:
        if len(saved) == after:
            raise Killed
        saved.append(part)
        save(self, part, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Record, "save", dying)
        with pytest.raises(Killed):
            search(torn)
    search(torn)
    files = sorted(path.name for path in whole.folder.iterdir())
    assert sorted(path.name for path in torn.folder.iterdir()) == files
    assert len(files) == 2 * (2 + 2 + 1)
    assert all((whole.folder / n).read_bytes() == (torn.folder / n).read_bytes() for n in files)


def test_finished_parts_are_not_computed_again(tmp_path, monkeypatch):
    record = compressed("llama", tmp_path, ratio=50)[1]
    monkeypatch.setattr(basis_sharing, "factorize", None)
    monkeypatch.setattr(basis_sharing, "refit", None)
    monkeypatch.setattr(basis_sharing, "LayerWalk", None)
    model = tiny.model("llama").requires_grad_(False)
    basis_sharing.search(model, CALIBRATION, record, params(ratio=50), progress=False)


def test_the_search_leaves_the_model_dense(tmp_path):
    model = tiny.model("llama").requires_grad_(False)
    basis_sharing.search(model, CALIBRATION, Record(tmp_path), params(ratio=50), progress=False)
    assert not units(model)
    tokens = torch.tensor([[1, 7, 3]])
    assert torch.equal(model(tokens).logits, tiny.model("llama")(tokens).logits)


def test_a_basis_linear_is_two_products():
    torch.manual_seed(4)
    basis, c, bias, x = nn.Parameter(torch.randn(3, 8)), torch.randn(5, 3), torch.randn(5), torch.randn(2, 8)
    assert torch.allclose(BasisLinear(basis, c, bias)(x), F.linear(x, c @ basis.detach(), bias), atol=1e-5)
