"""The formats, and the contract that every one of them keeps.

A format is a module of this folder. It stores one `Unit` (see unit.py for the vocabulary) and
multiplies with it; there is no base class and nothing to register but a line in `FORMATS`.
A format file reads in one order: byte layout, encode and decode, reference, launchers, cases.

    NAME, VERSION                       what the manifest records; VERSION grows when bytes change
    fits(unit) -> str | None            None, or one sentence that says why this unit does not fit
    encode(unit, **params) -> Packed    pure; the smallest exact form
    decode(packed) -> Unit              the unit again, bit for bit
    weight(packed, path) -> W           the matrix [N, K] of module `path`, dense, in the stored dtype; of LINEAR only
    reference(x, packed, path) -> y     plain torch, fp32 accumulation: the definition of right.
                                        x [M, K] -> y [M, N] of module `path`, in x.dtype
    prepare(packed, device) -> Prepared laid out for the device; `outputs` has each path that `apply` takes
    stack(parts) -> Prepared | None     [(prepared, path), ...] that read the same input (q|k|v, gate|up) as one,
                                        under the first path, outputs side by side; None where they differ, and
                                        for an FFN always
    apply(x, prepared, path, wide=False) -> y
                                        x [M, K] -> y [M, sum(prepared.outputs[path])] in x.dtype, bias
                                        included; behind a torch.library op with a fake; chooses its
                                        kernel by named thresholds on M. wide: y in fp32, for the head.
                                        An FFN takes awake as well: rows that only pad wake no group
    apply_around(x, prepared, path, around) -> y | None
                                        `apply` with the norm, activation and residual of `around` (unit.py) in its
                                        own launches; None where the caller has to take them step by step
    slice(packed, path, dim, start, stop) -> Packed
                                        a shard for tensor parallelism: outputs (dim 0) or inputs (dim 1)
                                        [start, stop) of module `path`; of input shards only the first has the bias.
                                        Of an FFN its groups [start, stop) (dim 2), whose results add up likewise
    traffic(packed, m) -> Traffic       bytes of weights that `apply` reads for M = m rows, and flops
    cases() -> list[Unit]               small units that the generic contract tests run on

Every kernel accumulates in fp32 and is deterministic. A launcher raises ValueError with the real
numbers for anything that its kernel relies on.
"""

from __future__ import annotations

from types import ModuleType

from . import bitmap, dense, int8, routed_ffn, shared_basis, two_four

LINEAR: tuple[ModuleType, ...] = (dense, shared_basis, int8, two_four, bitmap)
"""Those whose modules are linear layers."""

FORMATS: tuple[ModuleType, ...] = (*LINEAR, routed_ffn)


def by_name(name: str) -> ModuleType:
    """The format module called `name`; KeyError lists the known ones."""
    for module in FORMATS:
        if name == module.NAME:
            return module
    raise KeyError(f"no format is called {name!r}; known: {', '.join(module.NAME for module in FORMATS)}")
