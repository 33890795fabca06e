"""What the command line prints and asks: tables, JSON, streamed answers, and the one red block of an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import ParedError

PIPE_WIDTH = 200  # a pipe has no width of its own: no cell is cut there


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(Text(title), table, sep="\n")


def print_error(error: BaseException) -> None:
    """One block: what, where, and what to do next are in the message, as errors.py promises."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    message = str(error) if isinstance(error, ParedError) else f"{error}\n`pared --debug ...` shows where it happened"
    panel = Panel(Text(message), title=type(error).__name__, title_align="left", border_style="red", style="red")
    Console(stderr=True).print(panel)


def say(pieces: Iterable[str]) -> str:
    """Print an answer as it comes; Ctrl-C ends it early. Returns what was said."""
    said = ""
    try:
        for piece in pieces:
            said += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return said


def ask() -> str | None:
    """One line from the user; None at the end."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
