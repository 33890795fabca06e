"""Pruning against its papers, recomputed plainly: masks, sparsity, families; and a search that outlives a kill."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from pared import families
from pared.compact import open_folder
from pared.convert import convert
from pared.converters import gradients, pruning, recipe
from pared.converters import record as record_module
from pared.converters.calibration import Calibration, tokenizer_of
from pared.converters.methods import basis_sharing, gblm, magnitude, wanda
from pared.converters.modelling import instantiate
from pared.converters.record import Record
from pared.converters.sources.detect import open_source
from pared.errors import BadParameter, SourceError
from pared.evaluate import decoder_logits
from pared.runtime.loader import load
from pared.spec import Spec
from pared.tests import tiny

COUNT, LENGTH, SEED = 12, 16, 3
PATTERNS = ("unstructured", "2:4", "4:8")
FAMILIES = ("llama", "opt-projected", "gpt2", "phi3", "qwen3", "llama-tied-biased")
SETTINGS = {"samples": COUNT, "length": LENGTH, "seed": SEED}
Masks = dict[str, torch.Tensor]


class Words:
    """A tokenizer whose text is the seed of random tokens."""

    def __call__(self, text: str, **_: object) -> Words:
        generator = torch.Generator().manual_seed(len(text))
        self.input_ids = torch.randint(0, 40, (1, 1000), generator=generator)
        return self


CALIBRATION = Calibration(Words(), "text", "text.txt")


def frozen(name: str) -> hf.PreTrainedModel:
    return tiny.model(name).requires_grad_(False)


def spec_of(model: hf.PreTrainedModel) -> Spec:
    return families.read(model.config.to_dict())


def params_of(method, **given: object):
    return method.Params(**({} if method is magnitude else SETTINGS), **given)


def search(method, model, record: Record, calibration: Calibration = CALIBRATION, **given: object) -> Record:
    method.search(model, calibration, record, params_of(method, **given), progress=False)
    return record


def masks(record: Record) -> Masks:
    return {path: keep for i in record.facts("plan")["layers"] for path, keep in pruning._masks(record, i).items()}


# --- the formulas, written a second time ------------------------------------------------------------


def linears(model: nn.Module, spec: Spec, layer: int | None = None) -> dict[str, nn.Module]:
    """Every linear of the blocks, or of one, as the reference finds them: by type."""
    found = {p: m for p, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    prefixes = [spec.path(i, "") for i in (range(len(spec.layers)) if layer is None else [layer])]
    return {path: module for path, module in found.items() if path.startswith(tuple(prefixes))}


def plain_gradients(model: nn.Module, tokens: torch.Tensor, norm: str, form: str) -> dict[str, torch.Tensor]:
    """Every sample by itself through the whole model and back; sums over samples as the code or the paper has them."""
    model, spec = copy.deepcopy(model), spec_of(model)
    for module in linears(model, spec).values():
        module.weight.requires_grad_(True)
    scale = 100 if form == "code" else 1
    sums: dict[str, torch.Tensor] = {}
    for window in tokens:
        model.zero_grad()
        logits = model(window[None]).logits[0]
        nn.functional.cross_entropy(logits[:-1].float(), window[1:]).backward()
        for path, module in linears(model, spec).items():
            one = (module.weight.grad * scale).abs() if norm == "l1" else (module.weight.grad * scale) ** 2
            one = one.half() if (norm, form) == ("l1", "code") else one
            sums[path] = sums[path] + one if path in sums else one.clone()
    done = {path: total.sqrt() if norm == "l2" else total for path, total in sums.items()}
    done = {path: total.half() if form == "code" else total for path, total in done.items()}
    return {path: total.t() if spec.transposed else total for path, total in done.items()}


def lowest(scores: torch.Tensor, pattern: str, sparsity: float = 0.5) -> torch.Tensor:
    """True where a weight goes, as the reference has it."""
    gone = torch.zeros_like(scores) == 1
    if pattern == "unstructured":
        order = torch.sort(scores, dim=-1, stable=True)[1]
        return gone.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
    n, m = map(int, pattern.split(":"))
    groups = gone.view(len(gone), -1, m)
    groups.scatter_(-1, torch.topk(scores.view_as(groups), m - n, dim=-1, largest=False)[1], True)
    return gone


Scores = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


def plain_masks(model: nn.Module, tokens: torch.Tensor, pattern: str, scores: Scores) -> Masks:
    """Layer by layer, each time through the whole model with all layers before it pruned; True where a weight stays."""
    model, spec, found = copy.deepcopy(model), spec_of(model), Masks()
    for i in range(len(spec.layers)):
        seen: dict[str, list[torch.Tensor]] = {}
        handles = [
            module.register_forward_pre_hook(
                lambda _m, args, path=path, seen=seen: seen.setdefault(path, []).append(args[0].flatten(0, -2))
            )
            for path, module in linears(model, spec, i).items()
        ]
        with torch.no_grad():
            for batch in tokens.split(8):
                model.base_model(batch)
        for handle in handles:
            handle.remove()
        for path, module in linears(model, spec, i).items():
            weight = module.weight.data.t() if spec.transposed else module.weight.data
            gone = lowest(scores(path, weight, torch.cat(seen[path])), pattern)
            found[path] = ~gone
            weight[gone] = 0
    return found


def gblm_scores(gradient: dict[str, torch.Tensor], form: str, samples: int, alpha: float = 100.0) -> Scores:
    def code(path: str, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        a = x.norm(dim=0) ** 2 / samples
        return weight.abs() * a.sqrt() + weight.abs() * gradient[path]

    def paper(path: str, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return weight.abs() * x.norm(dim=0) + alpha * weight.abs() * gradient[path]

    return code if form == "code" else paper


def wanda_scores(_path: str, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return weight.abs() * x.norm(dim=0)


def differing(found: Masks, expected: Masks) -> int:
    assert found.keys() == expected.keys()
    return sum(int((found[path] != expected[path]).sum()) for path in expected)


# --- masks, on a trained model and in every family --------------------------------------------------


@pytest.fixture(scope="module")
def trained(smollm2_gguf: Path) -> tuple[hf.PreTrainedModel, Calibration]:
    """The first two layers of SmolLM2, and real text."""
    from pared.bench.data import TEXTS_WHEEL, boolq_passages, corpus

    if not TEXTS_WHEEL.exists():
        pytest.skip("the texts are not in .data/; `make test` fetches them")
    source = open_source(smollm2_gguf)
    model = instantiate(source, torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model, Calibration(tokenizer_of(source), corpus(boolq_passages("train")[:100]), "BoolQ")


@pytest.mark.parametrize(("norm", "form"), [("l1", "code"), ("l2", "code"), ("l1", "paper")])
def test_masks_of_a_trained_model_are_those_of_an_independent_recomputation(tmp_path, trained, norm, form):
    """Scores that tie in fp32 may fall either way: at most 1 bit in 100,000.

    A weight of this model's 4-bit grid that is zero already scores zero; which of several goes is no difference.
    """
    model, calibration = trained
    tokens = calibration.windows(COUNT, LENGTH, SEED)
    expected = plain_gradients(model, tokens, norm, form)
    weights = {path: module.weight for path, module in linears(model, spec_of(model)).items()}
    for pattern in PATTERNS:
        record = Record(tmp_path / pattern.replace(":", "-"))
        found = masks(search(gblm, model, record, calibration, pattern=pattern, norm=norm, form=form))
        plain = plain_masks(model, tokens, pattern, gblm_scores(expected, form, COUNT))
        ties, bits = differing(found, plain), sum(weight.numel() for weight in weights.values())
        for path, weight in weights.items():
            found[path][weight == 0], plain[path][weight == 0] = True, True
        print(f"{norm} {form} {pattern}: {ties} of {bits} bits differ, {differing(found, plain)} at weights")
        assert differing(found, plain) <= bits / 100_000


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_family_gets_the_masks_of_the_formulas(tmp_path, name, pattern):
    model, tokens = frozen(name), CALIBRATION.windows(COUNT, LENGTH, SEED)
    gradient = plain_gradients(model, tokens, "l1", "code")
    expected = {
        gblm: plain_masks(model, tokens, pattern, gblm_scores(gradient, "code", COUNT)),
        wanda: plain_masks(model, tokens, pattern, wanda_scores),
    }
    for method, plain in expected.items():
        record = search(method, frozen(name), Record(tmp_path / method.NAME), pattern=pattern)
        assert differing(masks(record), plain) == 0
    assert differing(expected[gblm], expected[wanda]) > 0, "gradients should matter here"


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-projected"])
def test_magnitude_is_one_threshold_a_matrix(tmp_path, name):
    model, spec = frozen(name), spec_of(frozen(name))
    model.get_submodule(spec.path(1, spec.names.ffn_out)).weight.data.fill_(0.25)  # ties go with the threshold
    found = masks(search(magnitude, model, Record(tmp_path / "half")))
    third = masks(search(magnitude, model, Record(tmp_path / "third"), sparsity=0.3))
    grouped = masks(search(magnitude, model, Record(tmp_path / "grouped"), pattern="2:4"))
    for path, module in linears(model, spec).items():
        size = (module.weight.t() if spec.transposed else module.weight).abs()
        for share, masks_found in ((0.5, found), (0.3, third)):
            threshold = torch.sort(size.flatten())[0][int(size.numel() * share)]
            assert torch.equal(masks_found[path], size > threshold)
        if path != spec.path(1, spec.names.ffn_out):
            assert torch.equal(grouped[path], ~lowest(size, "2:4"))
    assert not found[spec.path(1, spec.names.ffn_out)].any()


@pytest.mark.parametrize("method", [gblm, wanda])
@pytest.mark.parametrize("sparsity", [0.5, 0.3, 0.99])
def test_sparsity_is_exact_in_every_row(tmp_path, method, sparsity):
    record = search(method, frozen("llama"), Record(tmp_path), sparsity=sparsity)
    found = masks(record)
    assert all(((~keep).sum(1) == int(keep.shape[1] * sparsity)).all() for keep in found.values())
    zeroed = sum(int((~keep).sum()) for keep in found.values()) / sum(keep.numel() for keep in found.values())
    assert pruning.summary(record)["zeroed"] == zeroed
    assert set(pruning.summary(record)["kinds"]) == {p.removeprefix("model.layers.0.") for p in found if "rs.0" in p}


@pytest.mark.parametrize("pattern", ["1:4", "3:4", "2:8", "7:8"])
def test_n_of_m_keeps_n_in_every_group(tmp_path, pattern):
    n, m = map(int, pattern.split(":"))
    found = masks(search(wanda, frozen("llama"), Record(tmp_path), pattern=pattern))
    assert all((keep.view(len(keep), -1, m).sum(-1) == n).all() for keep in found.values())


def test_of_equal_scores_the_first_go():
    rows = pruning.lowest_in_rows(torch.ones(2, 8), pruning.Params())
    assert rows.tolist() == [[False] * 4 + [True] * 4] * 2
    groups = pruning.lowest_in_rows(torch.ones(1, 8), pruning.Params(pattern="1:4"))
    assert groups.tolist() == [[False, False, False, True] * 2]


def test_the_papers_alpha_weighs_the_gradients(tmp_path):
    model, tokens = frozen("llama"), CALIBRATION.windows(COUNT, LENGTH, SEED)
    gradient = plain_gradients(model, tokens, "l2", "paper")
    for alpha in (0.0, 3.0):
        record = search(gblm, model, Record(tmp_path / str(alpha)), norm="l2", form="paper", alpha=alpha)
        plain = plain_masks(model, tokens, "unstructured", gblm_scores(gradient, "paper", COUNT, alpha))
        assert differing(masks(record), plain) == 0
    assert differing(masks(Record(tmp_path / "0.0")), plain_masks(model, tokens, "unstructured", wanda_scores)) == 0


def test_the_sum_of_the_code_is_half_precision(tmp_path):
    """Sums in fp16 lose small addends; the paper's do not."""
    norm = gradients.Norm("l1", 100.0, half=True)
    total = norm.zero(torch.zeros(1))
    for _ in range(3):
        norm.add(total, torch.tensor([40.96]))
        norm.add(total, torch.tensor([0.01]))
    assert norm.of(total).tolist() == [3 * 4096.0 + 0.0] == [12288.0]
    assert total.dtype == torch.float16


