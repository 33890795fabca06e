"""`pared deploy`: what other programs have to be told to keep a model served."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import BadParameter, FolderExists
from .serve_cli import serve

app = typer.Typer(name="deploy", help="Write what keeps a model served on many machines.", no_args_is_help=True)

LISTENS = {
    "host": "host",
    "port": "port",
    "root_path": "root_path",
    "certificate": "ssl_certfile",
    "private_key": "ssl_keyfile",
}
"""Options of `pared serve` that are for whoever listens, and Ray Serve's names for them."""
ALIVE = {"health_check_period_s": 5, "health_check_timeout_s": 30}
ROOM = 2
"""Serve holds requests back above so many times what a replica takes: the replica's own refusal, which says when to
come again, is to come first."""
HEADER = """\
# Made by `pared deploy ray`: `serve run {name}` starts it here, `serve deploy {name}` sends it to a cluster.
# env_vars are options of `pared serve`; its --help names them all.
"""


def options_of_serve(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes **options those of `pared serve`: PATH before its own parameters, the others behind."""
    options = dict(inspect.signature(serve, eval_str=True).parameters)
    del options["context"], options["socket"]  # Ray Serve listens at ports alone
    own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
    command.__signature__ = inspect.Signature([options.pop("path"), *own, *options.values()])  # type: ignore[attr-defined]
    return command


@app.command()
@options_of_serve
def ray(
    out: Annotated[Path, typer.Argument(help="The file to write, as serve.yaml.", show_default=False)],
    replicas: Annotated[int, typer.Option(min=1, help="Engines, each with weights of its own.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(help="Start more, up to so many, while there are --max-batch requests for each.")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of a replica, and its threads.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a replica.")] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    **options: Any,
) -> None:
    """Write the config of a Ray Serve application: what `pared serve` serves, on several replicas.

    Every replica reads PATH, so it has to be there on every machine. Running it takes pared[ray].
    """
    import yaml

    if out.exists() and not overwrite:
        raise FolderExists(f"{out} is already there; choose another name or give --overwrite")
    if max_replicas is not None and max_replicas < replicas:
        raise BadParameter(f"--max-replicas {max_replicas} is less than --replicas {replicas}")
    deployment = {"ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus}} | scale(replicas, max_replicas, options)
    text = HEADER.format(name=out.name) + yaml.safe_dump(config(deployment, options), sort_keys=False)
    out.write_text(text, encoding="utf-8")
    print(f"{out} is written; next: serve run {out}")


def config(deployment: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What `serve run` takes. deployment: what our one deployment is given beside its name."""
    given = plain(options)
    http = {theirs: given[ours] for ours, theirs in LISTENS.items() if given[ours] is not None}
    application = {
        "name": options["name"] or options["path"].resolve().name,
        "route_prefix": "/",
        "import_path": "pared.ray_serve:application",
        "runtime_env": {"env_vars": variables(options)},
        "deployments": [{"name": "Replica", **deployment}],
    }
    return {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}


def scale(replicas: int, max_replicas: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """How many replicas there are, what each takes, and how they end."""
    batch, waiting = options["max_batch"], options["max_waiting"]
    if max_replicas is None:
        count: dict[str, Any] = {"num_replicas": replicas}
    else:
        bounds = {"min_replicas": replicas, "max_replicas": max_replicas}
        count = {"autoscaling_config": {**bounds, "target_ongoing_requests": batch}}
    ends = {"graceful_shutdown_timeout_s": options["drain_seconds"]}
    return {**count, "max_ongoing_requests": ROOM * (batch + waiting), **ALIVE, **ends}


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as YAML has them: words for choices, whole paths for files."""
    words = {name: value.value if isinstance(value, Enum) else value for name, value in options.items()}
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in words.items()}


def variables(options: dict[str, Any]) -> dict[str, str]:
    """Options of `pared serve` that are not at their defaults, by their variables."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(serve).parameters.items()}
    given = {name: value for name, value in options.items() if name not in LISTENS and value != defaults[name]}
    texts = {name: " ".join(value) if isinstance(value, list) else str(value) for name, value in plain(given).items()}
    return {f"PARED_{name.upper()}": text for name, text in texts.items()}
