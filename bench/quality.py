"""`python -m pared.bench.quality`: what Basis Sharing costs SmolLM2-135M in perplexity, ratio by ratio, as one table.

Rows are cached in the JSON that is written, so that a stopped run goes on; `--rows` picks some. Calibration
and training read BoolQ "train" passages, perplexity BoolQ "dev" passages: no passage is in both.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..kernels.dispatch import set_threads
from ..terminal import print_table
from .tables import Table

S = TypeVar("S")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "quality_basis_sharing"
WORK = ROOT / ".data" / "quality"
SAMPLES, LENGTH, SEED = 256, 512, 2023
WINDOWS = 16
RECOVERY = {"tokens": 32768, "length": 512, "batch": 2, "lr": 5e-4}
PROTOCOL = (
    "The reference is SmolLM2-135M-Instruct dequantised from a Q4_1 GGUF file, not its bf16 checkpoint: its weights "
    "lie on a 4-bit grid, which adds noise that no low rank catches, so every row looks worse than it would on the "
    f"original. Method and evaluation in fp32. Calibration: {SAMPLES} windows of {LENGTH} tokens of BoolQ train "
    f"passages. Perplexity: the first {WINDOWS} windows of {LENGTH} tokens of BoolQ dev passages, joined by blank "
    f"lines. Recovery: LoRA on the coefficients, {RECOVERY['tokens']} tokens of the training passages at a learning "
    f"rate of {RECOVERY['lr']:g}; the dense model had no such training, so part of what it gains is that it knows this "
    "kind of text better. Ratio: share of the block linears' weights taken away; bytes: what a decoded token "
    "reads of the block linears in bf16, and what of them is stored, over dense, in the best of dense, factored and "
    "pivoted layouts."
)
COLUMNS = ("ratio", "group", "share", "ranks", "perplexity", "recovered", "bytes read", "bytes stored")


@dataclass(frozen=True)
class Setting:
    """A line of the table."""

    ratio: int
    group: int
    share: str = "paper"
    ranks: str = "paper"

    @property
    def name(self) -> str:
        extras = [extra for extra in (self.share, self.ranks) if extra != "paper"]
        return "-".join([str(self.ratio), f"g{self.group}", *extras])

    @property
    def recipe(self) -> str:
        return (
            f"basis_sharing:ratio={self.ratio},group={self.group},share={self.share},ranks={self.ranks},"
            f"samples={SAMPLES},length={LENGTH},seed={SEED}"
        )


SETTINGS = (
    *(Setting(ratio, group) for ratio in (10, 20, 30, 40, 50) for group in (1, 2)),
    Setting(20, 4),
    Setting(20, 2, "auto"),
    *(Setting(ratio, group, ranks="pivoted") for ratio in (10, 20) for group in (1, 2)),
)


def main() -> None:
    """Measure what is missing, then print and write the table."""
    set_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help=f"some of {', '.join(s.name for s in SETTINGS)}, separated by commas")
    parser.add_argument("--no-recovery", action="store_true", help="only the compressed models, untrained")
    arguments = parser.parse_args()
    known = {setting.name: setting for setting in SETTINGS}
    wanted = chosen(known, arguments.rows)
    results = load()
    if "dense" not in results["rows"]:
        save(results, "dense", {"perplexity": perplexity(fresh())})
    for step in ("perplexity",) if arguments.no_recovery else ("perplexity", "recovered"):
        for setting in wanted:
            if step not in results["rows"].get(setting.name, {}):
                save(results, setting.name, measure(setting, recover=step == "recovered"))
    print_table("SmolLM2-135M-Instruct, Basis Sharing", COLUMNS, table(results))
    print(PROTOCOL)


def chosen(known: Mapping[str, S], names: str | None) -> list[S]:
    """The settings of these names, separated by commas; all without. Exits naming one that is not known."""
    wanted = list(known) if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"--rows: no row is called {unknown[0]!r}; known are {', '.join(known)}")
    return [known[name] for name in wanted]


# --- results -------------------------------------------------------------------------------------


def load() -> dict[str, Any]:
    """The rows of an earlier run with this protocol, or none."""
    return _table().load()


def save(results: dict[str, Any], name: str, row: dict[str, Any]) -> None:
    """Add to a row, and write JSON and table."""
    _table().save(results, name, row)


def _table() -> Table:
    return Table(RESULTS, "Basis Sharing on SmolLM2-135M-Instruct", PROTOCOL, COLUMNS, table)


def table(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows that are there, under COLUMNS."""
    rows = results["rows"]
    reference = f"{rows['dense']['perplexity']:.2f}"
    lines: list[tuple[str, ...]] = [("0 %", "-", "-", "-", reference, "-", "100.0 %", "100.0 %")]
    for s in SETTINGS:
        if row := rows.get(s.name):
            recovered = f"{row['recovered']:.2f}" if "recovered" in row else "-"
            sizes = (f"{100 * row[key]:.1f} %" for key in ("read", "stored"))
            setting = (f"{s.ratio} %", str(s.group), s.share, s.ranks)
            lines.append((*setting, f"{row['perplexity']:.2f}", recovered, *sizes))
    return lines