# --- what apply does to a model ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_apply_zeroes_what_the_masks_leave_out_and_nothing_else(tmp_path, name):
    dense, model = frozen(name), frozen(name)
    record = search(wanda, model, Record(tmp_path), pattern="2:4")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True)), "still dense"
    assert not any(p.requires_grad for p in model.parameters())
    wanda.apply(model, Record(tmp_path))
    found, spec = masks(record), spec_of(model)
    for path, parameter in model.named_parameters():
        before = dense.get_parameter(path)
        keep = found.get(path.removesuffix(".weight")) if path.endswith(".weight") else None
        if keep is None:
            assert torch.equal(parameter, before)
        else:
            keep = keep.t() if spec.transposed else keep
            assert torch.equal(parameter, torch.where(keep, before, 0.0))
            assert not parameter[~keep].signbit().any()


def test_layers_and_modules_limit_what_is_touched(tmp_path):
    found = masks(search(gblm, frozen("llama"), Record(tmp_path / "a"), layers=(1,), modules=("q_proj", "down_proj")))
    assert set(found) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    found = masks(search(magnitude, frozen("gpt2"), Record(tmp_path / "b"), modules=("mlp.c_proj",)))
    assert set(found) == {f"transformer.h.{i}.mlp.c_proj" for i in range(2)}


