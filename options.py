"""Arguments and options that several commands share, and the words that they take."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """Of weights and activations."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Folder = Annotated[Path, typer.Argument(metavar="PATH", help="A compact folder.", show_default=False)]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of weights and activations; default: the folder's.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="An error where a slower path would replace a kernel.")]
Int8HeadOption = Annotated[bool, typer.Option("--int8-head", help="Read the head as 8-bit integers; see eval.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
