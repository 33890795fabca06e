"""The LTE table: its choices of groups on tiny models, its rows, its pictures, and the whole command in small."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

from pared.bench import plots, quality, routed, routed_decisions, routed_decode, routed_plot
from pared.bench.end_to_end import Disagreement
from pared.converters.calibration import Calibration
from pared.converters.record import Record
from pared.converters.routed import RoutedMlp
from pared.converters.routed import routed as routed_ffns
from pared.converters.sources.detect import open_source
from pared.errors import KernelError
from pared.kernels import routed_ffn
from pared.runtime.llm import LLM
from pared.runtime.params import SamplingParams
from pared.tests import tiny, trained
from pared.tests.test_pruning import Words

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))


class Texts(Words):
    """As many tokens as texts, so that different texts are different tokens."""

    def __call__(self, text: str, **_: object) -> Texts:
        generator = torch.Generator().manual_seed(len(text))
        self.input_ids = torch.randint(0, 40, (1, 4000), generator=generator)
        return self


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """The bench on a tiny model: two eta, ten steps a stage."""
    monkeypatch.setattr(routed, "WORK", tmp_path / "work")
    monkeypatch.setattr(routed, "TABLE", replace(routed.TABLE, path=tmp_path / "results" / "quality_routed"))
    monkeypatch.setattr(routed, "SIZE", 8)
    monkeypatch.setattr(routed, "TRAINING", routed.TRAINING | {"tokens": 640, "length": 16})
    monkeypatch.setattr(routed, "SETTINGS", (routed.Setting(1.0), routed.Setting(4.0)))
    monkeypatch.setattr(routed, "BATCHES", (1, 2, 4, 8))
    monkeypatch.setattr(routed, "UNION_LENGTH", 16)
    monkeypatch.setattr(routed, "fresh", lambda: tiny.model().requires_grad_(False))
    monkeypatch.setattr(routed, "calibration", lambda: Calibration(Texts(), "text", "text.txt"))
    monkeypatch.setattr(routed, "perplexities", loss_of)
    return tmp_path


def loss_of(model: torch.nn.Module) -> dict[str, float]:
    """Something that depends on all of the model."""
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        return dict.fromkeys(routed.TEXTS, model(tokens).logits.square().mean().item())


def test_every_row_is_a_recipe_of_its_own():
    found = [routed.params(setting) for setting in routed.SETTINGS]
    assert len(set(found)) == len(found)
    assert len({p.eta for p in found if p.train == "full"}) == len(routed.CURVE) >= 4
    assert {p.train for p in found} == {"full", *routed.SMALL}
    assert all((p.tokens, p.tau) == (routed.TOKENS, 0.5) for p in found)
    assert routed.TOKENS >= 200_000


def test_the_whole_command_runs_and_a_second_one_has_nothing_left_to_do(small, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["routed"])
    routed.main()
    results = routed.TABLE.load()
    assert set(results["rows"]) == {"dense", "finetuned", "eta-1", "eta-4"}
    for name in ("eta-1", "eta-4"):
        row = results["rows"][name]
        assert row.keys() >= {*routed.KINDS, "sparsity", "layers", "union", "training"}
        assert row["sparsity"] == pytest.approx(sum(row["layers"]) / 2)
        assert row["union"]["1"] == pytest.approx(row["sparsity"], abs=1e-6)
        assert row["union"]["1"] >= row["union"]["2"] >= row["union"]["4"]
        assert len({row[kind]["boolq"] for kind in routed.KINDS}) == 4, "each choice is another model"
    page = (small / "results" / "quality_routed.md").read_text()
    assert page.count("| router, both stages |") == 2
    assert "eta-4: groups out by layer" in page
    monkeypatch.setattr(routed, "fresh", None)
    before = capsys.readouterr().out
    routed.main()
    assert capsys.readouterr().out == before
    figures = dict(plots.figures(small / "results"))
    assert figures.keys() == {"quality_routed", "routed_batches"}
    drawn = {y for line in figures["quality_routed"].axes[0].lines for y in line.get_ydata()}
    assert drawn >= {results["rows"]["eta-1"]["oracle"]["boolq"], results["rows"]["finetuned"]["perplexity"]["boolq"]}
    json.dumps(results)


def test_a_curve_that_leaves_the_picture_is_named_where_it_is_seen():
    rows = {
        setting.name: {"sparsity": out, "router": {"boolq": 50.0}, "oracle": {"boolq": oracle}}
        for setting, out, oracle in zip(routed.CURVE, (0.3, 0.6, 0.9), (30.0, 300.0, 3000.0), strict=False)
    }
    assert routed_plot.HIGHEST < 3000
    (axes,) = routed_plot.by_sparsity({"rows": rows | {"finetuned": {"perplexity": {"boolq": 16.0}}}}).axes
    names = {label.get_text(): label.xy for label in axes.texts if hasattr(label, "xy")}
    assert names[routed.KINDS["oracle"]][0] == 60 and names[routed.KINDS["router"]][0] == 90


def grouped(rule, small: Path, out: float) -> RoutedMlp:
    """The first FFN of the tiny model with a third of its groups chosen by the rule."""
    setting, orders = routed.SETTINGS[0], torch.arange(24)
    record = Record(routed.WORK / setting.name)
    record.save("start", {f"order.model.layers.{i}.mlp": orders for i in range(2)}, {})
    routed.TABLE.save({"protocol": routed.PROTOCOL, "rows": {}}, "dense", {"perplexity": loss_of(tiny.model())})
    results = routed.TABLE.load()
    row = {"layers": [out, out], "sparsity": out, "union": {"8": 0}, "router": {"boolq": 1.0, "xsum": 1.0}}
    routed.TABLE.save(results, setting.name, row)
    model = routed.grouped(tiny.model().requires_grad_(False), setting, rule)
    return next(iter(routed_ffns(model).values()))


def test_the_static_choice_is_that_of_the_largest_weights(small):
    module = grouped(routed.static, small, out=0.6)
    module.up.weight.data[8:16] *= 9
    module(X)
    assert module.shares.tolist() == [[0, 1, 0]] * 6


def test_the_oracle_keeps_the_groups_of_each_token_that_add_the_most(small):
    module = grouped(routed.oracle, small, out=0.6)
    module(X)
    scaled = module.neurons(X) * module.down.weight.norm(dim=0)
    parts = torch.stack([part.norm(dim=1) for part in scaled.split(8, dim=1)])
    assert module.shares.argmax(1).tolist() == parts.argmax(0).tolist()
    assert module.shares.sum(1).tolist() == [1] * 6
    assert len(set(module.shares.argmax(1).tolist())) > 1


# --- what runs ---------------------------------------------------------------------------------------


@pytest.fixture
def packable(small, monkeypatch) -> Path:
    """The same, with all that it takes to make folders of its models."""
    monkeypatch.setattr(routed, "TRAINING", routed.TRAINING | {"tokens": 128})
    source = open_source(tiny.checkpoint(small / "source"))
    monkeypatch.setattr(quality, "source", lambda: source)
    monkeypatch.setattr(quality, "WORK", small / "work")
    monkeypatch.setattr(routed_decisions, "calibration", routed.calibration)
    monkeypatch.setattr(routed_decisions, "LENGTH", 16)
    monkeypatch.setattr(routed_decisions, "WAYS", {"one by one": 1, "chunks": 5, "at once": 16})
    table = replace(routed_decisions.TABLE, path=small / "results" / "routed_decisions")
    monkeypatch.setattr(routed_decisions, "TABLE", table)
    return small


def test_decisions_are_compared_for_every_row_that_is_trained(packable, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["routed_decisions"])
    with pytest.raises(SystemExit, match=r"no row is trained in .*; python -m pared\.bench\.routed trains them"):
        routed_decisions.main()
    routed.trained(routed.SETTINGS[1])
    routed_decisions.main()
    (row,) = routed_decisions.TABLE.load()["rows"].values()
    assert row["decisions"] == 4 * 16 * 2 * 3
    assert row["ways"]["at once"]["equal"] == 1
    assert 0 < row["sparsity"] < 1
    out = capsys.readouterr().out
    assert out.count("ours, ") == 3 and "eta" in out
    differing = max(mean(one["masked, bf16"]) for one in row["ways"].values())
    verdict = "at most" if differing <= routed_decisions.BAR else "above"
    assert f"eta-4: {100 * differing:.3f} % differ from masked bf16, {verdict} 0.5 %." in out


def test_bf16_turns_few_decisions_of_a_trained_model(packable, monkeypatch):
    """The whole model in bf16, gathered: within the bar, and no more than torch's own bf16 but for chance (4 sigma)."""

    def turned(layers: list[float]) -> float:
        return sum(layers) * 32 * 16 * 6

    source = open_source(trained.checkpoint(packable / "trained"))
    monkeypatch.setattr(quality, "source", lambda: source)
    monkeypatch.setattr(routed, "fresh", trained.model)
    monkeypatch.setattr(routed, "TRAINING", routed.TRAINING | {"tokens": 1280})
    monkeypatch.setattr(routed_decisions, "WINDOWS", 32)
    model, _ = routed.trained(routed.SETTINGS[1])
    found = routed_decisions.measure(model)
    assert found["decisions"] == 32 * 16 * 6 * 6
    torchs = turned(found["masked, bf16"])
    for way, one in found["ways"].items():
        assert one["gathered against masked"] == 0
        assert mean(one["masked, bf16"]) <= routed_decisions.BAR, way
        assert turned(one["masked, fp32"]) <= torchs + 4 * torchs**0.5, way
    assert 0.05 < found["sparsity"] < 0.95


