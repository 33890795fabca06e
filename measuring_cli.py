"""`pared eval | bench`: how good a folder is, and how fast; how fast a server."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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


class _Bench(TyperGroup):
    """`pared bench PATH` is `pared bench model PATH`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in {*self.commands, "--help"}
        return super().parse_args(ctx, args if named else ["model", *args])


bench = typer.Typer(
    cls=_Bench,
    name="bench",
    help="Measure a folder (pared bench PATH), or a running server (pared bench serve URL).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.command("model")
def bench_model(
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


@bench.command("serve")
def bench_serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="A server of OpenAI's API.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text that prompts are drawn from, UTF-8.")],
    rates: Annotated[str, typer.Option(metavar="R,R,...", help="Requests per second; inf: all at once.")] = "1,2,4,inf",
    requests: Annotated[int, typer.Option(help="Requests at each rate.")] = 64,
    prompt_words: Annotated[int, typer.Option(help="Words of a prompt.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Exactly so many, for servers that know this field.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the server's.")] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT:MS", help="Count answers within ttft, tpot or e2el; may be given several times."),
    ] = None,
    as_chat: Annotated[bool, typer.Option("--chat", help="Ask for chat completions.")] = False,
    model: Annotated[str | None, typer.Option(help="Name of the model; default: the server's first.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="What the server asks for.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for one piece of an answer to come.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to draw it: .png, .svg or .pdf.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Sweep request rates against a server: latencies, throughput, and goodput for what is promised."""
    try:
        from .bench import serving
        from .bench.client import Endpoint

        if plot is not None:
            from .bench import serving_plot
    except ImportError as error:
        raise BadParameter(f"measuring a server needs {error.name}: pip install 'pared[bench]'") from error
    options = {"max_tokens": max_tokens, "temperature": temperature, "ignore_eos": ignore_eos or None}
    given = {name: value for name, value in options.items() if value is not None}
    load = serving.Load(_read(text), _rates(rates), requests, prompt_words, seed, _goals(goodput or []))
    endpoint = Endpoint(url, model or "", as_chat, api_key, given, seconds)
    result = serving.sweep(endpoint, load, sys.stderr.isatty())
    if as_json:
        print_json(result)
    else:
        print_table(serving.title(result), serving.columns(result), serving.lines(result))
        for failure in serving.failures(result):
            print(failure)
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        serving_plot.draw(result, plot)


def _rates(given: str) -> tuple[float, ...]:
    try:
        return tuple(float(rate) for rate in given.split(","))
    except ValueError as error:
        raise BadParameter(f"--rates are requests per second as in 0.5,1,2,inf, got {given!r}") from error


def _goals(given: list[str]) -> dict[str, float]:
    try:
        return {what: float(ms) for what, ms in (goal.split(":") for goal in given)}
    except ValueError as error:
        raise BadParameter(f"--goodput is WHAT:MS as in ttft:500, got {' '.join(given)}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadParameter(f"the text {path} cannot be read: {error}; give a UTF-8 file") from error
