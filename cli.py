"""The command line: pared convert | inspect | generate | chat | serve | embed | eval | bench | kernels and more.

Commands are thin: each imports what it needs when it runs, so that `pared --help` is quick, and prints
what the library returns. Errors of pared's own tree become one red block and exit code 1.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import __version__, deploy_cli, folders_cli, kernels_cli, measuring_cli, running_cli, serve_cli
from .kernels.dispatch import set_threads
from .terminal import print_error

app = typer.Typer(
    name="pared",
    help="Convert language models to compact folders, look into them, run them and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(serve_cli.serve)
app.command()(folders_cli.doctor)
app.command()(folders_cli.convert)
app.command()(folders_cli.export)
app.command()(folders_cli.inspect)
app.command()(running_cli.generate)
app.command()(running_cli.chat)
app.command()(running_cli.embed)
app.command("eval")(measuring_cli.evaluate)
app.add_typer(measuring_cli.bench)
app.add_typer(deploy_cli.app)
app.add_typer(kernels_cli.app)


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