def test_reading_every_group_must_not_change_a_bit(packable, monkeypatch):
    model, _ = routed.trained(routed.SETTINGS[0])
    honest, alone = routed_ffn.apply, routed_decisions.itself
    woken = []

    def watching(x, prepared):
        woken.append(routed_ffn.decisions(routed_decisions.everyone(x, prepared), prepared))
        return alone(x, prepared)

    def other_sums(x, prepared, path, awake=None):
        return honest(x, prepared, path, awake=awake) * (1 + bool(routed_ffn.decisions(x[-1:], prepared).all()))

    monkeypatch.setattr(routed_decisions, "itself", watching)
    with monkeypatch.context() as patched:
        patched.setattr(routed_ffn, "apply", other_sums)
        with pytest.raises(KernelError, match=r"reading every group changes \d+ values"):
            routed_decisions.measure(model)
    assert woken and all(bits.all() for bits in woken)


def test_wrong_decisions_are_errors(packable, monkeypatch):
    model, _ = routed.trained(routed.SETTINGS[0])
    honest = routed_ffn.decisions
    with monkeypatch.context() as patched:
        patched.setattr(routed_ffn, "decisions", lambda x, prepared: ~honest(x, prepared))
        with pytest.raises(KernelError, match=r"groups were woken, the routers alone wake \["):
            routed_decisions.measure(model)
    x, bits = torch.eye(3), torch.eye(3) > 0
    seen, turned = routed_decisions.Seen([x], [bits]), routed_decisions.Seen([x], [~bits])
    assert routed_decisions.equal_rows(seen, routed_decisions.Seen([x.roll(1, 0)], [~bits])) == 0
    with pytest.raises(KernelError, match="layer 0: rows of the same bits differ in 9 decisions"):
        routed_decisions.equal_rows(seen, turned)