def test_modules_in_part_score_as_all_of_them_do(tmp_path):
    """k reads what q reads, which is then not observed itself; layer 0 is dense, as nothing there was asked for."""
    model, tokens = frozen("llama"), CALIBRATION.windows(COUNT, LENGTH, SEED)
    found = masks(search(wanda, model, Record(tmp_path), modules=("k_proj",)))
    plain = plain_masks(model, tokens, "unstructured", wanda_scores)
    assert torch.equal(found["model.layers.0.self_attn.k_proj"], plain["model.layers.0.self_attn.k_proj"])


def test_methods_follow_each_other(tmp_path):
    """Pruning beside shared bases, and pruning again what is pruned: zeros stay zeros."""
    model = frozen("llama")
    shared = Record(tmp_path / "shared")
    basis_sharing.search(
        model, CALIBRATION, shared, basis_sharing.Params(**SETTINGS, modules=("q_proj",)), progress=False
    )
    basis_sharing.apply(model, shared)
    with pytest.raises(BadParameter, match=r"layers\.0\.self_attn\.q_proj is compressed already; prune first, or"):
        search(gblm, model, Record(tmp_path / "all"))
    gblm.apply(model, search(gblm, model, Record(tmp_path / "gblm"), modules=("up_proj", "o_proj")))
    first = model.get_parameter("model.layers.1.mlp.up_proj.weight").clone()
    wanda.apply(model, search(wanda, model, Record(tmp_path / "wanda"), sparsity=0.75, modules=("up_proj",)))
    second = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    assert ((second == 0).sum(1) == 12).all()
    assert (second[first == 0] == 0).all()


