"""pared serve: a compact folder behind OpenAI's API. Every option is also an environment variable."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .errors import BadParameter


class LogLevel(str, Enum):
    """How much the log tells."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def _option(name: str, help: str) -> typer.models.OptionInfo:
    return typer.Option(f"--{name}", envvar=f"PARED_{name.upper().replace('-', '_')}", help=help)


def serve(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A compact folder.", envvar="PARED_PATH")],
    host: Annotated[str, _option("host", "Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, _option("port", "Port to listen at.")] = 8000,
    socket: Annotated[Path | None, _option("socket", "A unix socket to listen at instead.")] = None,
    certificate: Annotated[Path | None, _option("certificate", "TLS certificate, PEM.")] = None,
    private_key: Annotated[Path | None, _option("private-key", "TLS private key, PEM.")] = None,
    root_path: Annotated[str, _option("root-path", "Path under which a proxy shows the server.")] = "",
    name: Annotated[str | None, _option("name", "Name of the model; default: the folder's.")] = None,
    api_key_file: Annotated[
        Path | None, _option("api-key-file", "API keys, one a line; PARED_API_KEYS may hold some too.")
    ] = None,
    dtype: Annotated[str | None, _option("dtype", "bfloat16, float16 or float32; default: the folder's.")] = None,
    device: Annotated[str | None, _option("device", "cpu or cuda; default: the GPU if there is one.")] = None,
    strict: Annotated[bool, _option("strict", "An error where a slower path would replace a kernel.")] = False,
    int8_head: Annotated[bool, _option("int8-head", "Read the head as 8-bit integers; see eval.")] = False,
    max_batch: Annotated[int, _option("max-batch", "Answers that run at a time.")] = 64,
    chunk: Annotated[int, _option("chunk", "Token rows of one step.")] = 1024,
    kv_cache_bytes: Annotated[
        int | None, _option("kv-cache-bytes", "Memory of the KV cache; default: a share of what is free.")
    ] = None,
    prefix_caching: Annotated[
        bool,
        typer.Option(envvar="PARED_PREFIX_CACHING", help="Keep what prompts begin with, for others that begin alike."),
    ] = True,
    max_waiting: Annotated[int, _option("max-waiting", "Answers that wait for a place.")] = 256,
    max_prompt_tokens: Annotated[
        int | None, _option("max-prompt-tokens", "Tokens of a prompt; default: what the context holds.")
    ] = None,
    max_prompts: Annotated[int, _option("max-prompts", "Prompts of one request.")] = 64,
    max_texts: Annotated[int, _option("max-texts", "Texts to embed in one request.")] = 2048,
    max_n: Annotated[int, _option("max-n", "Answers to one prompt.")] = 16,
    max_body_bytes: Annotated[int, _option("max-body-bytes", "Size of a request.")] = 4 * 2**20,
    body_seconds: Annotated[float, _option("body-seconds", "Time for a request to arrive.")] = 30.0,
    drain_seconds: Annotated[float, _option("drain-seconds", "Time to finish what runs when told to end.")] = 30.0,
    log_level: Annotated[LogLevel, _option("log-level", "How much the log on stderr tells.")] = LogLevel.info,
) -> None:
    """Serve a model behind the OpenAI API until a signal comes; what runs is finished first."""
    try:
        from .runtime.server.limits import Limits
        from .runtime.server.run import Binding, service_of
        from .runtime.server.run import serve as run
    except ImportError as error:
        raise BadParameter(f"serving needs {error.name}: pip install 'pared[serve]'") from error
    from .compact import open_folder
    from .reports import folder_report
    from .runtime.llm import LLM

    llm = LLM(
        path,
        dtype=dtype,
        device=device,
        strict=strict,
        int8_head=int8_head,
        max_batch=max_batch,
        chunk=chunk,
        prefix_caching=prefix_caching,
        kv_cache_bytes=kv_cache_bytes,
    )
    limits = Limits(
        waiting=max_waiting,
        prompts=max_prompts,
        texts=max_texts,
        n=max_n,
        prompt_tokens=max_prompt_tokens,
        body_bytes=max_body_bytes,
        body_s=body_seconds,
        drain_s=drain_seconds,
    )
    binding = Binding(host, port, socket, certificate, private_key, root_path)
    service = service_of(llm, name or path.resolve().name, limits)
    with open_folder(path) as folder:
        service.folder = folder_report(folder).as_json()
    run(service, binding, api_key_file, log_level.value)
