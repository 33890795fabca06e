"""`python -m pared.bench.depth`: SmolLM2-135M without 10 and 20 % of its blocks, what SLEB costs and what it saves.

Perplexity as in bench/quality.py. Speed: the folders in bf16, one sequence, in turns in one run, after each has given
transformers' own tokens. Rows are cached in the JSON that is written and the search under .data/, so that a stopped run
goes on; `--speed` takes the times again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..kernels.dispatch import set_threads
from ..spec import Spec
from ..terminal import print_table
from . import quality, record
from .tables import Table

PERCENTS = (10, 20)
SAMPLES, LENGTH = 16, 512
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 64, 15
RESULTS = record.RESULTS / "depth_sleb"
WORK = quality.ROOT / ".data" / "depth"
PROTOCOL = (
    "The reference is SmolLM2-135M-Instruct dequantised from a Q4_1 GGUF file. SLEB, greedy, barriers 1 and 1, "
    f"searched in fp32 on {SAMPLES} windows of {LENGTH} tokens of BoolQ train passages. Perplexity in fp32: the first "
    f"{quality.WINDOWS} windows of {quality.LENGTH} tokens of BoolQ dev passages, joined by blank lines; nothing was "
    f"trained. Speed: bf16, {PROMPT_TOKENS} tokens of prompt and {NEW_TOKENS} of answer, the three folders in turns, "
    f"medians of {ROUNDS} rounds with quartiles. Left: bytes of weights that a decoded token reads, and "
    "multiplications and additions of a prefill (linears, attention, one row of the head), over those of the whole "
    "model."
)
COLUMNS = ("removed", "blocks", "perplexity", "bytes left", "decode time", "FLOPs left", "prefill time")
DENSE = "dense"


def main() -> None:
    """Measure what is missing, then print and write the table."""
    set_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", action="store_true", help="take the times again, all of them in one run")
    again = parser.parse_args().speed
    table = Table(RESULTS, "Fewer blocks: SLEB on SmolLM2-135M-Instruct", PROTOCOL, COLUMNS, lines)
    results = table.load()
    if DENSE not in results["rows"]:
        table.save(results, DENSE, {"perplexity": quality.perplexity(quality.fresh())})
    for percent in PERCENTS:
        if f"{percent}" not in results["rows"]:
            table.save(results, f"{percent}", shortened(percent))
    if again or "decode" not in results["rows"][f"{PERCENTS[-1]}"]:
        orders = {f"{percent}": results["rows"][f"{percent}"]["order"] for percent in PERCENTS}
        for name, row in speeds(orders).items():
            table.save(results, name, row)
    print_table("SmolLM2-135M-Instruct, SLEB", COLUMNS, lines(results))
    print(PROTOCOL)


def lines(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows that are there, under COLUMNS."""
    rows = results["rows"]
    found: list[tuple[str, ...]] = [("0 %", "-", f"{rows[DENSE]['perplexity']:.2f}", "1", "1", "1", "1")]
    for percent in PERCENTS:
        if row := rows.get(f"{percent}"):
            blocks = ", ".join(str(block) for block in row["order"])
            found.append((f"{percent} %", blocks, f"{row['perplexity']:.2f}", *_speed_cells(row)))
    return found


def _speed_cells(row: dict[str, Any]) -> list[str]:
    if "decode" not in row:
        return ["-"] * 4
    cells = []
    for left, time in (("bytes_left", "decode"), ("flops_left", "prefill")):
        low, middle, high = row[time]
        cells += [f"{row[left]:.3f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"]
    return cells


def shortened(percent: int) -> dict[str, Any]:
    """Search, shorten in memory, and evaluate. The search for fewer blocks is the beginning of that for more."""
    from ..converters import recipe
    from ..converters.methods import sleb
    from ..converters.record import Record

    (step,) = recipe.parse([f"sleb:percent={percent},samples={SAMPLES},length={LENGTH}"])
    model, found = quality.fresh(), Record(WORK / f"sleb-{SAMPLES}x{LENGTH}")
    sleb.search(model, quality.calibration(), found, step.params)
    sleb.apply(model, found)
    return {**sleb.summary(found), "perplexity": quality.perplexity(model)}


def speeds(orders: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Per row: bytes and FLOPs left, and the quartiles of its decode and prefill time over the whole model's.

    Raises Disagreement where a folder and transformers do not give the same tokens.
    """
    import torch

    from ..runtime.llm import LLM
    from .data import boolq_passages, corpus
    from .end_to_end import check
    from .sides import Pared, Transformers, in_turns

    paths = folders(orders)
    sides = [Pared(LLM(path), name) for name, path in paths.items()]
    prompt = sides[0].llm.tokenizer.encode(corpus(boolq_passages("dev")[:40]))[:PROMPT_TOKENS]
    for side in sides:
        check(side, Transformers.load(paths[side.name], torch.bfloat16, side.llm.model.device), prompt, NEW_TOKENS)
    timed = dict(zip(paths, in_turns(sides, prompt, NEW_TOKENS, ROUNDS), strict=True))
    flops = {side.name: prefill_flops(side.llm.model.spec, len(prompt)) for side in sides}
    rates = {name: [one.rate for one in answers] for name, answers in timed.items()}
    firsts = {name: [one.first for one in answers] for name, answers in timed.items()}
    return {
        name: {
            "bytes_left": _bytes(paths[name]) / _bytes(paths[DENSE]),
            "flops_left": flops[name] / flops[DENSE],
            "decode": record.ratios(rates[name], rates[DENSE]),
            "prefill": record.ratios(firsts[DENSE], firsts[name]),
        }
        for name in orders
    }


def folders(orders: dict[str, list[int]]) -> dict[str, Path]:
    """The whole model and the shortened ones as compact folders in bf16, converted where they are not there."""
    from .. import convert
    from .data import gguf_path

    found = {DENSE: WORK / DENSE}
    recipes: dict[str, list[str]] = {DENSE: []}
    for name, order in orders.items():
        blocks = "-".join(str(block) for block in order)
        found[name] = WORK / f"without-{blocks}"
        recipes[name] = [f"sleb:remove={','.join(str(block) for block in order)}"]
    for name, path in found.items():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            convert(gguf_path(), path, methods=recipes[name], dtype="bfloat16")
    return found


def prefill_flops(spec: Spec, tokens: int) -> int:
    """Multiplications and additions of reading a prompt: every linear, causal attention, the head for one row."""
    blocks = sum(2 * tokens * linear.n * linear.k for path, linear in spec.linears().items() if path != spec.names.head)
    attention = sum(2 * 2 * layer.heads * spec.head_dim * (tokens * (tokens + 1) // 2) for layer in spec.layers)
    return blocks + attention + 2 * spec.vocab * spec.embed_dim


def _bytes(path: Path) -> int:
    from ..runtime.accounting import decode_traffic

    return sum(decode_traffic(path).values())


if __name__ == "__main__":
    main()