def test_a_model_that_lost_a_block_is_pruned(tmp_path):
    model = frozen("llama")
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers, model.layer_origins = 1, [1]
    found = masks(search(gblm, model, Record(tmp_path), pattern="2:4"))
    assert {path.split(".")[2] for path in found} == {"0"}


def test_masks_survive_as_bits():
    torch.manual_seed(0)
    for inputs in (1, 7, 8, 9, 64):
        keep = torch.rand(5, inputs) > 0.5
        assert pruning.pack_bits(keep).shape == (5, (inputs + 7) // 8)
        assert torch.equal(pruning.unpack_bits(pruning.pack_bits(keep), inputs), keep)
    assert pruning.pack_bits(torch.tensor([[True, False, False, True]])).tolist() == [[0b1001]]


# --- through convert --------------------------------------------------------------------------------

TOKENS = torch.tensor([1, 7, 3, 30, 39, 0, 12])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i * i % 37}" for i in range(3000)))
    return path


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2", "opt-projected"])
@pytest.mark.parametrize("method", ["gblm:norm=l2", "wanda:pattern=2:4", "magnitude:pattern=4:8"])
def test_the_folder_holds_the_pruned_model(tmp_path, text, name, method):
    src = tiny.checkpoint(tmp_path / "src", name)
    given, reads = ("", None) if method.startswith("magnitude") else (",samples=20,length=16", text)
    convert(src, tmp_path / "out", methods=[method + given], calibration=reads, progress=False)
    model, (step,) = instantiate(open_source(src), torch.float32), recipe.parse([method + given])
    record = Record(tmp_path / "record")
    read = Calibration(tokenizer_of(open_source(src)), text.read_text(), text.name)
    step.method.search(model, read, record, step.params, progress=False)
    step.method.apply(model, record)
    for path, keep in masks(record).items():
        weight = model.get_submodule(path).weight
        assert torch.equal((weight.t() if spec_of(model).transposed else weight) != 0, keep)
    found = decoder_logits(load(tmp_path / "out", "cpu"))(TOKENS)
    assert torch.allclose(found, model(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-5)
    with open_folder(tmp_path / "out") as folder:
        (done,) = folder.manifest.provenance["methods"]
    assert done["name"] == step.method.NAME
    assert done["result"] == pruning.summary(record)
    assert (done["calibration"] is None) == (step.method is magnitude)


def test_only_methods_that_read_a_text_ask_for_one(tmp_path):
    src = tiny.checkpoint(tmp_path / "src")
    convert(src, tmp_path / "out", methods=["magnitude:sparsity=0.25"], progress=False)
    with pytest.raises(BadParameter, match="wanda reads a text; give --calibration FILE"):
        convert(src, tmp_path / "other", methods=["magnitude", "wanda"], progress=False)


def test_blocks_go_first_and_weights_then(tmp_path, text):
    """A gradient file of the whole model serves the layers that are left."""
    src, file = tiny.checkpoint(tmp_path / "src"), gradient_file(tmp_path / "gradients.pth")
    methods = ["sleb:remove=0", f"gblm:pattern=2:4,samples=20,length=16,gradients={file}"]
    convert(src, tmp_path / "out", methods=methods, calibration=text, progress=False)
    decoder = load(tmp_path / "out", "cpu")
    with open_folder(tmp_path / "out") as folder:
        blocks, pruned = folder.manifest.provenance["methods"]
        assert folder.config["num_hidden_layers"] == len(decoder.spec.layers) == 1
    assert (blocks["name"], pruned["result"]["zeroed"]) == ("sleb", 0.5)


def test_another_gradient_file_is_another_conversion(tmp_path, text, monkeypatch):
    src, file = tiny.checkpoint(tmp_path / "src"), gradient_file(tmp_path / "gradients.pth")
    methods = [f"gblm:samples=20,length=16,gradients={file}"]

    def run(name: str) -> bytes:
        convert(src, tmp_path / name, methods=methods, calibration=text, progress=False)
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = run("first")
    with monkeypatch.context() as patched:
        patched.setattr(gblm, "apply", dying_after(0, gblm.apply))
        with pytest.raises(Killed):
            run("torn")
    gradient_file(file, change=lambda stored: stored.update({key: g.flip(1) * 10 for key, g in stored.items()}))
    assert run("torn") == run("whole") != first


def test_a_killed_conversion_resumes_with_the_masks_that_are_there(tmp_path, text, monkeypatch):
    src, recipes = tiny.checkpoint(tmp_path / "src"), ["gblm:samples=20,length=16", "magnitude:sparsity=0.75"]
    convert(src, tmp_path / "whole", methods=recipes, calibration=text, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(magnitude, "search", dying_after(0, magnitude.search))
        with pytest.raises(Killed):
            convert(src, tmp_path / "torn", methods=recipes, calibration=text, progress=False)
    assert not (tmp_path / "torn").exists()
    monkeypatch.setattr(pruning, "LayerWalk", None)
    convert(src, tmp_path / "torn", methods=recipes, calibration=text, progress=False)
    assert (tmp_path / "torn/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


# --- killed and taken up again ----------------------------------------------------------------------


class Killed(Exception):
    pass


def dying_after(calls: int, real: Callable) -> Callable:
    made: list[int] = []

    def step(*given: object) -> object:
        if len(made) == calls:
            raise Killed
        made.append(1)
        return real(*given)

    return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Record]:
    """What a search gives that nobody kills: 3 chunks of gradients and the masks of 2 layers, and the plan."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gradients, "CHUNK_TOKENS", 5 * LENGTH)
        yield search(gblm, frozen("llama"), Record(tmp_path_factory.mktemp("whole")), norm="l2")


@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("between", ["parts", "files"])
def test_a_search_that_was_killed_resumes_to_the_same_bytes(tmp_path, monkeypatch, whole, after, between):
    """Also between the two files of a part: gradients that are on disk are never added twice."""
    torn = Record(tmp_path)
    with monkeypatch.context() as patched:
        if between == "parts":
            patched.setattr(Record, "save", dying_after(after, Record.save))
        else:
            patched.setattr(record_module, "replace_file", dying_after(after, record_module.replace_file))
        with pytest.raises(Killed):
            search(gblm, frozen("llama"), torn, norm="l2")
    search(gblm, frozen("llama"), torn, norm="l2")
    files = sorted(path.name for path in whole.folder.iterdir())
    assert sorted(path.name for path in torn.folder.iterdir()) == files
    assert len(files) == 2 * (2 + 2 + 1)
    assert all((whole.folder / n).read_bytes() == (torn.folder / n).read_bytes() for n in files)


def test_finished_parts_are_not_computed_again(tmp_path, monkeypatch):
    record = search(gblm, frozen("llama"), Record(tmp_path))
    monkeypatch.setattr(gradients, "_chunk", None)
    monkeypatch.setattr(pruning, "LayerWalk", None)
    search(gblm, frozen("llama"), record)


def test_an_interrupted_layer_leaves_the_model_dense(tmp_path, monkeypatch):
    model, run = frozen("llama"), pruning.LayerWalk.run
    monkeypatch.setattr(pruning.LayerWalk, "run", dying_after(1, run))  # the second goes through the pruned layer
    with pytest.raises(Killed):
        search(wanda, model, Record(tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), frozen("llama").parameters(), strict=True))


# --- gradient files ---------------------------------------------------------------------------------


def gradient_file(path: Path, name: str = "llama", change=lambda stored: None) -> Path:
    """A published file of this model, from gradients computed plainly."""
    model = frozen(name)
    spec = spec_of(model)
    stored = {}
    for module, g in plain_gradients(model, CALIBRATION.windows(COUNT, LENGTH, SEED), "l1", "code").items():
        i = next(i for i in range(len(spec.layers)) if module.startswith(spec.path(i, "")))
        stored[f"{module.removeprefix(spec.path(i, ''))}_layer_{i}"] = g.t() if spec.transposed else g
    change(stored)
    torch.save(stored, path)
    return path


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-projected"])
def test_a_published_gradient_file_gives_the_masks_of_computed_gradients(tmp_path, monkeypatch, name):
    file = gradient_file(tmp_path / "gradients.pth", name)
    computed = search(gblm, frozen(name), Record(tmp_path / "computed"))
    monkeypatch.setattr(gradients, "_chunk", None)
    read = search(gblm, frozen(name), Record(tmp_path / "read"), gradients=str(file))
    assert differing(masks(read), masks(computed)) == 0
    zero = search(gblm, frozen(name), Record(tmp_path / "zero"), gradients=str(file), alpha=0.0)
    assert differing(masks(zero), masks(search(wanda, frozen(name), Record(tmp_path / "wanda")))) == 0


def test_layers_of_a_gradient_file_go_by_their_first_indices(tmp_path):
    file = gradient_file(tmp_path / "gradients.pth")
    model = frozen("llama")
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers = 1
    with pytest.raises(SourceError, match=r"holds self_attn.q_proj_layer_1, and the model's last layer is 0"):
        search(gblm, model, Record(tmp_path / "a"), gradients=str(file))
    model.layer_origins = [1]
    gradient = gradients.open_published(file, model, {0: ["model.layers.0.mlp.up_proj"]})
    stored = torch.load(file, weights_only=True)
    assert torch.equal(gradient("model.layers.0.mlp.up_proj"), stored["mlp.up_proj_layer_1"])


Q = "self_attn.q_proj_layer_1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(Q), rf"has no {Q}, which is the gradient of model.layers.1.self_attn.q_proj"),
        (lambda s: s.update({Q: s[Q][:3]}), rf"{Q} in .* is \[3, 16\] torch.float16, the weight of .* is \[16, 16\]"),
        (lambda s: s.update({Q: s[Q].int()}), rf"{Q} in .* is \[16, 16\] torch.int32"),
        (lambda s: s.update({"mlp.up_proj_layer_2": s[Q]}), "holds mlp.up_proj_layer_2, and the model's last layer"),
        (lambda s: s.update({Q: s[Q].index_fill(0, torch.tensor([2]), torch.nan)}), rf"{Q} in .* hold nan at \[2, 0\]"),
        (lambda s: s.update({Q: [1.0]}), "is not a dictionary of tensors"),
    ],
)
def test_a_gradient_file_of_another_model_is_refused(tmp_path, change, message):
    file = gradient_file(tmp_path / "gradients.pth", change=change)
    with pytest.raises(SourceError, match=message):
        search(gblm, frozen("llama"), Record(tmp_path / "r"), gradients=str(file))


def test_a_gradient_file_that_is_none_is_refused(tmp_path):
    file = gradient_file(tmp_path / "gradients.pth")
    file.write_bytes(file.read_bytes()[:1000])
    other = tmp_path / "text.pth"
    other.write_text("no pickle")
    for path in (file, other, tmp_path / "missing.pth"):
        with pytest.raises(SourceError, match=rf"the gradient file .*{path.name} cannot be read"):
            search(gblm, frozen("llama"), Record(tmp_path / "r"), gradients=str(path))


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [gblm, wanda, magnitude])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(tmp_path, method, value):
    model = frozen("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[2, 3] = value
    message = {gblm: r"the loss on window 0 of the calibration text is nan"}.get(
        method, rf"the scores of model.layers.1.mlp.up_proj hold {value} at \[2, 3\]; look at its weights"
    )
    with pytest.raises(SourceError, match=message):
        search(method, model, Record(tmp_path))


def test_gradients_that_overflow_half_precision_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"the gradients of .* hold inf at .* choose a smaller alpha, or form=paper"):
        search(gblm, frozen("llama"), Record(tmp_path), alpha=1e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wanda:sparsity=1.5", "wanda: sparsity=1.5 is outside 0.01 to 0.99"),
        ("wanda:sparsity=-1", "wanda: sparsity=-1 is outside 0.01 to 0.99"),
        ("wanda:sparsity=nan", "wanda: sparsity=nan is outside 0.01 to 0.99"),
        ("gblm:norm=l3", "gblm: norm=l3 is not one of l1, l2"),
        ("gblm:form=both", "gblm: form=both is not one of code, paper"),
        ("gblm:alpha=-1", "gblm: alpha=-1 is outside 0 to 1e"),
        ("magnitude:pattern=4:2", "pattern=4:2 is neither unstructured nor N:M with N from 1 to M - 1"),
        ("magnitude:pattern=4:4", "pattern=4:4 is neither"),
        ("magnitude:pattern=0:4", "pattern=0:4 is neither"),
        ("magnitude:pattern=half", "pattern=half is neither"),
        ("magnitude:samples=3", "magnitude has no parameter 'samples'"),
        ("gblm:pattern=2:4,sparsity=0.6", "pattern=2:4 zeroes 0.5 of the weights, sparsity=0.6 asks for another share"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(text, message):
    with pytest.raises(BadParameter, match=message):
        recipe.parse([text])


def test_recipes_hold_patterns_and_files():
    (step,) = recipe.parse(["gblm:pattern=2:4,norm=l2:gradients=/data/g,1.pth,layers=0-2"])
    assert step.params == gblm.Params(pattern="2:4", norm="l2", gradients="/data/g,1.pth", layers=(0, 1, 2))
    assert recipe.parse(["wanda:pattern=4:8:sparsity=0.5"])[0].params.n_of_m == (4, 8)
    with pytest.raises(BadParameter, match="sparsity=2 is not between 0 and 1"):
        wanda.Params(sparsity=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "2:3"}, "pattern=2:3 needs inputs in whole groups of 3, model.layers.0.self_attn.q_proj has 16"),
        ({"pattern": "4:16"}, "pattern=4:16 needs inputs in whole groups of 16, model.layers.0.mlp.down_proj has 24"),
        ({"layers": (2,)}, "layers names layer 2, the model has layers 0 to 1"),
        ({"modules": ("w2",)}, "modules names 'w2', the linears of a layer are self_attn.q_proj, "),
    ],
)
def test_what_the_model_does_not_have(tmp_path, given, message):
    for method in (gblm, wanda, magnitude):
        with pytest.raises(BadParameter, match=message):
            search(method, frozen("llama"), Record(tmp_path / method.NAME), **given)


def test_masks_of_another_model_are_refused(tmp_path):
    record = search(magnitude, frozen("llama"), Record(tmp_path))
    with pytest.raises(BadParameter, match=r"the mask of model.layers.0.self_attn.q_proj is \[16, 16\], its weight"):
        magnitude.apply(frozen("qwen3"), record)
