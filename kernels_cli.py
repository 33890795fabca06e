"""`pared kernels list | compile | check | bench`: a look at kernels for those who write them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import BadParameter
from .terminal import print_json, print_table

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    name="kernels",
    help="Look at kernels: what runs where, what compiles, what is right, what is fast.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DTYPES = ("bfloat16", "float16", "float32")

Format = Annotated[str | None, typer.Argument(metavar="[FORMAT]", help="One format; default: all.", show_default=False)]
FormatOption = Annotated[str | None, typer.Option(help="One format; default: all, and the steps between matrices.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NxK", help="Outputs and inputs; may be given several times.", show_default="those of Llama-3-8B"
    ),
]
Rows = Annotated[str | None, typer.Option(metavar="M,M,...", help="Rows of x.", show_default="1,8,64")]
DtypeOption = Annotated[str, typer.Option(metavar="|".join(DTYPES), help="Of weights and activations.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("list")
def list_them(dtype: DtypeOption = "bfloat16", as_json: JsonOption = False) -> None:
    """Show every op: who uses it, its kernels, and the path that this machine takes at which M."""
    kind = _dtype(dtype)
    from .bench import inventory

    found = inventory.ops(kind, _device())
    if as_json:
        print_json([op.as_json() for op in found])
    else:
        title = f"Ops on {_device()}, {dtype}; formats at K = {inventory.INPUTS}"
        print_table(title, inventory.COLUMNS, inventory.lines(found))


@app.command("compile")
def compile_them(
    target: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; no GPU is needed.")],
    format: FormatOption = None,
    shape: Shapes = None,
    rows: Rows = None,
    dtype: DtypeOption = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """Compile what would be launched on a GPU and show what it takes; exit code 1 where a limit is broken."""
    kind, ms = _dtype(dtype), _rows(rows)
    from .bench import compiled, samples

    found = compiled.compile_all(target, format, _shapes(shape) or samples.SHAPES, ms or samples.ROWS, kind)
    broken = sum(bool(one.broken) for one in found)
    if as_json:
        print_json([one.as_json() for one in found])
    else:
        print_table(f"{target}, {dtype}: {_verdict(len(found), broken)}", compiled.COLUMNS, compiled.lines(found))
    _fail_if(broken)


@app.command("check")
def check_them(format: Format = None, rows: Rows = None, as_json: JsonOption = False) -> None:
    """Hold formats to their contract on their own cases, on the path of this machine; exit code 1 on a failure."""
    ms = _rows(rows)
    from .bench import contract, samples
    from .kernels import formats

    modules = samples.chosen(format) if format else formats.FORMATS
    checks = [one for module in modules for one in contract.check(module, ms or contract.ROWS, _device())]
    failed = sum(not one.passed for one in checks)
    if as_json:
        print_json([one._asdict() | {"passed": one.passed} for one in checks])
    else:
        print_table(f"{_device()}: {_verdict(len(checks), failed)}", contract.COLUMNS, contract.lines(checks))
    _fail_if(failed)


@app.command("bench")
def bench_them(
    format: Format = None,
    shape: Shapes = None,
    rows: Rows = None,
    dtype: DtypeOption = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time formats against the best dense path of this machine, each case only once its result is right."""
    kind, ms = _dtype(dtype), _rows(rows)
    from .bench import one_format, samples

    modules = samples.chosen(format)
    result = one_format.measure(modules, _shapes(shape) or samples.SHAPES, ms or samples.ROWS, kind, rounds, _device())
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(result)
    else:
        print_table(one_format.title(result), one_format.COLUMNS, one_format.lines(result))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise BadParameter(f"--dtype is one of {', '.join(DTYPES)}, got {name!r}")
    import torch

    kind: torch.dtype = getattr(torch, name)
    return kind


def _shapes(given: list[str] | None) -> list[tuple[int, int]]:
    """Every NxK; none when nothing was given."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape) for shape in given or ()]
    if not all(found):
        raise BadParameter(f"--shape is NxK, outputs and inputs as in 4096x14336, got {given}")
    return [(int(one[1]), int(one[2])) for one in found if one]


def _rows(given: str | None) -> list[int]:
    """Every M; none when nothing was given."""
    if given is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given):
        raise BadParameter(f"--rows are numbers of rows from 1 as in 1,8,64, got {given!r}")
    return [int(m) for m in given.split(",")] if given else []


def _verdict(count: int, wrong: int) -> str:
    return f"{count} looked at, {wrong or 'none'} wrong"


def _fail_if(wrong: int) -> None:
    if wrong:
        raise typer.Exit(1)
