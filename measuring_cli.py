"""`pared eval | bench`: how good a folder is, and how fast."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import BadParameter
from .options import DeviceOption, DtypeOption, Folder, Int8HeadOption, JsonOption
from .terminal import print_json, print_table


class Protocol(str, Enum):
    """How perplexity treats windows: the tail dropped, or kept and windows averaged equally."""

    windows = "windows"
    tail = "tail"


def evaluate(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Compact folders.", show_default=False)],
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="A text to measure perplexity on, UTF-8.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Multiple choice, of bench/tasks; needs the extra eval.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task; default: all.")] = None,
    window: Annotated[int, typer.Option(help="Tokens that the model sees at once.")] = 2048,
    protocol: Annotated[
        Protocol, typer.Option(help="Drop the tail (windows), or keep and average it (tail).")
    ] = Protocol.windows,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    int8_head: Int8HeadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the quality of models on a text, on questions, or on both, side by side."""
    if text is None and tasks is None:
        raise BadParameter("eval measures perplexity on --text FILE and accuracy on --tasks NAME,...: give one or both")
    import torch

    from .evaluate import Report, measure

    kind, shown = dtype and getattr(torch, dtype.value), sys.stderr.isatty()
    options: dict[str, Any] = {"window": window, "protocol": protocol.value, "dtype": kind, "device": device}
    options |= {"int8_head": int8_head, "progress": shown, "questions": None}
    if tasks is not None:
        from .bench.data import TASKS
        from .harness import multiple_choice

        options["questions"] = multiple_choice(tasks.split(","), TASKS, limit, shown)
    read = None if text is None else _read(text)
    rows = tuple(measure(path, read, **options) for path in paths)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        print(Report(rows))


def bench(
    path: Folder,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    dtype: DtypeOption = None,
    against: Annotated[
        str, typer.Option(help="transformers, llama.cpp, llama.cpp:q8_0, a GGUF file or another compact folder.")
    ] = "transformers",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the JSON.")] = None,
) -> None:
    """Measure prefill and decode against another engine or folder; encoders against sentence-transformers; in turns."""
    from . import sentence_layout
    from .bench import embed, end_to_end

    if sentence_layout.read(path):
        result = embed.compare([path], rounds, dtype and dtype.value)
        print_table(embed.title(result), embed.COLUMNS, embed.lines(result))
    else:
        result = end_to_end.compare(path, prompt_tokens, new_tokens, rounds, dtype and dtype.value, against)
        print_table(end_to_end.title(result), end_to_end.columns(result), end_to_end.rows(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadParameter(f"the text {path} cannot be read: {error}; give a UTF-8 file") from error