# --- measuring -----------------------------------------------------------------------------------


def measure(setting: Setting, recover: bool) -> dict[str, Any]:
    """Compress, train if asked to, and evaluate."""
    from ..converters import recipe
    from ..converters.methods import basis_sharing
    from ..converters.record import Record

    step, training = recipe.parse([setting.recipe, "recover:" + ",".join(f"{k}={v}" for k, v in RECOVERY.items())])
    model, record = fresh(), Record(WORK / setting.name)
    if not recover:
        factorize(model, step.params, record)
    basis_sharing.search(model, calibration(), record, step.params)
    basis_sharing.apply(model, record)
    if not recover:
        facts = {"settings": asdict(step.params), **basis_sharing.summary(record)}
        return {"perplexity": perplexity(model), **sizes(model), **facts}
    trained = Record(WORK / f"{setting.name}-recovered")
    training.method.search(model, calibration(), trained, training.params)
    training.method.apply(model, trained)
    return {"recovered": perplexity(model), "recovery": {**asdict(training.params), **training.method.summary(trained)}}


def factorize(model: Any, params: Any, record: Any) -> None:
    """What `search` begins with, from Gram matrices that all settings share."""
    from .. import families
    from ..converters.groups import Run
    from ..converters.methods import basis_sharing

    spec = families.read(model.config.to_dict())
    grams = dense_grams()

    def of(run: Run, observed: Sequence[str]) -> dict[str, Any]:
        stored = [grams.tensors(f"layer-{i}") for i in run.layers]
        return {path: found[path] for found in stored for path in observed if path in found}

    basis_sharing.factorize_runs(model, spec, params, of, record, progress=True)


def dense_grams() -> Any:
    """Mean x x^T at the linears of the dense model, layer by layer, from one walk; kept under .data/."""
    from tqdm import tqdm

    from .. import families
    from ..converters.calibration import LayerWalk, gram_of_inputs
    from ..converters.groups import kinds
    from ..converters.record import Record

    record, model = Record(WORK / "grams"), fresh()
    spec = families.read(model.config.to_dict())
    if record.holds(f"layer-{len(spec.layers) - 1}"):
        return record
    tokens = calibration().windows(SAMPLES, LENGTH, SEED)
    walk = LayerWalk(model, spec, tokens)
    for i in tqdm(range(len(spec.layers)), "grams", unit="layer"):
        paths = dict.fromkeys(spec.path(i, kind.observed) for kind in kinds(spec))
        with gram_of_inputs({path: model.get_submodule(path) for path in paths}) as found:
            walk.run(i)
        record.save(f"layer-{i}", {path: gram / tokens.numel() for path, gram in found.items()}, {})
    return record


def sizes(model: Any) -> dict[str, float]:
    """Bytes of the block linears over dense in the layout that pack would choose: read per token, and stored."""
    import torch

    from ..converters.layout import encode_group
    from ..converters.modelling import units
    from ..kernels import formats

    dense = read = stored = 0
    for unit in units(model).values():
        dense += sum(2 * n * k for n, k in unit.modules.values())
        for packed in encode_group(unit, torch.bfloat16, None, transposed=False):
            read += formats.by_name(packed.format).traffic(packed, 1).weight_bytes
            stored += sum(tensor.nbytes for tensor in packed.tensors.values())
    return {"read": read / dense, "stored": stored / dense}


def perplexity(model: Any, passages: Sequence[str] | None = None) -> float:
    """On the first windows of these passages, of BoolQ dev without."""
    import torch

    from ..evaluate import perplexity as of
    from .data import boolq_passages, corpus

    text = corpus(list(passages or boolq_passages("dev")[:400]))
    tokens = calibration().tokenizer(text, add_special_tokens=False, verbose=False)

    def logits(window: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(window[None], use_cache=False).logits[0]

    return of(logits, tokens.input_ids[: WINDOWS * LENGTH], LENGTH, progress=True)


@contextlib.contextmanager
def as_folder(model: Any) -> Iterator[Path]:
    """The model as a compact folder in bf16, which is there as long as this is open."""
    import torch

    from ..compact_writer import FolderWriter
    from ..converters.modelling import as_source
    from ..converters.pack import pack

    packed = as_source(model, source())
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as place:
        with FolderWriter(Path(place) / "model", resume_key="") as writer:
            pack(packed, writer, torch.bfloat16, progress=False)
            writer.finish(packed.config | {"dtype": "bfloat16"}, {}, packed.files)
            folder = writer.publish()
        yield folder


@cache
def source() -> Any:
    from ..converters.sources.detect import open_source
    from .data import gguf_path

    return open_source(gguf_path())


def fresh() -> Any:
    """The dense model in fp32."""
    import torch

    from ..converters.modelling import instantiate

    return instantiate(source(), torch.float32)


@cache
def calibration() -> Any:
    """The BoolQ train passages, for calibration and training."""
    from ..converters.calibration import Calibration, tokenizer_of
    from .data import boolq_passages, corpus

    return Calibration(tokenizer_of(source()), corpus(boolq_passages("train")), "BoolQ train passages")


if __name__ == "__main__":
    main()
