"""The command line: pared convert | inspect | generate | chat | serve | embed | eval | bench | kernels and more.

Commands are thin: each imports what it needs when it runs, so that `pared --help` is quick, and prints
what the library returns. Errors of pared's own tree become one red block and exit code 1.
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__, kernels_cli, serve_cli
from .errors import BadParameter
from .kernels.dispatch import set_threads
from .terminal import ask, print_error, print_json, print_table, say

if TYPE_CHECKING:
    from .runtime.llm import LLM
    from .runtime.params import SamplingParams

app = typer.Typer(
    name="pared",
    help="Convert language models to compact folders, look into them, run them and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(kernels_cli.app)
app.command()(serve_cli.serve)


class Dtype(str, Enum):
    """Of weights and activations."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Pooling(str, Enum):
    """Of hidden states to one vector."""

    weighted_mean = "weighted_mean"
    mean = "mean"
    last = "last"
    cls = "cls"


class Precision(str, Enum):
    """Of stored vectors, as in sentence-transformers."""

    float32 = "float32"
    int8 = "int8"
    uint8 = "uint8"
    binary = "binary"
    ubinary = "ubinary"


class Protocol(str, Enum):
    """How perplexity treats windows: the tail dropped, or kept and windows averaged equally."""

    windows = "windows"
    tail = "tail"


Folder = Annotated[Path, typer.Argument(metavar="PATH", help="A compact folder.", show_default=False)]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of weights and activations; default: the folder's.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="An error where a slower path would replace a kernel.")]
Int8HeadOption = Annotated[bool, typer.Option("--int8-head", help="Read the head as 8-bit integers; see eval.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most.", show_default="256")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: what the folder recommends.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens that together reach this probability.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"pared {__version__}")
        raise typer.Exit


@app.callback()
def _pared(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


@app.command()
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


@app.command()
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


@app.command()
def export(
    path: Folder, out: Annotated[Path, typer.Argument(help="The Hugging Face folder to make.", show_default=False)]
) -> None:
    """Write a compact folder as a dense Hugging Face folder again."""
    from .convert import export as run

    print(f"{run(path, out)} is an ordinary Hugging Face folder")


@app.command()
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
    where = "every engine loads it" if report.stock else "compressed: pared loads it"
    print(f"{readable(report.disk_bytes)} on disk, {where}" + (", every file is as it was written" if verify else ""))


@app.command()
def generate(
    path: Folder,
    prompt: Annotated[str, typer.Argument(help="What to continue.", show_default=False)],
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    as_chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    stream: Annotated[bool, typer.Option(help="Print text as it comes.")] = True,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    strict: StrictOption = False,
    int8_head: Int8HeadOption = False,
) -> None:
    """Continue a prompt, or answer it with --chat."""
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    llm = _load(path, dtype, device, strict, int8_head)
    params = _params(llm, {**options, "min_p": min_p, "seed": seed, "stop": stop and tuple(stop)})
    asked: Any = llm.tokenizer.chat([{"role": "user", "content": prompt}]) if as_chat else prompt
    if stream:
        say(delta.text for delta in llm.stream(asked, params))
    else:
        print(llm.generate(asked, params)[0].text)


@app.command()
def chat(
    path: Folder,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    strict: StrictOption = False,
    int8_head: Int8HeadOption = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer; at the prompt it ends the talk, as Ctrl-D does."""
    llm = _load(path, dtype, device, strict, int8_head)
    params = _params(llm, {"max_tokens": max_tokens, "temperature": temperature, "seed": seed})
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    llm.tokenizer.chat([{"role": "user", "content": "?"}])  # no chat template: say so before the first question
    print("Ctrl-C stops an answer, Ctrl-D ends, /new starts afresh")
    while (line := ask()) is not None:
        if line == "/new":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(llm, messages, params)})


@app.command()
def embed(
    path: Folder,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Texts: .txt (one a line), .jsonl or .parquet.")],
    out: Annotated[Path, typer.Argument(help="Vectors: .npy, or .parquet with the texts.")],
    field: Annotated[str, typer.Option(help="Of JSON lines and parquet: where the text is.")] = "text",
    prompt_name: Annotated[str | None, typer.Option(help="The folder's prompt of this name before each text.")] = None,
    prompt: Annotated[str | None, typer.Option(help="This before each text.")] = None,
    pooling: Annotated[Pooling | None, typer.Option(help="Default: the folder's.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text at most; default: the folder's.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Vectors of length 1.")] = False,
    dimensions: Annotated[int | None, typer.Option(help="The first so many dimensions (Matryoshka).")] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the vectors; int8 over the range of all.")
    ] = Precision.float32,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    strict: StrictOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new one is whole.")] = False,
) -> None:
    """Turn a file of texts into vectors. What was interrupted goes on when it is started again."""
    from .runtime.corpus import Options, embed_file
    from .runtime.embed import Embedder

    start = time.perf_counter()
    options: dict[str, Any] = {"pooling": pooling and pooling.value, "max_length": max_length}
    embedder = Embedder(path, dtype and dtype.value, device, strict, **options)
    wanted = Options(field, prompt_name, prompt, normalize, dimensions, precision.value)
    done = embed_file(embedder, source, out, wanted, overwrite=overwrite, progress=sys.stderr.isatty())
    print_table(f"{out}", ("what", "how much"), done.rows(time.perf_counter() - start, embedder.max_length))


@app.command("eval")
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


@app.command()
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


def _load(path: Path, dtype: Dtype | None, device: str | None, strict: bool, int8_head: bool) -> LLM:
    from .runtime.llm import LLM

    return LLM(path, dtype=dtype and dtype.value, device=device, strict=strict, int8_head=int8_head)


def _params(llm: LLM, options: dict[str, Any]) -> SamplingParams:
    """The options that were given, over what the folder recommends."""
    from .runtime.params import SamplingParams

    given = {name: value for name, value in options.items() if value is not None}
    return SamplingParams.from_dict(given, llm.default_params)


def _answer(llm: LLM, messages: list[dict[str, Any]], params: SamplingParams) -> str:
    return say(delta.text for delta in llm.stream(llm.tokenizer.chat(messages), params))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadParameter(f"the text {path} cannot be read: {error}; give a UTF-8 file") from error


def _shapes(shapes: dict[str, int]) -> str:
    return ", ".join(f"{shape} ({count})" if len(shapes) > 1 else shape for shape, count in shapes.items())


def _found(weights: dict[str, int]) -> str:
    """What the conversion found, of many different findings the first and the last."""
    told = sorted(weights, key=lambda found: [float(p) if p.isdigit() else p for p in re.split(r"(\d+)", found)])
    return f"{told[0]} to {told[-1]}" if len(told) > 3 else _shapes({found: weights[found] for found in told})


def main() -> None:
    """Entry point: threads are set before torch is imported; errors become one block and exit code 1."""
    set_threads()
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            raise
        print_error(error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
