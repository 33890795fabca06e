"""`pared doctor | convert | export | inspect`: this machine, and what lies on its disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Dtype, Folder, JsonOption
from .terminal import print_json, print_table

if TYPE_CHECKING:
    from .reports import Sleep


def doctor(as_json: JsonOption = False) -> None:
    """Show which kernels will run on this machine, and why."""
    from . import reports

    environment, paths = reports.environment(), reports.kernel_paths()
    if as_json:
        names = ("op", "dtype", "path", "why")
        print_json({"environment": dict(environment), "paths": [dict(zip(names, row, strict=True)) for row in paths]})
        return
    print_table("This machine", ("what", "here"), environment)
    print_table("Kernels", ("op", "dtype", "path", "why"), paths)


def convert(
    src: Annotated[Path, typer.Argument(help="A Hugging Face folder or a GGUF file.", show_default=False)],
    dst: Annotated[Path, typer.Argument(help="The compact folder to make.", show_default=False)],
    format: Annotated[str | None, typer.Option(help="Storage of every linear layer; default: the smallest.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the stored weights; default: the source's.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:KEY=VALUE,...", help="How to compress; may be given several times, in order."),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(metavar="FILE", help="The text that methods read.")] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="A text to measure perplexity on.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST once the new folder is whole.")] = False,
) -> None:
    """Convert a checkpoint to a compact folder and measure it; without a method, dense and without loss."""
    from . import convert as run

    print(
        run(
            src,
            dst,
            methods=method or (),
            format=format,
            dtype=dtype and dtype.value,
            calibration=calibration,
            text=text,
            overwrite=overwrite,
        )
    )


def export(
    path: Folder, out: Annotated[Path, typer.Argument(help="The Hugging Face folder to make.", show_default=False)]
) -> None:
    """Write a compact folder as a dense Hugging Face folder again."""
    from .convert import export as run

    print(f"{run(path, out)} is an ordinary Hugging Face folder")


def inspect(
    path: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its sha256.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a compact folder holds: formats, shapes, and bytes dense and compact."""
    from .compact import open_folder
    from .reports import folder_report, readable

    with open_folder(path) as folder:
        if verify:
            folder.verify()
        report = folder_report(folder)
    if as_json:
        print_json(report.as_json() | {"verified": verify})
        return
    remarkable, shared = any(kind.weights for kind in report.kinds), any(kind.ranks for kind in report.kinds)
    rows = [
        (
            kind.kind,
            f"{kind.format} {kind.form}".rstrip(),
            str(kind.count),
            _shapes(kind.shapes),
            *((_shapes(kind.ranks), str(kind.groups or "")) if shared else ()),
            *((_found(kind.weights),) if remarkable else ()),
            *map(readable, (kind.dense_bytes, kind.compact_bytes)),
        )
        for kind in (*report.kinds, report.total)
    ]
    of_bases, of_zeros = ("rank", "groups") * shared, ("weights",) * remarkable
    columns = ("kind", "format", "count", "shapes", *of_bases, *of_zeros, "dense", "compact")
    print_table(f"{path} ({report.family})", columns, rows)
    if report.sleep:
        print(_asleep(report.sleep))
    where = "every engine loads it" if report.stock else "compressed: pared loads it"
    print(f"{readable(report.disk_bytes)} on disk, {where}" + (", every file is as it was written" if verify else ""))


def _asleep(sleep: Sleep) -> str:
    from .reports import readable

    shares = list(sleep.layers.values())
    layers = ", ".join(f"{layer}: {100 * share:.0f}" for layer, share in sleep.layers.items())
    return (
        f"on {sleep.text} a token left out {100 * sum(shares) / len(shares):.1f} % of the groups, "
        f"{readable(sleep.saved_bytes)} of weights; by layer, in percent: {layers}"
    )


def _shapes(shapes: dict[str, int]) -> str:
    return ", ".join(f"{shape} ({count})" if len(shapes) > 1 else shape for shape, count in shapes.items())


def _found(weights: dict[str, int]) -> str:
    """What the conversion found, of many different findings the first and the last."""
    told = sorted(weights, key=lambda found: [float(p) if p.isdigit() else p for p in re.split(r"(\d+)", found)])
    return f"{told[0]} to {told[-1]}" if len(told) > 3 else _shapes({found: weights[found] for found in told})
