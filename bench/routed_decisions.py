"""`python -m pared.bench.routed_decisions`: how often bf16 makes a token wake other groups than it should.

A decision is one bit: a token, a layer, a group. Models of bench/routed.py that have been trained read the same tokens
in several ways: through our decoder one by one, in chunks and at once, and through transformers with every group
computed and masked, in bf16 and in fp32. All of them decide by the same fp32 sum, but on inputs that each has rounded
in its own way; where a score lies next to the threshold, that can turn the decision, and with it a whole group of what
later layers read. For inputs of the same bits it must not, whatever number of rows is decided at once: such a
difference is an error. So is one between reading the groups that a token wakes and reading all, sleeping ones masked:
the kernel sums the same numbers in the same order.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any
from unittest import mock

from ..errors import KernelError
from ..kernels.dispatch import set_threads
from ..terminal import print_table
from . import routed
from .quality import ROOT, as_folder, calibration, chosen
from .tables import Table

if TYPE_CHECKING:
    import torch

    from ..kernels.unit import Prepared
    from ..runtime.model import Decoder

RESULTS = ROOT / "bench" / "results" / "routed_decisions"
WINDOWS, LENGTH, CHUNK = 4, 256, 64
PAGE = 16
WAYS = {"one by one": 1, f"chunks of {CHUNK}": CHUNK, "at once": LENGTH}
MASKED, EXACT, GATHERED = "masked, bf16", "masked, fp32", "gathered against masked"
BAR = 0.005
TITLE = "Decisions that differ, LTE on SmolLM2-135M-Instruct"
PROTOCOL = (
    f"Share of all decisions (tokens, layers, groups) that differ from those of the same model through transformers, "
    f"every group computed and masked: in bf16, and in fp32 with the weights rounded to bf16. {WINDOWS} windows of "
    f"{LENGTH} BoolQ dev tokens. Ours: the decoder in bf16 on a CPU, tokens one by one, in chunks or a window at once. "
    f"Worst layer: against bf16. Equal inputs: share of the rows of all layers whose bits are those of the window at "
    f"once; none of them decides otherwise. The bar for ours against bf16 is {100 * BAR:g} %. Gathered against masked "
    "isolates the gathering, in one kernel: reading only the groups that tokens wake, against reading all groups of "
    "every layer, through the whole model; every step has a row more for it, a copy of its last one or one that wakes "
    "all."
)
COLUMNS = (
    "eta",
    "groups out",
    "computed",
    "gathered against masked",
    "against bf16",
    "worst layer",
    "against fp32",
    "equal inputs",
)
Company = Callable[["torch.Tensor", "Prepared"], "torch.Tensor"]
"""(x [M, K], a routed FFN) -> a row [1, K] to be computed with x."""


def main() -> None:
    """Measure the trained rows that are missing, then print and write the table."""
    set_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help="some of the rows that have been trained, separated by commas")
    wanted = chosen(routed.settings_trained(), parser.parse_args().rows)
    results = TABLE.load()
    for setting in wanted:
        if setting.name not in results["rows"]:
            TABLE.save(results, setting.name, measure(routed.trained(setting)[0]))
    print_table(TITLE, COLUMNS, table(results))
    print(PROTOCOL)
    print("\n".join(verdicts(results)))


def table(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows that are there, under COLUMNS."""
    return [
        (f"{setting.eta:g}", f"{100 * row['sparsity']:.1f} %", *line)
        for setting in routed.SETTINGS
        if (row := results["rows"].get(setting.name))
        for line in _lines(row)
    ]


