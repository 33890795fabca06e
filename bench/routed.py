"""`python -m pared.bench.routed`: LTE on SmolLM2-135M, from training to what is left of its quality, eta by eta.

Every step is kept under .data/routed and every row in the JSON that is written, so that a stopped run goes on; `--rows`
picks some. Training reads BoolQ "train" passages, perplexity BoolQ "dev" passages and XSum articles: no passage is in
two of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels.dispatch import set_threads
from ..terminal import print_table
from .pruning import TEXTS, perplexities
from .quality import ROOT, calibration, chosen, fresh
from .tables import Table

RESULTS = ROOT / "bench" / "results" / "quality_routed"
WORK = ROOT / ".data" / "routed"
SIZE, TOKENS, LENGTH = 32, 204_800, 512
TRAINING = {
    "start": 0.5,
    "lam": 0.002,
    "mu": 20,
    "lr": 1e-4,
    "router_lr": 0.01,
    "batch": 4,
    "length": LENGTH,
    "tokens": TOKENS,
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
UNION_LENGTH = 128  # tokens of each of the 64 texts whose groups are united
KINDS = {
    "router": "router, both stages",
    "static_trained": "largest weights, trained as long",
    "static": "largest weights",
    "oracle": "largest activations of each token",
}
TITLE = "LTE on SmolLM2-135M-Instruct"
PROTOCOL = (
    "The reference is SmolLM2-135M-Instruct dequantised from a Q4_1 GGUF file, not its bf16 checkpoint. Every FFN "
    f"in groups of {SIZE} neurons. Each of two stages trains on {TOKENS} tokens of BoolQ train passages, all "
    f"weights or what the row names: 100 steps of 4 windows of {LENGTH} tokens, AdamW with a peak rate of "
    f"{TRAINING['lr']:g} for weights and {TRAINING['router_lr']:g} for routers, products in bf16 where the machine has "
    f"them. Routers begin with {TRAINING['start']:.0%} of the groups in, lam is {TRAINING['lam']:g}, and mu, the "
    f"weight of our loss against decisions that noise turns, {TRAINING['mu']:g}. Fine-tuned: "
    "the same windows, steps and rates without routing. The other choices have as many groups in each layer as the "
    "router has on average: those of the largest weights (Frobenius norm) for every token, trained in place of the "
    "second stage or put into the fine-tuned model as it is; and the oracle's in the fine-tuned model as it is, those "
    "of the largest activations of each token (norm of what a group adds), which computes every group first. "
    "Perplexity: the first 16 windows of 512 tokens of BoolQ dev passages (Wikipedia) and of XSum articles (news), "
    f"in fp32. Groups out: share that a token leaves out, over layers and 64 windows of {UNION_LENGTH} BoolQ dev "
    "tokens; of a batch: those that none of its texts wakes at the same position."
)
COLUMNS = ("eta", "choice", "groups out", "of a batch of 8", *TEXTS, "boolq, against fine-tuned")


@dataclass(frozen=True)
class Setting:
    """A point of the curve, or the same with less to train. train: `full`, or a key of SMALL."""

    eta: float
    train: str = "full"

    @property
    def name(self) -> str:
        return f"eta-{self.eta:g}" + ("" if self.train == "full" else f"-{self.train}")

    @property
    def recipe(self) -> str:
        given = {"size": SIZE, "eta": f"{self.eta:g}", "train": self.train, **TRAINING}
        return "lte:" + ",".join(f"{key}={value}" for key, value in given.items())


SMALL = {"router": "routers alone, stage 1"}
CURVE = tuple(Setting(eta) for eta in (2.0, 3.0, 4.0, 8.0))
SETTINGS = (*CURVE, *(Setting(4.0, train) for train in SMALL))


def main() -> None:
    """Train and measure what is missing, then print and write the table."""
    set_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help=f"some of {', '.join(s.name for s in SETTINGS)}, separated by commas")
    wanted = chosen({setting.name: setting for setting in SETTINGS}, parser.parse_args().rows)
    results = TABLE.load()
    for name, of in (("dense", fresh), ("finetuned", finetuned)):
        if name not in results["rows"]:
            TABLE.save(results, name, {"perplexity": perplexities(of())})
    for setting in wanted:
        if "router" not in results["rows"].get(setting.name, {}):
            TABLE.save(results, setting.name, measure_router(setting))
    for kind, model in BASELINES.items():
        for setting in wanted:
            if setting.train == "full" and kind not in results["rows"][setting.name]:
                TABLE.save(results, setting.name, {kind: perplexities(model(setting))})
    print_table(TITLE, COLUMNS, table(results))
    print(PROTOCOL)
    print("\n".join(by_layer(results)))


# --- the table -----------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows that are there, under COLUMNS."""
    rows = results["rows"]
    reference = rows.get("finetuned", {}).get("perplexity")
    lines = []
    for name, said in (("dense", "untrained"), ("finetuned", "fine-tuned as long")):
        if name in rows:
            lines.append(("-", said, "0.0 %", "0.0 %", *_measures(rows[name]["perplexity"], reference)))
    for setting in SETTINGS:
        row = rows.get(setting.name, {})
        for kind, said in KINDS.items():
            if kind in row:
                union = f"{100 * row['union']['8']:.1f} %" if kind == "router" else "-"
                sparsity = f"{100 * row['sparsity']:.1f} %"
                choice = SMALL.get(setting.train, said)
                lines.append((f"{setting.eta:g}", choice, sparsity, union, *_measures(row[kind], reference)))
    return lines


