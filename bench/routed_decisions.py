"""`python -m pared.bench.routed_decisions`: how often bf16 makes a token wake other groups than it should.

A decision is one bit: a token, a layer, a group. Models of bench/routed.py that have been trained read the same tokens
in several ways: through our decoder one by one, in chunks and at once, and through transformers with every group
computed and masked, in bf16 and in fp32. All of them decide by the same fp32 sum, but on inputs that each has rounded
in its own way; where a score lies next to the threshold, that can turn the decision. For inputs of the same bits it
must not, whatever number of rows is decided at once: such a difference is an error.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
MASKED, EXACT = "masked, bf16", "masked, fp32"
BAR = 0.005
TITLE = "Decisions that differ, LTE on SmolLM2-135M-Instruct"
PROTOCOL = (
    f"Share of all decisions (tokens, layers, groups) that differ from those of the same model through transformers, "
    f"every group computed and masked: in bf16, and in fp32 with the weights rounded to bf16. {WINDOWS} windows of "
    f"{LENGTH} BoolQ dev tokens. Ours: the decoder in bf16 on a CPU, tokens one by one, in chunks or a window at once. "
    f"Worst layer: against bf16. Equal inputs: share of the rows of all layers whose bits are those of the window at "
    f"once; none of them decides otherwise. The bar for ours against bf16 is {100 * BAR:g} %."
)
COLUMNS = ("eta", "groups out", "computed", "against bf16", "worst layer", "against fp32", "equal inputs")


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
        shares = (sum(found[MASKED]) / len(found[MASKED]), max(found[MASKED]), sum(found[EXACT]) / len(found[EXACT]))
        yield (f"ours, {way}", *(f"{100 * share:.3f} %" for share in shares), f"{100 * found['equal']:.1f} %")
    own = row[MASKED]
    yield (MASKED, "-", "-", f"{100 * sum(own) / len(own):.3f} %", "-")


TABLE = Table(RESULTS, TITLE, PROTOCOL, COLUMNS, table)


# --- measuring -----------------------------------------------------------------------------------


def measure(model: Any) -> dict[str, Any]:
    """Shares of differing decisions, layer by layer, of every way and of the masked model; `model` ends in fp32.

    Raises KernelError where rows of the same bits wake different groups.
    """
    import torch

    from ..converters.calibration import windows
    from ..runtime.loader import load
    from .data import boolq_passages

    tokens = windows(calibration().tokenizer, boolq_passages("dev")[:400], WINDOWS, LENGTH, seed=0)
    with as_folder(model) as folder:
        decoder = load(folder, "cpu")
        ours = {way: seen(decoder, tokens, rows) for way, rows in WAYS.items()}
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


def seen(decoder: Decoder, tokens: torch.Tensor, rows: int) -> Seen:
    """Windows [W, T] through the decoder, so many rows a step. Raises KernelError if its ops woke other groups."""
    import torch

    from ..kernels import routed_ffn

    inputs, bits, apply = defaultdict[str, list[Any]](list), defaultdict[str, list[Any]](list), routed_ffn.apply

    def watched(x: torch.Tensor, prepared: Prepared, path: str, **given: Any) -> torch.Tensor:
        inputs[path].append(x)
        bits[path].append(routed_ffn.decisions(x, prepared))
        return apply(x, prepared, path, **given)

    before = _woken(decoder)
    with mock.patch.object(routed_ffn, "apply", watched):
        for window in tokens.tolist():
            _read(decoder, window, rows)
    found = Seen(*([torch.cat(parts) for parts in layers.values()] for layers in (inputs, bits)))
    counted = [new - old for old, new in zip(before, _woken(decoder), strict=True)]
    if counted != (told := [int(layer.sum()) for layer in found.bits]):
        raise KernelError(f"layer by layer {counted} groups were woken, the routers alone wake {told}")
    return found


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