def _lines(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for way in WAYS:
        found = row["ways"][way]
        shares = (found[GATHERED], mean(found[MASKED]), max(found[MASKED]), mean(found[EXACT]))
        yield (f"ours, {way}", *(f"{100 * share:.3f} %" for share in shares), f"{100 * found['equal']:.1f} %")
    yield (MASKED, "-", "-", "-", f"{100 * mean(row[MASKED]):.3f} %", "-")


def verdicts(results: dict[str, Any]) -> list[str]:
    """Whether the way that differs most from masked bf16 keeps to the bar, eta by eta."""
    said = []
    for setting in routed.SETTINGS:
        if row := results["rows"].get(setting.name):
            most = max(mean(found[MASKED]) for found in row["ways"].values())
            kept = "at most" if most <= BAR else "above"
            said.append(f"{setting.name}: {100 * most:.3f} % differ from masked bf16, {kept} {100 * BAR:g} %.")
    return said


TABLE = Table(RESULTS, TITLE, PROTOCOL, COLUMNS, table, verdicts)


# --- measuring -----------------------------------------------------------------------------------


def measure(model: Any) -> dict[str, Any]:
    """Shares of differing decisions, layer by layer, of every way and of the masked model; `model` ends in fp32.

    Raises KernelError where rows of the same bits wake different groups, or reading fewer groups makes other bits.
    """
    import torch

    from ..converters.calibration import windows
    from ..runtime.loader import load
    from .data import boolq_passages

    tokens = windows(calibration().tokenizer, boolq_passages("dev")[:400], WINDOWS, LENGTH, seed=0)
    with as_folder(model) as folder:
        decoder = load(folder, "cpu")
        ours = {way: seen(decoder, tokens, rows) for way, rows in WAYS.items()}
        gathered = {way: gathering(decoder, tokens, rows) for way, rows in WAYS.items()}
    masked, exact = (masking(model, tokens, dtype) for dtype in (torch.bfloat16, torch.float32))
    whole = ours["at once"]
    return {
        "sparsity": 1 - sum(bits.float().mean().item() for bits in exact) / len(exact),
        "decisions": sum(bits.numel() for bits in exact),
        "ways": {
            way: {
                MASKED: differing(one.bits, masked),
                EXACT: differing(one.bits, exact),
                "equal": equal_rows(one, whole),
                GATHERED: gathered[way],
            }
            for way, one in ours.items()
        },
        MASKED: differing(masked, exact),
    }


@dataclass
class Seen:
    """What routed FFNs read and decided, layer by layer: inputs [tokens, K] and bits, bool [tokens, groups]."""

    inputs: list[torch.Tensor]
    bits: list[torch.Tensor]


def seen(decoder: Decoder, tokens: torch.Tensor, rows: int, company: Company | None = None) -> Seen:
    """Windows [W, T] through the decoder, so many rows a step, each step's FFNs with a row of `company` beside them.

    Raises KernelError if the decoder's ops woke other groups than the routers alone.
    """
    import torch

    from ..kernels import routed_ffn

    inputs, bits, apply = defaultdict[str, list[Any]](list), defaultdict[str, list[Any]](list), routed_ffn.apply
    woken = defaultdict[str, int](int)

    def watched(x: torch.Tensor, prepared: Prepared, path: str, awake: torch.Tensor | None = None) -> torch.Tensor:
        own, count = routed_ffn.decisions(x, prepared), len(x)
        inputs[path].append(x)
        bits[path].append(own)
        woken[path] += int(own.sum())
        if company is not None:
            row = company(x, prepared)
            woken[path] += int(routed_ffn.decisions(row, prepared).sum())
            x, awake = torch.cat([x, row]), None if awake is None else torch.cat([awake, awake.new_ones(1)])
        return apply(x, prepared, path, awake=awake)[:count]

    before = _woken(decoder)
    with mock.patch.object(routed_ffn, "apply", watched):
        for window in tokens.tolist():
            _read(decoder, window, rows)
    found = Seen(*([torch.cat(parts) for parts in layers.values()] for layers in (inputs, bits)))
    counted = [new - old for old, new in zip(before, _woken(decoder), strict=True)]
    if counted != list(woken.values()):
        raise KernelError(f"layer by layer {counted} groups were woken, the routers alone wake {list(woken.values())}")
    return found


def gathering(decoder: Decoder, tokens: torch.Tensor, rows: int) -> float:
    """Share of decisions that differ between reading what rows wake and reading every group, sleeping ones masked.

    Raises KernelError where inputs of a layer differ in a bit.
    """
    few, all_read = (seen(decoder, tokens, rows, company) for company in (itself, everyone))
    if wrong := sum(int((x != y).sum()) for x, y in zip(few.inputs, all_read.inputs, strict=True)):
        raise KernelError(f"reading every group changes {wrong} values that FFNs read")
    return mean(differing(few.bits, all_read.bits))


def itself(x: torch.Tensor, _: Prepared) -> torch.Tensor:
    """The last row once more, which wakes nothing that is not awake."""
    return x[-1:]


def everyone(x: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    """A row that wakes every group. Raises KernelError where the router is too narrow for one."""
    import torch

    from ..kernels import routed_ffn

    router = prepared.tensors[-2]
    assert router is not None
    wanted = torch.full((len(router), 1), 8 * (1 + abs(prepared.floats[0])))
    row = torch.linalg.lstsq(router, wanted, driver="gelsd").solution.t().to(x.dtype)
    if not routed_ffn.decisions(row.contiguous(), prepared).all():
        raise KernelError("no row wakes every group of a layer, so what reading all of them gives is not known")
    return row.contiguous()


def _woken(decoder: Decoder) -> list[int]:
    """Groups that the rows so far have woken, for each routed layer."""
    return [use.woken for use in decoder.ffn_use() if use]


def _read(decoder: Decoder, tokens: list[int], rows: int) -> None:
    """One sequence, chunk by chunk."""
    from ..runtime.batch import build_batch
    from ..runtime.cache import KVCache
    from ..runtime.params import SamplingParams
    from ..runtime.sequence import Chunk
    from ..runtime.sequence import Sequence as Running

    spec, count = decoder.spec, len(tokens)
    pages = -(-count // PAGE)
    heads = [layer.kv_heads for layer in spec.layers]
    cache = KVCache(heads, spec.head_dim, 1 + pages, PAGE, decoder.dtype, decoder.device)
    blocks = list(range(1, 1 + pages))  # block 0 is reserved
    running = Running(0, tokens, count, SamplingParams(), frozenset(), count + 1, count, blocks=blocks)
    for start in range(0, count, rows):
        chunk = Chunk(running, start, min(start + rows, count))
        decoder(build_batch([chunk], PAGE, decoder.device), cache)


def masking(model: Any, tokens: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """What the transformers model decides in this dtype, layer by layer; `model` is rounded to it for good."""
    from ..converters.routed import awake

    return list(awake(rounded(model, dtype), tokens.split(1)).values())


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The transformers model itself with its weights in this dtype, all but routers."""
    for name, parameter in model.named_parameters():
        if not name.endswith(".router.weight"):
            parameter.data = parameter.data.to(dtype)
    return model


def differing(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> list[float]:
    """Share of the decisions of each layer that differ."""
    return [(a != b).float().mean().item() for a, b in zip(one, other, strict=True)]


def equal_rows(one: Seen, other: Seen) -> float:
    """Share of the rows of all layers that both read in the same bits. Raises KernelError if one decides otherwise."""
    shares = []
    for layer, (x, y, a, b) in enumerate(zip(one.inputs, other.inputs, one.bits, other.bits, strict=True)):
        equal = (x == y).all(dim=1)
        if wrong := int((a != b)[equal].sum()):
            raise KernelError(f"layer {layer}: rows of the same bits differ in {wrong} decisions")
        shares.append(equal.float().mean().item())
    return sum(shares) / len(shares)


if __name__ == "__main__":
    main()
