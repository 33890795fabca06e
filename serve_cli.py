"""pared serve: a compact folder behind OpenAI's API. Every option is also an environment variable."""

from __future__ import annotations

from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import BadParameter


class LogLevel(str, Enum):
    """How much the log tells."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class Pooling(str, Enum):
    """How the states of a text's tokens become one vector."""

    weighted_mean = "weighted_mean"
    mean = "mean"
    last = "last"
    cls = "cls"


def _option(name: str, help: str) -> typer.models.OptionInfo:
    return typer.Option(f"--{name}", envvar=f"PARED_{name.upper().replace('-', '_')}", help=help)


Folder = Annotated[Path, typer.Argument(metavar="PATH", help="A compact folder.", envvar="PARED_PATH")]
Host = Annotated[str, _option("host", "Address to listen at.")]
Port = Annotated[int, _option("port", "Port to listen at.")]
Socket = Annotated[Path | None, _option("socket", "A unix socket to listen at instead.")]
Certificate = Annotated[Path | None, _option("certificate", "TLS certificate, PEM.")]
PrivateKey = Annotated[Path | None, _option("private-key", "TLS private key, PEM.")]
AllowOrigin = Annotated[
    list[str], _option("allow-origin", "An origin whose pages may ask, as https://a.example; * is any. Repeatable.")
]
RootPath = Annotated[str, _option("root-path", "Path under which a proxy shows the server.")]
Name = Annotated[str | None, _option("name", "Name of the model; default: the folder's.")]
KeyFile = Annotated[Path | None, _option("api-key-file", "API keys, one a line; PARED_API_KEYS may hold some too.")]
Dtype = Annotated[str | None, _option("dtype", "bfloat16, float16 or float32; default: the folder's.")]
Device = Annotated[str | None, _option("device", "cpu or cuda; default: the GPU if there is one.")]
Strict = Annotated[bool, _option("strict", "An error where a slower path would replace a kernel.")]
Int8Head = Annotated[bool, _option("int8-head", "Read the head as 8-bit integers; see eval.")]
Pool = Annotated[Pooling | None, _option("pooling", "Embed too, pooling so; default: as the folder says, if it does.")]
MaxBatch = Annotated[int, _option("max-batch", "Answers that run at a time.")]
Chunk = Annotated[int, _option("chunk", "Token rows of one step.")]
KvBytes = Annotated[int | None, _option("kv-cache-bytes", "Memory of the KV cache; default: a share of what is free.")]
PrefixCaching = Annotated[
    bool, typer.Option(envvar="PARED_PREFIX_CACHING", help="Keep what prompts begin with, for others that begin alike.")
]
MaxWaiting = Annotated[int, _option("max-waiting", "Answers that wait for a place.")]
MaxPromptTokens = Annotated[
    int | None, _option("max-prompt-tokens", "Tokens of a prompt; default: what the context holds.")
]
MaxPrompts = Annotated[int, _option("max-prompts", "Prompts of one request.")]
MaxTexts = Annotated[int, _option("max-texts", "Texts to embed in one request.")]
MaxN = Annotated[int, _option("max-n", "Answers to one prompt.")]
MaxBodyBytes = Annotated[int, _option("max-body-bytes", "Size of a request.")]
BodySeconds = Annotated[float, _option("body-seconds", "Time for a request to arrive.")]
DrainSeconds = Annotated[float, _option("drain-seconds", "Time to finish what runs when told to end.")]
Otlp = Annotated[
    str | None, _option("otlp-endpoint", "Where traces go, as http://localhost:4318/v1/traces; needs pared[otel].")
]
Level = Annotated[LogLevel, _option("log-level", "How much the log on stderr tells.")]


def serve(
    context: typer.Context,
    path: Folder,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    socket: Socket = None,
    certificate: Certificate = None,
    private_key: PrivateKey = None,
    root_path: RootPath = "",
    allow_origin: AllowOrigin = [],  # noqa: B006  typer copies it
    name: Name = None,
    api_key_file: KeyFile = None,
    dtype: Dtype = None,
    device: Device = None,
    strict: Strict = False,
    int8_head: Int8Head = False,
    pooling: Pool = None,
    max_batch: MaxBatch = 64,
    chunk: Chunk = 1024,
    kv_cache_bytes: KvBytes = None,
    prefix_caching: PrefixCaching = True,
    max_waiting: MaxWaiting = 256,
    max_prompt_tokens: MaxPromptTokens = None,
    max_prompts: MaxPrompts = 64,
    max_texts: MaxTexts = 2048,
    max_n: MaxN = 16,
    max_body_bytes: MaxBodyBytes = 4 * 2**20,
    body_seconds: BodySeconds = 30.0,
    drain_seconds: DrainSeconds = 30.0,
    otlp_endpoint: Otlp = None,
    log_level: Level = LogLevel.info,
) -> Any:
    """Serve a model behind the OpenAI API until a signal comes; what runs is finished first."""
    try:
        from .runtime.server import limits, opening, run, tracing
    except ImportError as error:
        raise BadParameter(f"serving needs {error.name}: pip install 'pared[serve]'") from error
    from .compact import open_folder
    from .reports import folder_report

    wanted = opening.Wanted(
        dtype,
        device,
        strict,
        int8_head,
        max_batch,
        chunk,
        kv_cache_bytes,
        prefix_caching,
        pooling and pooling.value,  # type: ignore[arg-type]
    )
    bounds = limits.Limits(
        max_waiting, max_prompts, max_texts, max_n, max_prompt_tokens, max_body_bytes, body_seconds, drain_seconds
    )
    binding = run.Binding(host, port, socket, certificate, private_key, root_path, tuple(allow_origin))
    own = context.obj is None  # else called by `application`
    with binding.taken() if own else nullcontext() as sockets:
        service = opening.open_service(path, name or path.resolve().name, bounds, wanted)
        service.spans = tracing.Spans(otlp_endpoint, service.name) if otlp_endpoint else None
        with open_folder(path) as folder:
            service.folder = folder_report(folder).as_json()
        if own:
            return run.serve(service, binding, sockets, api_key_file, log_level.value)
        return context.obj(service, binding.origins, api_key_file, log_level.value)


def application() -> Any:
    """The ASGI application of `pared serve`, its options taken from the environment: for a server that is not ours."""
    from .runtime.server import run

    alone = typer.Typer(add_completion=False)
    alone.command()(serve)
    return typer.main.get_command(alone).main([], standalone_mode=False, obj=run.application)
