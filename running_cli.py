"""`pared generate | chat | embed`: a folder at work."""

from __future__ import annotations

import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import BadParameter
from .options import DeviceOption, Dtype, DtypeOption, Folder, Int8HeadOption, StrictOption
from .terminal import ask, print_table, say

if TYPE_CHECKING:
    from .runtime.llm import LLM
    from .runtime.params import SamplingParams


MaxTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most.", show_default="256")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: what the folder recommends.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens that together reach this probability.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--ray", metavar="WORKERS", help="Spread a file or folder over so many workers of Ray, into a folder."
    ),
]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")]


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


def generate(
    path: Folder,
    prompt: Annotated[str, typer.Argument(help="What to continue; with --ray a file of prompts, or a folder of them.")],
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
    ray: Workers = None,
    out: Annotated[Path | None, typer.Option(help="With --ray: folder for parquet files of the answers.")] = None,
    field: Annotated[str, typer.Option(help="With --ray: where the prompt is, in JSON lines and parquet.")] = "text",
) -> None:
    """Continue a prompt, or answer it with --chat. With --ray: each prompt of .txt (one a line), .jsonl or .parquet."""
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options |= {"min_p": min_p, "seed": seed, "stop": stop and tuple(stop)}
    if ray is not None:
        model = {"path": path, "dtype": dtype and dtype.value, "device": device, "strict": strict}
        _generate_all(ray, Path(prompt), out, field, {**model, "int8_head": int8_head}, _given(options), as_chat)
        return
    if out is not None:
        raise BadParameter("--out is for the answers of a corpus: give --ray WORKERS with it")
    llm = _load(path, dtype, device, strict, int8_head)
    params = _params(llm, options)
    asked: Any = llm.tokenizer.chat([{"role": "user", "content": prompt}]) if as_chat else prompt
    if stream:
        say(delta.text for delta in llm.stream(asked, params))
    else:
        print(llm.generate(asked, params)[0].text)


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
    ray: Workers = None,
) -> None:
    """Turn a file of texts into vectors. What was interrupted goes on when it is started again.

    With --ray INPUT may be a folder, and OUT is a new one: parquet files with all of INPUT's columns, in its order.
    """
    from .runtime.corpus import Options, embed_file
    from .runtime.embed import Embedder

    start = time.perf_counter()
    wanted = Options(field, prompt_name, prompt, normalize, dimensions, precision.value)
    model: dict[str, Any] = {"dtype": dtype and dtype.value, "device": device, "strict": strict}
    model |= {"path": path, "pooling": pooling and pooling.value, "max_length": max_length}
    if ray is not None:
        from .runtime import spread

        count = spread.embed(spread.Spread(source, out, ray, field, sys.stderr.isatty()), model, wanted)
        _print_spread(out, count, time.perf_counter() - start)
        return
    embedder = Embedder(**model)
    done = embed_file(embedder, source, out, wanted, overwrite=overwrite, progress=sys.stderr.isatty())
    print_table(f"{out}", ("what", "how much"), done.rows(time.perf_counter() - start, embedder.max_length))


def _generate_all(
    workers: int, source: Path, out: Path | None, field: str, model: dict[str, Any], params: dict[str, Any], chat: bool
) -> None:
    from .runtime import spread

    if out is None:
        raise BadParameter("answers to a corpus need a place: give --out FOLDER")
    start = time.perf_counter()
    count = spread.generate(spread.Spread(source, out, workers, field, sys.stderr.isatty()), model, params, chat)
    _print_spread(out, count, time.perf_counter() - start)


def _print_spread(out: Path, count: int, seconds: float) -> None:
    rows = [("texts", str(count)), ("texts/s", f"{count / seconds:.1f}, loading included")]
    print_table(f"{out}", ("what", "how much"), rows)


def _load(path: Path, dtype: Dtype | None, device: str | None, strict: bool, int8_head: bool) -> LLM:
    from .runtime.llm import LLM

    return LLM(path, dtype=dtype and dtype.value, device=device, strict=strict, int8_head=int8_head)


def _params(llm: LLM, options: dict[str, Any]) -> SamplingParams:
    """The options that were given, over what the folder recommends."""
    from .runtime.params import SamplingParams

    return SamplingParams.from_dict(_given(options), llm.default_params)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _answer(llm: LLM, messages: list[dict[str, Any]], params: SamplingParams) -> str:
    return say(delta.text for delta in llm.stream(llm.tokenizer.chat(messages), params))
