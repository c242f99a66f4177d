"""The `adarun` command: finds the subcommand, prints errors in one place."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import typer

from adarun import __version__
from adarun.cli import run
from adarun.errors import AdarunError

app = typer.Typer(
    name="adarun",
    help="torchrun that adapts. `adarun [OPTIONS] train.py [ARGS]` is short for `adarun run ...`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("run", context_settings=run.CONTEXT, help=run.__doc__)(run.run)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(f"adarun {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `adarun` script and of `python -m adarun`."""
    try:
        app(with_command(sys.argv[1:]), prog_name="adarun")
    except AdarunError as error:
        sys.stderr.write(f"adarun: {error}\n")
        sys.exit(error.exit_code)


def with_command(arguments: list[str]) -> list[str]:
    """Put `run` in front of a command line that names no command, as torchrun's users write it."""
    commands = [command.name or "" for command in app.registered_commands]
    first = arguments[0] if arguments else "--help"
    if first in (*commands, "--help", "--version"):
        return arguments
    if not first.startswith("-") and not Path(first).exists():
        near = difflib.get_close_matches(first, commands, n=1)
        hint = f"did you mean adarun {near[0]}?" if near else "adarun --help lists the commands"
        sys.stderr.write(f"adarun: {first} is neither a command nor a file; {hint}\n")
        sys.exit(2)
    return ["run", *arguments]