def _measures(found: dict[str, float], reference: dict[str, float] | None) -> tuple[str, ...]:
    against = f"{100 * (found['boolq'] / reference['boolq'] - 1):+.1f} %" if reference else "-"
    return (*(f"{found[text]:.2f}" for text in TEXTS), against)


def by_layer(results: dict[str, Any]) -> list[str]:
    """Where the sparsity is, and what a batch leaves of it."""
    said = []
    for setting in SETTINGS:
        if row := results["rows"].get(setting.name):
            layers = " ".join(f"{100 * share:.0f}" for share in row["layers"])
            union = ", ".join(f"{batch}: {100 * share:.1f}" for batch, share in row["union"].items())
            said.append(f"{setting.name}: groups out by layer, in percent: {layers}; by batch: {union}.")
    return said


TABLE = Table(RESULTS, TITLE, PROTOCOL, COLUMNS, table, by_layer)


# --- models --------------------------------------------------------------------------------------


def measure_router(setting: Setting) -> dict[str, Any]:
    """Both stages, and what they are worth."""
    from ..converters.methods import lte

    model, record = trained(setting)
    layers, union = sparsity(model)
    return {
        "router": perplexities(model),
        "sparsity": sum(layers) / len(layers),
        "layers": layers,
        "union": union,
        "training": lte.summary(record)["stages"],
    }


def trained(setting: Setting) -> tuple[Any, Any]:
    """The model after both stages, and the record of its training."""
    from ..converters.methods import lte
    from ..converters.record import Record

    model, record = fresh(), Record(WORK / setting.name)
    lte.search(model, calibration(), record, params(setting))
    lte.apply(model, record)
    return model, record


def settings_trained() -> dict[str, Setting]:
    """The settings whose training is done, by name. Exits where there is none."""
    from ..converters.record import Record

    there = [setting for setting in SETTINGS if (WORK / setting.name).exists()]
    found = {setting.name: setting for setting in there if Record(WORK / setting.name).holds("trained")}
    return found or sys.exit(f"no row is trained in {WORK}; python -m pared.bench.routed trains them")


def params(setting: Setting) -> Any:
    """Of the method, as its recipe says."""
    from ..converters import recipe

    return recipe.parse([setting.recipe])[0].params