def test_speed_is_held_against_what_the_bytes_read_promise(packable):
    for setting in routed.SETTINGS:
        routed.trained(setting)
    result = routed_decode.measure(routed.SETTINGS, prompt_tokens=8, new_tokens=6, rounds=2)
    dense, *others = result["rows"].values()
    assert list(result["rows"]) == ["dense", "eta-1", "eta-4"]
    assert (dense["sparsity"], dense["bytes_promise"]) == (0, 1)
    router, counts, ffn = 3 * 16 * 4, 24, 3 * 24 * 16 * 2
    for row in others:
        read = sum(router + counts - slept * ffn for slept in row["layers"])
        assert row["bytes_per_token"] == pytest.approx(dense["bytes_per_token"] + read)
        assert row["of_the_promise"] == pytest.approx(
            row["ratio"][1] * row["bytes_per_token"] / dense["bytes_per_token"]
        )
    assert 0 < others[0]["sparsity"] < 1
    assert result["agreement"].keys() == {"eta-1", "eta-4"}
    assert [line[0] for line in routed_decode.lines(result)] == ["dense", "eta-1", "eta-4"]
    assert "6 tokens after 8 of" in routed_decode.title(result)


def test_only_the_tokens_of_the_answer_count(packable):
    model, _ = routed.trained(routed.SETTINGS[0])
    with quality.as_folder(model) as folder:
        llm = LLM(folder, device="cpu")
        answer = llm.generate([1, 2, 3, 4], SamplingParams(max_tokens=9, ignore_eos=True))[0].token_ids
        uses = routed_decode.decoded(llm, [1, 2, 3, 4], 9)
        tokens = torch.tensor([[1, 2, 3, 4, *answer[:-1]]])
    bits = routed_decisions.masking(model, tokens, torch.bfloat16)
    assert [use.sparsity for use in uses] == pytest.approx([1 - one[4:].float().mean().item() for one in bits], abs=0.1)


def test_no_speed_of_a_model_that_answers_otherwise(packable, monkeypatch):
    routed.trained(routed.SETTINGS[0])

    def turned(model, dtype):
        other = routed_decisions.rounded(copy.deepcopy(model), dtype)
        other.lm_head.weight.data.neg_()
        return other

    monkeypatch.setattr(routed_decode, "rounded", turned)
    with pytest.raises(Disagreement, match="one of the two is wrong"):
        routed_decode.measure(routed.SETTINGS[:1], prompt_tokens=8, new_tokens=6, rounds=1)