def finetuned(stages: Sequence[int] = (1, 2)) -> Any:
    """The model trained as long without routing."""
    from ..converters.methods import lte
    from ..converters.record import Record

    model = fresh()
    for stage in stages:
        lte.train_stage(model, calibration(), Record(WORK / "finetuned"), params(SETTINGS[0]), stage, progress=True)
    return model


def grouped(model: Any, setting: Setting, rule: Callable[[int], Any]) -> Any:
    """`model` with the router's groups, of which `rule(k)` chooses as many as the router does: k in each layer."""
    from .. import families
    from ..converters.record import Record
    from ..converters.routed import place
    from ..converters.routing import route

    spec, orders = families.read(model.config.to_dict()), Record(WORK / setting.name).tensors("start")
    layers = TABLE.load()["rows"][setting.name]["layers"]
    for i, out in enumerate(layers):
        module = route(model, spec, i, orders[f"order.{place(spec, i)}"], params(setting).groups)
        module.rule = rule(max(1, round((1 - out) * module.router.out_features)))
    return model.requires_grad_(False)


def static(k: int) -> Any:
    """The k groups with the largest weights, whatever the token."""
    import torch

    def rule(mlp: Any, _: Any, neurons: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([mlp.gate.weight, mlp.up.weight, mlp.down.weight.t()], dim=1).detach()
        norms = rows.view(-1, mlp.groups.size * rows.shape[1]).norm(dim=1)
        return torch.zeros_like(norms).index_fill(0, norms.topk(k).indices, 1).expand(*neurons.shape[:-1], -1)

    return rule


def oracle(k: int) -> Any:
    """The k groups of each token that add the most: known only once all are computed."""
    import torch

    def rule(mlp: Any, _: Any, neurons: torch.Tensor) -> torch.Tensor:
        energies = mlp.energies(neurons)
        return torch.zeros_like(energies).scatter(-1, energies.topk(k).indices, 1)

    return rule


def static_trained(setting: Setting) -> Any:
    """Fine-tuned for a stage, then trained for another with the static choice in place, fixed by the weights then."""
    import torch

    from ..converters.methods import lte
    from ..converters.record import Record
    from ..converters.routed import routed

    model = grouped(finetuned((1,)), setting, static)
    for module in routed(model).values():
        x, neurons = torch.empty(1, module.up.in_features), torch.empty(1, module.up.out_features)
        module.register_buffer("kept", module.rule(module, x, neurons)[0])

    def rule(mlp: Any, _: Any, neurons: torch.Tensor) -> torch.Tensor:
        return mlp.kept.expand(*neurons.shape[:-1], -1)

    record = Record(WORK / f"static-{setting.name}")
    lte.train_stage(model, calibration(), record, params(setting), 2, progress=True, rule=rule)
    for module in routed(model).values():
        module.rule = rule
    return model


BASELINES: dict[str, Callable[[Setting], Any]] = {  # the quick ones first
    "static": lambda setting: grouped(finetuned(), setting, static),
    "oracle": lambda setting: grouped(finetuned(), setting, oracle),
    "static_trained": static_trained,
}


# --- sparsity ------------------------------------------------------------------------------------


def sparsity(model: Any) -> tuple[list[float], dict[str, float]]:
    """Share of groups that are out: by layer, and by the number of texts that are decoded together, over all layers."""
    from ..converters.calibration import windows
    from ..converters.routed import awake
    from .data import boolq_passages

    count = max(BATCHES)
    tokens = windows(calibration().tokenizer, boolq_passages("dev")[:400], count, UNION_LENGTH, seed=0)
    found = [bits.view(count, UNION_LENGTH, -1) for bits in awake(model, tokens.split(8)).values()]
    layers = [1 - bits.float().mean().item() for bits in found]
    union = {
        str(size): 1 - sum(bits.unflatten(0, (-1, size)).any(1).float().mean().item() for bits in found) / len(found)
        for size in BATCHES
    }
    return layers, union


if __name__ == "__main__":
    main()
